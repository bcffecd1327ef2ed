// The page asks for an API key where the server wants one; it is kept for this tab alone.

import { key } from "./api.js";
import { field, h, put } from "./dom.js";
import { refresh, server } from "./server.js";

export function keyView() {
  const input = h("input", { type: "password", autocomplete: "off", spellcheck: "false", required: true, placeholder: "sk-…" });
  const problem = h("p", { class: "problem", role: "alert" });
  const form = h("form", { class: "card narrow", onsubmit: submit },
    field("API key", input, "Kept in this tab until it is closed, and sent to this server only."),
    problem,
    h("div", { class: "actions" }, h("button", { class: "main" }, "Go on")));

  async function submit(event) {
    event.preventDefault();
    key.set(input.value.trim());
    await refresh();
  }

  return {
    title: "API key",
    element: h("section", {},
      h("h1", {}, "This server asks for a key"),
      h("p", { class: "quiet" }, "A key of the role admin sees and changes everything here; one of the role infer may use the playground. "
        + "Make one with ", h("code", {}, "deltaserve keys create"), "."),
      form),
    update() { put(problem, server.refusal ?? ""); },
    close() {},
  };
}
