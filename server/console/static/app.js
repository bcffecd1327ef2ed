// The frame: which view the address names, the line about the server, and the key.

import { key } from "./api.js";
import { h, put } from "./dom.js";
import { jobView } from "./job.js";
import { jobsView } from "./jobs.js";
import { playgroundView } from "./playground.js";
import { isAdmin, refresh, server, start } from "./server.js";
import { keyView } from "./key.js";
import { uploadView } from "./upload.js";
import { variantView } from "./variant.js";
import { variantsView } from "./variants.js";

const main = document.getElementById("main");
const status = document.getElementById("status");
const outage = document.getElementById("outage");
const keyButton = document.getElementById("key");

// A view is {title, element, update(), close()}; update is called whenever something is known anew.
let view = null;
let shown = null;

function route() {
  const [path, query = ""] = location.hash.slice(1).split("?");
  const [, place = "variants", ...rest] = (path || "/variants").split("/");
  const name = decodeURIComponent(rest.join("/"));
  return { place, name, query: new URLSearchParams(query) };
}

// What is to be seen now, as a text that changes when another view must be built.
function wanted() {
  if (server.needsKey) return "key";
  if (!server.figures) return "waiting";
  const { place } = route();
  return isAdmin() || place === "playground" ? location.hash || "#/variants" : `closed ${location.hash}`;
}

function build(what) {
  if (what === "key") return keyView();
  if (what === "waiting") return page("deltaserve", h("p", { class: "quiet" }, "Asking the server …"));
  const { place, name, query } = route();
  if (what.startsWith("closed")) return closedView(place);
  if (place === "upload") return uploadView(query);
  if (place === "jobs") return name ? jobView(name) : jobsView();
  if (place === "playground") return playgroundView(query);
  return name ? variantView(name) : variantsView();
}

const page = (title, ...children) => ({ title, element: h("section", {}, ...children), update() {}, close() {} });

function closedView(place) {
  const caller = server.figures.caller;
  const what = { upload: "upload variants", jobs: "see jobs" }[place] ?? "see or change variants";
  return page("Not for this key",
    h("h1", {}, `This key may not ${what}`),
    h("p", {}, `The key “${caller.name}” has the role ${caller.role}. It may ask ${asks(caller)} in the playground; `
      + "looking at variants, uploads, compression, pins, roll back and removal need a key of the role admin."),
    h("p", { class: "actions" }, h("a", { class: "button main", href: "#/playground" }, "Open the playground"),
      h("button", { type: "button", onclick: forgetKey }, "Use another key")));
}

const asks = (caller) => (caller.models ? caller.models.join(", ") : "all models");

function show() {
  const what = wanted();
  if (what !== shown) {
    const isFirst = shown === null || shown === "waiting";
    view?.close();
    shown = what;
    view = build(what);
    main.replaceChildren(view.element);
    document.title = view.title === "deltaserve" ? view.title : `${view.title} · deltaserve`;
    if (!isFirst) main.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  view.update();
  frame();
}

function frame() {
  const { place } = route();
  for (const link of document.querySelectorAll("nav a")) {
    const isHere = link.hash === `#/${place}` && !server.needsKey;
    if (isHere) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  outage.hidden = !server.outage;
  put(outage, server.outage ?? "");
  const figures = server.figures;
  status.className = `status ${server.outage ? "bad" : figures ? "good" : ""}`;
  put(status, figures ? `${figures.base.id} · ${figures.running ? `${figures.running} running` : "idle"}` : "");
  keyButton.hidden = !figures?.keys;
  put(keyButton, figures?.caller.name ? `Key: ${figures.caller.name} (${figures.caller.role})` : "Key");
}

function forgetKey() {
  key.set(null);
  refresh();
}

keyButton.title = "Forget this key and ask for another one";
keyButton.addEventListener("click", forgetKey);
addEventListener("hashchange", show);
server.addEventListener("change", show);
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
show();
start();
