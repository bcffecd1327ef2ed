// One variant: what it keeps of its fine-tune, its versions, and what may be done with it.

import { at, call } from "./api.js";
import { badge, confirmed, h, put, toast } from "./dom.js";
import { bytes, date, gainKept, nats, percent, plural, rate, ratio, seconds, short } from "./format.js";
import { byName, isPinned, refresh, server, tierOf } from "./server.js";
import { tierText } from "./variants.js";

export function variantView(name) {
  const where = h("span", { class: "badge" });
  const marks = h("span", { class: "marks" });
  const problem = h("p", { class: "notice bad", role: "alert", hidden: true });
  const pin = h("button", { type: "button", onclick: () => togglePin() }, "Pin");
  const prefetch = h("button", { type: "button", title: "Load it as soon as there is a free place", onclick: () => act("POST", "prefetch", `${name} will be loaded as soon as there is a place.`) }, "Prefetch");
  const back = h("button", { type: "button", onclick: () => rollBack() }, "Roll back");
  const remove = h("button", { type: "button", class: "danger", onclick: () => removeIt() }, "Delete");
  const figures = h("dl", { class: "cards" });
  const facts = h("dl", { class: "facts" });
  const versions = h("tbody");
  const gone = h("p", { class: "notice", hidden: true }, "There is no variant of this name (any more). ", h("a", { href: "#/variants" }, "All variants"));
  const rest = h("div", {});
  let known = null;
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
      await Promise.all([load(), refresh()]);
      setTimeout(refresh, 1000);
    }
  }

  const togglePin = () => (isPinned(byName(name))
    ? act("DELETE", "pin", `${name} may be evicted again.`)
    : act("PUT", "pin", `${name} is in memory and stays there.`));

  async function rollBack(version = null) {
    const current = known.data.find((one) => one.digest === known.current);
    const target = version ?? known.data.find((one) => one.version < current.version);
    if (!target) return;
    const text = `New requests for ${name} get version ${target.version} instead of ${current.version}; running ones finish as they are.`;
    if (await confirmed(`Turn ${name} to version ${target.version}?`, text, `Use version ${target.version}`)) {
      await act("POST", "rollback", `${name} is version ${target.version} now.`, { digest: target.digest });
    }
  }

  async function removeIt() {
    const asked = server.live.of(name)?.requestsPerMinute;
    const text = `All ${plural(known?.data.length ?? 1, "version")} and their files go, and cannot be had back. `
      + `${asked ? `It is asked ${rate(asked)} times a minute now; n` : "N"}ew requests will be answered 404.`;
    if (!await confirmed(`Delete ${name}?`, text, "Delete", true)) return;
    isRemoved = true;
    if (await act("DELETE", "", `${name} is deleted.`)) location.hash = "#/variants";
    else isRemoved = false;
  }

  async function load() {
    if (isRemoved) return;
    try {
      known = await call("GET", `${at(name)}/versions`);
    } catch (error) {
      if (error.status !== 404) toast(error.message, true);
      known = null;
    }
    fillVersions();
  }

  function fillVersions() {
    back.disabled = !known || !known.data.some((one) => one.version < known.data.find((o) => o.digest === known.current).version);
    versions.replaceChildren(...(known?.data ?? []).map((one) => {
      const isCurrent = one.digest === known.current;
      const canary = one.digest === known.canary && badge(`canary, ${percent(known.share)} of requests`, "accent");
      const use = h("button", { type: "button", class: "small", onclick: () => rollBack(one) }, `Use version ${one.version}`);
      return h("tr", {},
        h("th", { scope: "row" }, `${one.version} `, isCurrent && badge("current", "good"), canary || null),
        h("td", { "data-label": "Registered" }, date(one.created)),
        h("td", { "data-label": "Size", class: "number" }, bytes(one.size_bytes)),
        h("td", { "data-label": "KL", class: "number" }, nats(one.quality?.kl_mean)),
        h("td", { "data-label": "Same token", class: "number" }, percent(one.quality?.top1_agreement)),
        h("td", { "data-label": "Digest" }, h("code", { title: one.digest }, short(one.digest))),
        h("td", { class: "last" }, !isCurrent && use));
    }));
  }

  function update() {
    const variant = byName(name);
    const isKnown = Boolean(variant) && !isRemoved;
    gone.hidden = isKnown || !server.variants;
    rest.hidden = !isKnown;
    if (!isKnown) return;
    if (known && variant.digest !== known.current) load();
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
    h("h2", {}, "Versions"),
    h("div", { class: "scroll" }, h("table", { class: "stacked" }, h("caption", { class: "unseen" }, "Versions"),
      h("thead", {}, h("tr", {}, ...["Version", "Registered", "Size", "KL", "Same token", "Digest"].map((title) =>
        h("th", { scope: "col", class: /Size|KL|Same/.test(title) && "number" }, title)), h("td", {}))), versions)));
  load();
  return {
    title: name,
    element: h("section", {}, h("p", { class: "crumbs" }, h("a", { href: "#/variants" }, "Variants")), h("div", { class: "head start" }, h("h1", {}, name), where, marks), gone, rest),
    update,
    close() {},
  };
}

// Rebuild a list only if what it says has changed.
function fillList(list, rows, made) {
  const text = JSON.stringify(rows);
  if (list.dataset.text === text) return;
  list.dataset.text = text;
  list.replaceChildren(...rows.map((row) => made(...row)));
}

function cards(variant) {
  const quality = variant.quality, live = server.live.of(variant.id);
  return [
    ["Size", bytes(variant.size_bytes), `${ratio(server.figures.base.bytes / variant.size_bytes)} smaller than 16 bits`],
    ["KL to the full fine-tune", nats(quality?.kl_mean), quality?.kl_base ? `the bare base: ${nats(quality.kl_base)}` : "nats a token, held-out text"],
    ["Same token first", percent(quality?.top1_agreement), quality?.top1_agreement_base ? `the bare base: ${percent(quality.top1_agreement_base)}` : "as the full fine-tune"],
    ["Requests a minute", rate(live?.requestsPerMinute), `${rate(live?.tokensPerSecond)} tokens/s, first after ${seconds(live?.firstToken)}`],
  ];
}

function report(variant) {
  const q = variant.quality;
  if (!q) return [["Not measured", "The artifact has no report; deltaserve compress writes one with --evaluate or a tolerance."]];
  const tolerance = q.tolerance && Object.entries(q.tolerance).map(([name, value]) => `${name.replaceAll("_", " ")}: ${typeof value === "number" ? nats(value) : value}`).join(", ");
  const rows = [
    ["Gain kept", percent(gainKept(q))],
    ["Loss of the base", nats(q.loss_base)],
    ["Loss of the full fine-tune", nats(q.loss_fine_tuned)],
    ["Loss of this artifact", nats(q.loss_artifact)],
    ["KL, 99th percentile", nats(q.kl_p99)],
    ["Tokens measured", q.tokens ? String(q.tokens) : null],
    ["Plain DARE at these bytes", q.dare ? `KL ${nats(q.dare.kl_mean)} in ${bytes(q.dare.bytes)}` : null],
    ["Score of the task", q.score_artifact !== undefined ? `${percent(q.score_artifact)}; full fine-tune ${percent(q.score_fine_tuned)}, base ${percent(q.score_base)}` : null],
    ["Tolerance", tolerance],
    ["Tensors that apply", `${variant.tensors_applied} of ${variant.tensors_total}`],
  ];
  return rows.filter(([, value]) => value && value !== "–");
}
