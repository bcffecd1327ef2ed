// The plot of a search: bytes against KL, every point that was tried, both axes logarithmic.

import { badge, h, svg } from "./dom.js";
import { bytes, nats, percent, plural } from "./format.js";

const HEIGHT = 360;
const EDGE = { left: 62, right: 16, top: 14, bottom: 44 };
const COLOURS = 8;

// `points` as a job has them; `limit` may say {kl} or {bytes}; `chosen` is the size of what was taken, if anything was.
export function frontier(points, limit = {}, chosenBytes = null) {
  const WIDTH = matchMedia("(max-width: 640px)").matches ? 400 : 720; // so that its text stays readable on a phone
  const drawn = points.filter((point) => point.kl > 0 && point.bytes > 0);
  if (!drawn.length) return h("p", { class: "card empty" }, "The plot appears with the first measured point.");
  const thorough = drawn.filter((point) => point.text === "calibration");
  const best = paretoFront(thorough.length ? thorough : drawn);
  const x = axis([...drawn.map((point) => point.bytes), limit.bytes], EDGE.left, WIDTH - EDGE.right);
  const y = axis([...drawn.map((point) => point.kl), limit.kl], HEIGHT - EDGE.bottom, EDGE.top);
  const methods = [...new Set(drawn.map(methodOf))];
  const chosen = chosenBytes && best.toSorted((a, b) => Math.abs(a.bytes - chosenBytes) - Math.abs(b.bytes - chosenBytes))[0];

  const described = `${plural(drawn.length, "point")} tried, from ${bytes(x.low)} to ${bytes(x.high)}; KL from ${nats(y.low)} to ${nats(y.high)}`;
  const plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `Bytes against KL. ${described}.`, class: "plot" },
    x.ticks.map((tick) => [
      svg("line", { class: "grid", x1: x.at(tick), x2: x.at(tick), y1: EDGE.top, y2: HEIGHT - EDGE.bottom }),
      svg("text", { class: "tick middle", x: x.at(tick), y: HEIGHT - EDGE.bottom + 18 }, bytes(tick)),
    ]).flat(),
    y.ticks.map((tick) => [
      svg("line", { class: "grid", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y.at(tick), y2: y.at(tick) }),
      svg("text", { class: "tick end", x: EDGE.left - 8, y: y.at(tick) + 4 }, nats(tick)),
    ]).flat(),
    svg("text", { class: "tick end", x: WIDTH - EDGE.right, y: HEIGHT - 6 }, "bytes of the whole variant"),
    svg("text", { class: "tick middle", transform: `translate(12 ${(HEIGHT - EDGE.bottom) / 2}) rotate(-90)` }, "KL, nats a token"),
    limit.kl && svg("line", { class: "limit", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y.at(limit.kl), y2: y.at(limit.kl) }),
    limit.bytes && svg("line", { class: "limit", x1: x.at(limit.bytes), x2: x.at(limit.bytes), y1: EDGE.top, y2: HEIGHT - EDGE.bottom }),
    svg("path", { class: "front", d: staircase(best, x, y) }),
    drawn.map((point) => mark(point.text, x.at(point.bytes), y.at(point.kl),
      `point c${methods.indexOf(methodOf(point)) % COLOURS} ${best.includes(point) ? "" : "behind"}`, svg("title", {}, `${point.setting}: ${bytes(point.bytes)}, KL ${nats(point.kl)}, same token ${percent(point.agreement)}${point.text ? `, ${point.text} text` : ""}`))),
    chosen && svg("circle", { class: "chosen", cx: x.at(chosen.bytes), cy: y.at(chosen.kl), r: 9 }, svg("title", {}, `chosen: ${chosen.setting}`)));

  return h("figure", {}, plot, h("figcaption", {}, ...methods.map((method, at) => h("span", { class: "legend" }, dot(`point c${at % COLOURS}`), method)),
    h("span", { class: "legend" }, line("front"), "the least KL for its bytes"),
    drawn.some((point) => point.text === "short") && h("span", { class: "legend" }, sample("short"), "on a part of the text"),
    drawn.some((point) => point.text === "held-out") && h("span", { class: "legend" }, sample("held-out"), "on held-out text"),
    (limit.kl || limit.bytes) && h("span", { class: "legend" }, line("limit"), "tolerance"),
    chosen && h("span", { class: "legend" }, dot("chosen"), "chosen")), table(drawn, best));
}

// Small on a part of the text, a square on held-out text: figures of different texts are no one line.
function mark(text, x, y, kind, title) {
  if (text === "held-out") return svg("rect", { class: kind, x: x - 4, y: y - 4, width: 8, height: 8 }, title);
  return svg("circle", { class: kind, cx: x, cy: y, r: text === "short" ? 3 : 4.5 }, title);
}

const methodOf = (point) => String(point.setting).match(/^[\w-]+/)?.[0] ?? "?";
const dot = (kind) => svg("svg", { viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": "true" }, svg("circle", { class: kind, cx: 6, cy: 6, r: 4 }));
const sample = (text) => svg("svg", { viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": "true" }, mark(text, 6, 6, "point any"));
const line = (kind) => svg("svg", { viewBox: "0 0 20 12", width: 20, height: 12, "aria-hidden": "true" }, svg("line", { class: kind, x1: 0, x2: 20, y1: 6, y2: 6 }));

// Those that no other beats in both bytes and KL, by size.
export function paretoFront(points) {
  const front = [];
  for (const point of points.toSorted((a, b) => a.bytes - b.bytes || a.kl - b.kl)) {
    if (!front.length || point.kl < front.at(-1).kl) front.push(point);
  }
  return front;
}

function staircase(front, x, y) {
  return front.map((point, at) => (at === 0
    ? `M${x.at(point.bytes)} ${y.at(point.kl)}` : `H${x.at(point.bytes)}V${y.at(point.kl)}`)).join("");
}

// A logarithmic axis over these values, from pixel `from` to pixel `to`.
function axis(values, from, to) {
  const given = values.filter((value) => value > 0);
  const low = Math.min(...given), high = Math.max(...given);
  const start = Math.log(low) - 0.12, end = Math.log(high) + 0.12;
  const at = (value) => Number((from + ((Math.log(value) - start) / (end - start)) * (to - from)).toFixed(1));
  return { at, low, high, ticks: ticks(Math.exp(start), Math.exp(end)) };
}

// Round numbers inside: 1, 2 and 5 of each decade, fewer where the decades are many.
function ticks(low, high) {
  const decades = Math.log10(high / low);
  const steps = decades > 4 ? [1] : decades > 0.6 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
    found.push(...steps.map((step) => step * 10 ** power).filter((tick) => tick >= low && tick <= high));
  }
  return found;
}

// The same as text, for whom the picture is none.
function table(points, best) {
  const rows = points.toSorted((a, b) => a.bytes - b.bytes).map((point) => h("tr", {},
    h("th", { scope: "row" }, point.setting, point.text && h("span", { class: "quiet" }, ` ${point.text} text`), best.includes(point) && badge("least KL for its bytes", "accent")),
    h("td", { class: "number", "data-label": "Bytes" }, bytes(point.bytes)),
    h("td", { class: "number", "data-label": "KL" }, nats(point.kl)),
    h("td", { class: "number", "data-label": "Same token" }, percent(point.agreement))));
  return h("details", {}, h("summary", {}, `All ${plural(points.length, "point")} as a table`),
    h("div", { class: "scroll" }, h("table", { class: "stacked" },
      h("thead", {}, h("tr", {}, ...["Setting", "Bytes", "KL", "Same token"].map((title, at) => h("th", { scope: "col", class: at > 0 && "number" }, title)))),
      h("tbody", {}, ...rows))));
}
