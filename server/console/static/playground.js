// One question to several models at once, their answers side by side as they come.

import { events, open } from "./api.js";
import { badge, field, h, put } from "./dom.js";
import { percent, plural, rate, seconds, short } from "./format.js";
import { askable, byName, server, tierOf } from "./server.js";

const MOST = 5; // a browser keeps six connections to a server, and one is for asking how it is
// Kept while one looks at something else and comes back.
const kept = { models: null, question: "", system: "", temperature: "0", maxTokens: "128", answers: new Map() };

export function playgroundView(query) {
  const isEncoder = server.figures.base.kind === "encoder";
  const given = query.get("models")?.split(",").filter(Boolean);
  if (given) kept.models = given;
  const names = h("datalist", { id: "model-names" });
  const add = h("input", { list: names.id, placeholder: "Add a model", "aria-label": "Add a model", autocomplete: "off", onchange: addModel });
  const problem = h("p", { class: "problem", role: "alert" });
  const chips = h("ul", { class: "chips", "aria-label": "Models that are asked" });
  const question = h("textarea", { rows: 2, required: true, placeholder: isEncoder ? "A text to classify" : "Ask all of them the same" });
  const system = h("textarea", { rows: 2 });
  const temperature = h("input", { type: "number", min: 0, max: 2, step: 0.1, required: true });
  const maxTokens = h("input", { type: "number", min: 1, step: 1, required: true });
  question.value = kept.question; system.value = kept.system; temperature.value = kept.temperature; maxTokens.value = kept.maxTokens;
  const ask = h("button", { class: "main" }, isEncoder ? "Classify" : "Ask");
  const stop = h("button", { type: "button", disabled: true, onclick: () => stopping?.abort() }, "Stop");
  const said = h("p", { class: "quiet", role: "status" });
  const columns = h("div", { class: "columns" });
  const form = h("form", { class: "card ask", onsubmit: submit, onkeydown: submitByKeys },
    h("div", { class: "models" }, chips, add, names), problem,
    field(isEncoder ? "Text" : "Question", question),
    !isEncoder && h("details", {}, h("summary", {}, "System message, temperature, length"),
      h("div", { class: "fields" }, field("System message", system), field("Temperature", temperature, "0 always takes the likeliest token."), field("Most tokens", maxTokens))),
    h("div", { class: "actions" }, ask, stop, said, h("small", { class: "keys" }, "Ctrl + Enter asks")));
  let stopping = null;
  let listed = null;

  function addModel() {
    const name = add.value.trim();
    if (!name) return;
    const isKnown = askable().includes(name);
    put(problem, !isKnown ? `There is no model “${name}” that this key may ask.` : kept.models.length >= MOST ? `At most ${MOST} at once; take one away first.` : "");
    if (problem.textContent) return;
    add.value = "";
    if (!kept.models.includes(name)) kept.models.push(name);
    fillChips();
  }

  function fillChips() {
    chips.replaceChildren(...kept.models.map((name) => h("li", {}, name, h("button", {
      type: "button", class: "quiet", "aria-label": `Take ${name} away`,
      onclick: () => { kept.models = kept.models.filter((one) => one !== name); kept.answers.delete(name); fillChips(); add.focus(); },
    }, "×"))));
    const shown = kept.models.map((name) => {
      if (!kept.answers.has(name)) kept.answers.set(name, isEncoder ? classColumn(name) : chatColumn(name));
      return kept.answers.get(name).element;
    });
    columns.replaceChildren(...shown);
    ask.disabled = kept.models.length === 0 || stopping !== null;
  }

  function submitByKeys(event) {
    if (event.key === "Enter" && event.target === add) { event.preventDefault(); addModel(); }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !ask.disabled) form.requestSubmit(ask);
  }

  async function submit(event) {
    event.preventDefault();
    if (stopping) return;
    stopping = new AbortController();
    Object.assign(kept, { question: question.value, system: system.value, temperature: temperature.value, maxTokens: maxTokens.value });
    ask.disabled = true;
    stop.disabled = false;
    put(said, `Asking ${plural(kept.models.length, "model")} …`);
    const asked = { question: question.value, system: system.value.trim(), temperature: Number(temperature.value), maxTokens: Number(maxTokens.value) };
    const fine = await Promise.all(kept.models.map((name) => kept.answers.get(name).ask(asked, stopping.signal)));
    put(said, stopping.signal.aborted ? "Stopped." : fine.every(Boolean) ? "All have answered." : "Not all could answer.");
    stopping = null;
    ask.disabled = kept.models.length === 0;
    stop.disabled = true;
  }

  function update() {
    const known = askable();
    if (!known.length) return;
    if (kept.models === null) kept.models = known.slice(0, 4);
    if (known.join() !== listed) {
      listed = known.join();
      names.replaceChildren(...known.map((name) => h("option", { value: name })));
      fillChips();
    }
    for (const [name, column] of kept.answers) column.update(name);
  }

  return {
    title: "Playground",
    element: h("section", {}, h("h1", {}, "Playground"), form, columns),
    update,
    close() { stopping?.abort(); Object.assign(kept, { question: question.value, system: system.value }); },
  };
}

// Where the model is now, told only of variants.
function placed(element, name) {
  const variant = byName(name);
  put(element, variant ? { resident: "in memory", loading: "loading", host: "on the host", store: "stored" }[tierOf(variant)] : name === server.figures?.base.id ? "base" : "");
  element.hidden = !element.textContent;
}

function column(name) {
  const place = badge("");
  const text = h("div", { class: "answer" });
  const problem = h("p", { class: "notice bad", hidden: true });
  const foot = h("p", { class: "foot" });
  const element = h("article", { class: "card column", "aria-label": `Answer of ${name}` }, h("h2", {}, name, " ", place), text, problem, foot);
  return { place, text, problem, foot, element, update: (model) => placed(place, model) };
}

// Whether `fill` put an answer into the column, or was stopped; what it throws is shown there.
async function answered(view, fill) {
  view.text.replaceChildren();
  view.problem.hidden = true;
  put(view.foot, "waits …");
  view.element.setAttribute("aria-busy", "true");
  try {
    put(view.foot, await fill(performance.now()));
    return true;
  } catch (error) {
    const isStopped = error.name === "AbortError";
    put(view.foot, isStopped ? "stopped" : "");
    put(view.problem, isStopped ? "" : error.message);
    view.problem.hidden = isStopped;
    return isStopped;
  } finally {
    view.element.removeAttribute("aria-busy");
  }
}

function chatColumn(name) {
  const view = column(name);

  const ask = ({ question, system, temperature, maxTokens }, signal) => answered(view, async (started) => {
    const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: question }];
    let first = null, reason = null, usage = null;
    const written = document.createTextNode("");
    view.text.append(written);
    const response = await open("POST", "v1/chat/completions",
      { model: name, messages, temperature, max_tokens: maxTokens, stream: true, stream_options: { include_usage: true } }, signal);
    for await (const chunk of events(response)) {
      const choice = chunk.choices[0];
      usage = chunk.usage ?? usage;
      reason = choice?.finish_reason ?? reason;
      if (!choice?.delta.content) continue;
      first ??= performance.now();
      written.data += choice.delta.content;
      put(view.foot, `first token after ${seconds((first - started) / 1000)}`);
    }
    return footnote(started, first, usage, reason, response.headers.get("x-deltaserve-version"));
  });

  return { ...view, ask };
}

function footnote(started, first, usage, reason, version) {
  const tokens = usage?.completion_tokens ?? 0;
  const decoding = first === null ? 0 : (performance.now() - first) / 1000;
  return [
    first !== null && `first token ${seconds((first - started) / 1000)}`,
    plural(tokens, "token"),
    tokens > 1 && decoding > 0 && `${rate((tokens - 1) / decoding)} tokens/s`,
    reason === "length" ? "stopped at the length limit" : reason,
    `version ${short(version)}`,
  ].filter(Boolean).join(" · ");
}

function classColumn(name) {
  const view = column(name);

  const ask = ({ question }, signal) => answered(view, async (started) => {
    const answer = await (await open("POST", "v1/classify", { model: name, input: question }, signal)).json();
    const result = answer.data[0];
    view.text.append(h("p", {}, h("strong", {}, result.label)), h("p", {}, result.probs.map((p) => percent(p)).join(" · ")));
    return seconds((performance.now() - started) / 1000);
  });

  return { ...view, ask };
}
