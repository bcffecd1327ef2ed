// One variant: what it keeps of its fine-tune, its versions, and what may be done with one.

import { at, call } from "./api.js";
import { badge, confirmed, h, put, toast } from "./dom.js";
import { rate } from "./format.js";
import { cards, fillList, report } from "./report.js";
import { byName, isPinned, refresh, server, tierOf } from "./server.js";
import { tierText } from "./variants.js";
import { versionsTable } from "./versions.js";

export function variantView(name) {
  const where = h("span", { class: "badge" });
  const marks = h("span", { class: "marks" });
  const problem = h("p", { class: "notice bad", role: "alert", hidden: true });
  const pin = h("button", { type: "button", onclick: () => togglePin() }, "Pin");
  const prefetch = h("button", { type: "button", title: "Load it as soon as there is a free place", onclick: () => act("POST", "prefetch", `${name} will be loaded as soon as there is a place.`) }, "Prefetch");
  const back = h("button", { type: "button", onclick: () => versions.rollBack() }, "Roll back");
  const remove = h("button", { type: "button", class: "danger", onclick: () => removeIt() }, "Delete");
  const figures = h("dl", { class: "cards" });
  const facts = h("dl", { class: "facts" });
  const versions = versionsTable(name, act, () => { back.disabled = !versions.canRollBack; });
  const gone = h("p", { class: "notice", hidden: true }, "There is no variant of this name (any more). ", h("a", { href: "#/variants" }, "All variants"));
  const rest = h("div", {});
  let isRemoved = false;

  async function act(method, action, said, body) {
    problem.hidden = true;
    for (const button of [pin, prefetch, back, remove]) button.disabled = true;
    try {
      await call(method, action ? `${at(name)}/${action}` : at(name), body);
      toast(said);
      return true;
    } catch (error) {
      put(problem, error.message);
      problem.hidden = false;
      return false;
    } finally {
      for (const button of [pin, prefetch, back, remove]) button.disabled = false;
      await Promise.all([isRemoved || versions.load(), refresh()]);
      setTimeout(refresh, 1000);
    }
  }

  const togglePin = () => (isPinned(byName(name))
    ? act("DELETE", "pin", `${name} may be evicted again.`)
    : act("PUT", "pin", `${name} is in memory and stays there.`));

  async function removeIt() {
    const asked = server.live.of(name)?.requestsPerMinute;
    const text = `All ${versions.count} and their files go, and cannot be had back. `
      + `${asked ? `It is asked ${rate(asked)} times a minute now; n` : "N"}ew requests will be answered 404.`;
    if (!await confirmed(`Delete ${name}?`, text, "Delete", true)) return;
    isRemoved = true;
    if (await act("DELETE", "", `${name} is deleted.`)) location.hash = "#/variants";
    else isRemoved = false;
  }

  function update() {
    const variant = byName(name);
    const isKnown = Boolean(variant) && !isRemoved;
    gone.hidden = isKnown || !server.variants;
    rest.hidden = !isKnown;
    if (!isKnown) return;
    if (versions.isOld(variant.digest)) versions.load();
    const tier = tierOf(variant);
    put(where, tierText(tier));
    where.className = `badge ${tier === "resident" ? "good" : ""}`;
    marks.replaceChildren(...[isPinned(variant) && badge("pinned", "accent"), !variant.base_matches && badge("another base", "bad")].filter(Boolean));
    put(pin, isPinned(variant) ? "Unpin" : "Pin");
    pin.title = isPinned(variant) ? "Let it be evicted like all others" : "Load it and keep it in memory";
    prefetch.disabled = tier === "resident" || tier === "loading";
    fillList(figures, cards(variant), (title, value, note) => h("div", { class: "card" }, h("dt", {}, title), h("dd", { class: "value" }, value), h("dd", { class: "quiet" }, note)));
    fillList(facts, report(variant), (title, value) => h("div", {}, h("dt", {}, title), h("dd", {}, value)));
  }

  rest.append(
    h("div", { class: "actions" },
      h("a", { class: "button main", href: `#/playground?models=${encodeURIComponent(`${server.figures.base.id},${name}`)}` }, "Ask it"),
      h("a", { class: "button", href: `#/upload?name=${encodeURIComponent(name)}` }, "New version"), pin, prefetch, back, remove),
    problem, figures,
    h("h2", {}, "Quality report"), facts,
    h("h2", {}, "Versions"), versions.element);
  versions.load();
  return {
    title: name,
    element: h("section", {}, h("p", { class: "crumbs" }, h("a", { href: "#/variants" }, "Variants")), h("div", { class: "head start" }, h("h1", {}, name), where, marks), gone, rest),
    update,
    close() {},
  };
}
