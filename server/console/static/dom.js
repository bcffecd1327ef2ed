// Elements, without a framework: text is always text, never markup.

const SVG = "http://www.w3.org/2000/svg";

// h("button", {class: "main", onclick: ask, disabled: true}, "Ask"); null and false leave an attribute or a child out.
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// Change text only where it differs, so that a selection or a screen reader is not disturbed every two seconds.
export function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

let ids = 0;

// A labelled field; `hint` is read with it.
export function field(label, control, hint = null) {
  control.id ||= `field-${++ids}`;
  const note = hint && h("small", { id: `${control.id}-hint` }, hint);
  if (note) control.setAttribute("aria-describedby", note.id);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, note);
}

export function badge(text, kind = "") {
  return h("span", { class: `badge ${kind}` }, text);
}

// A short note at the edge that goes by itself; errors stay until they are closed.
export function toast(text, isError = false) {
  const close = h("button", { type: "button", class: "quiet", "aria-label": "Close" }, "×");
  const note = h("p", { class: `toast ${isError ? "bad" : ""}`, role: isError ? "alert" : null }, h("span", {}, text), close);
  close.addEventListener("click", () => note.remove());
  document.getElementById("toasts").append(note);
  if (!isError) setTimeout(() => note.remove(), 5000);
}

// Ask before something that cannot be undone, or for what is in the field `body`; resolves to true if it was confirmed.
export function confirmed(title, body, verb, isDangerous = false) {
  const isText = typeof body === "string";
  const cancel = h("button", { type: "button", autofocus: isText, onclick: () => dialog.close() }, "Cancel");
  const go = h("button", { value: "yes", class: isDangerous ? "danger" : "main" }, verb);
  const heading = h("h2", { id: "confirm-title" }, title);
  const dialog = h("dialog", { "aria-labelledby": heading.id },
    h("form", { method: "dialog" }, heading, isText ? h("p", {}, body) : body, h("div", { class: "actions end" }, cancel, go)));
  document.body.append(dialog);
  dialog.showModal();
  dialog.querySelector("input")?.select();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    dialog.remove();
    resolve(dialog.returnValue === "yes");
  }));
}
