// The table of variants: searched, sorted, and shown a page at a time, so that a thousand are as quick as three.

import { badge, field, h, put } from "./dom.js";
import { NONE, bytes, count, gainKept, nats, percent, plural, rate, ratio, seconds } from "./format.js";
import { isPinned, server, tierOf } from "./server.js";

const PAGE = 50;
const TIERS = { resident: "in memory", loading: "loading", host: "on the host", store: "stored" };
export const tierText = (tier) => TIERS[tier] ?? tier;

const live = (variant) => server.live.of(variant.id);
// Title, what it sorts by, what it shows, and what a pointer or a screen reader is told of the column.
const COMMON = [
  ["Name", (v) => v.id, null, "Name of the variant"],
  ["Version", (v) => v.version, (v) => String(v.version), "Number of the current version"],
  ["Size", (v) => v.size_bytes, (v) => bytes(v.size_bytes), "Bytes of the current artifact, everything counted"],
  ["Smaller", (v) => -v.size_bytes, (v) => ratio(server.figures.base.bytes / v.size_bytes), "Size of the base in 16 bits over that of the artifact"],
  ["KL", (v) => v.quality?.kl_mean ?? Infinity, (v) => nats(v.quality?.kl_mean), "Mean KL divergence from the full fine-tune, nats a token, on the text of its report"],
  ["Same token", (v) => -(v.quality?.top1_agreement ?? -1), (v) => percent(v.quality?.top1_agreement), "Share of tokens on which it puts the same first as the full fine-tune"],
  ["Gain kept", (v) => -(gainKept(v.quality) ?? -9), (v) => percent(gainKept(v.quality)), "Share of what fine-tuning gained over the base in held-out loss"],
  ["Where", (v) => Object.keys(TIERS).indexOf(tierOf(v)), null, "In memory, loading, on the host, or stored"],
  ["Req/min", (v) => -(live(v)?.requestsPerMinute ?? -1), (v) => rate(live(v)?.requestsPerMinute), "Requests a minute, over the last minute or since this page was opened"],
];
const tokens = (hint) => ["Tokens/s", (v) => -(live(v)?.tokensPerSecond ?? -1), (v) => rate(live(v)?.tokensPerSecond), hint];
const latency = (title, hint) => [title, (v) => live(v)?.latency ?? Infinity, (v) => seconds(live(v)?.latency), hint];
const COLUMNS = {
  decoder: [...COMMON, tokens("Generated tokens a second, over the same time"), latency("First token", "Mean time to the first token, over the same time")],
  encoder: [...COMMON, tokens("Tokens of texts a second, over the same time"), latency("Answer", "Mean time until a request is answered, over the same time")],
};
const WORDS = new Set(["Name", "Where"]); // all other columns are numbers

// Kept while one looks at a variant and comes back.
const chosen = { search: "", where: "all", sort: 0, isReversed: false, page: 0 };

export function variantsView() {
  const columns = COLUMNS[server.figures.base.kind];
  const search = h("input", { type: "search", placeholder: "Part of a name", value: chosen.search, oninput: () => narrow("search", search.value) });
  const where = h("select", { onchange: () => narrow("where", where.value) },
    ...[["all", "All"], ["memory", "In memory"], ["pinned", "Pinned"], ["asked", "Asked in the last minute"]].map(([value, text]) =>
      h("option", { value, selected: value === chosen.where }, text)));
  const sorts = columns.map(([title, , , hint], at) => h("button", { type: "button", title: hint, onclick: () => sortBy(at) }, title));
  const sort = h("select", { onchange: () => sortBy(Number(sort.value)) }, ...columns.map(([title], at) => h("option", { value: at, selected: at === chosen.sort }, title)));
  const sortField = field("Sort by", sort);
  sortField.classList.add("sort-by");
  const heads = columns.map(([title], at) => h("th", { scope: "col", class: !WORDS.has(title) && "number" }, sorts[at]));
  const body = h("tbody");
  const found = h("p", { class: "quiet", role: "status" });
  const back = h("button", { type: "button", onclick: () => turn(-1) }, "Previous");
  const on = h("button", { type: "button", onclick: () => turn(1) }, "Next");
  const where_ = h("span", { class: "quiet" });
  const pages = h("nav", { class: "pages", "aria-label": "Pages" }, back, where_, on);
  const table = h("div", { class: "scroll" }, h("table", { class: "variants" }, h("caption", { class: "unseen" }, "Variants"), h("thead", {}, h("tr", {}, ...heads)), body));
  const empty = h("div", { class: "card empty" });
  const summary = summaryCards();
  const rows = new Map();

  function narrow(what, value) { chosen[what] = value; chosen.page = 0; update(); }
  function turn(by) { chosen.page += by; update(); scrollTo(0, 0); }
  function sortBy(at) {
    chosen.isReversed = chosen.sort === at && !chosen.isReversed;
    chosen.sort = at;
    chosen.page = 0;
    update();
  }

  function wanted() {
    const text = chosen.search.trim().toLowerCase();
    const tests = { all: () => true, memory: (v) => tierOf(v) === "resident", pinned: isPinned, asked: (v) => live(v)?.requestsPerMinute > 0 };
    const list = server.variants.filter((v) => v.id.toLowerCase().includes(text) && tests[chosen.where](v));
    const by = columns[chosen.sort][1];
    const sign = chosen.isReversed ? -1 : 1;
    const keyed = list.map((v) => [by(v), v]);
    keyed.sort(([a, v], [b, w]) => sign * (a < b ? -1 : a > b ? 1 : 0) || (v.id < w.id ? -1 : 1));
    return keyed.map(([, v]) => v);
  }

  function update() {
    summary.update();
    if (!server.variants) return;
    const list = wanted();
    const last = Math.max(0, Math.ceil(list.length / PAGE) - 1);
    chosen.page = Math.min(Math.max(chosen.page, 0), last);
    const shown = list.slice(chosen.page * PAGE, (chosen.page + 1) * PAGE);
    const elements = shown.map((variant) => {
      if (!rows.has(variant.id)) rows.set(variant.id, row(variant.id, columns));
      const one = rows.get(variant.id);
      one.fill(variant);
      return one.element;
    });
    const isSame = elements.length === body.children.length && elements.every((element, at) => element === body.children[at]);
    if (!isSame) body.replaceChildren(...elements);
    heads.forEach((head, at) => head.setAttribute("aria-sort", at !== chosen.sort ? "none" : chosen.isReversed ? "descending" : "ascending"));
    const all = server.variants.length;
    put(found, list.length === all ? plural(all, "variant") : `${list.length} of ${plural(all, "variant")}`);
    pages.hidden = last === 0;
    back.disabled = chosen.page === 0;
    on.disabled = chosen.page === last;
    put(where_, `Page ${chosen.page + 1} of ${last + 1}`);
    table.hidden = list.length === 0;
    empty.hidden = list.length > 0;
    if (!empty.hidden) put(empty, all ? "No variant fits." : "There is no variant yet. Upload a fine-tune of the base, or use deltaserve push.");
  }

  return {
    title: "Variants",
    element: h("section", {},
      h("div", { class: "head" }, h("h1", {}, "Variants"), h("a", { class: "button main", href: "#/upload" }, "Upload")),
      summary.element,
      h("div", { class: "filters" }, field("Search", search), field("Show", where), sortField, found),
      table, empty, pages),
    update,
    close() {},
  };
}

function row(name, columns) {
  const link = h("a", { href: `#/variants/${name}` }, name);
  const marks = h("span", { class: "marks" });
  const tier = h("span", { class: "badge" });
  const cells = columns.map(([title, , show]) => [h("td", { "data-label": title, class: !WORDS.has(title) && "number" }), show]);
  const element = h("tr", {}, h("th", { scope: "row" }, link, marks), ...cells.slice(1).map(([cell]) => cell));
  cells[7][0].append(tier);

  return {
    element,
    fill(variant) {
      for (const [cell, show] of cells.filter(([, one]) => one)) {
        put(cell, show(variant));
        cell.classList.toggle("none", cell.textContent === NONE);
      }
      const where = tierOf(variant);
      put(tier, tierText(where));
      tier.className = `badge ${where === "resident" ? "good" : ""}`;
      const notes = [
        isPinned(variant) && "pinned",
        server.figures.memory.swapped === variant.id && "in the base’s weights",
        !variant.base_matches && "another base",
        variant.quality?.tolerance?.met === false && "missed its tolerance",
      ].filter(Boolean);
      if (marks.dataset.notes !== notes.join()) {
        marks.dataset.notes = notes.join();
        marks.replaceChildren(...notes.map((note) => badge(note, /another|missed/.test(note) ? "bad" : "accent")));
      }
    },
  };
}

// What the whole server does now.
function summaryCards() {
  const isEncoder = server.figures.base.kind === "encoder";
  const cards = [
    ["Base", (f) => f.base.id, (f) => `${count(f.base.parameters)} parameters · ${bytes(f.base.bytes)}`],
    ["In memory", (f) => `${f.memory.slots_used} of ${f.memory.slots}`, (f) => `${bytes(f.memory.bytes_used)} of ${bytes(f.memory.bytes)}`],
    ["Requests", (f) => `${f.running} running`, (f) => (f.waiting ? `${f.waiting} waiting` : "none waiting")],
    [isEncoder ? "Tokens of texts" : "Generated tokens", () => `${rate(server.live.total()?.tokensPerSecond)}/s`,
      (f) => (isEncoder ? `${rate(server.live.total()?.requestsPerMinute)} requests a minute` : `cache ${percent(f.cache_used)} used`)],
  ].map(([title, main, more]) => ({ main, more, title, value: h("dd", { class: "value" }), note: h("dd", { class: "quiet" }) }));
  return {
    element: h("dl", { class: "cards" }, ...cards.map((card) => h("div", { class: "card" }, h("dt", {}, card.title), card.value, card.note))),
    update() {
      for (const card of cards) {
        put(card.value, card.main(server.figures));
        put(card.note, card.more(server.figures));
      }
    },
  };
}
