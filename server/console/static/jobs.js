// All compress jobs, newest first.

import { call } from "./api.js";
import { badge, h, put } from "./dom.js";
import { date } from "./format.js";

const KINDS = { succeeded: "good", failed: "bad", cancelled: "", running: "accent", queued: "" };
const ASK_MS = 2000;

export const isOver = (job) => ["succeeded", "failed", "cancelled"].includes(job.status);
export const statusBadge = (job) => badge(job.status, KINDS[job.status]);

export function toleranceText(tolerance) {
  const names = { max_kl: "KL at most", min_agreement: "same token at least", bytes: "bytes at most" };
  return Object.entries(tolerance ?? {}).filter(([, value]) => value !== null).map(([name, value]) => `${names[name] ?? name} ${value}`).join(", ");
}

export function jobsView() {
  const body = h("tbody");
  const table = h("div", { class: "scroll" }, h("table", { class: "stacked" }, h("caption", { class: "unseen" }, "Compress jobs"),
    h("thead", {}, h("tr", {}, ...["Variant", "Status", "Stage", "Done", "Tolerance", "Created"].map((title) => h("th", { scope: "col" }, title)))), body));
  const empty = h("div", { class: "card empty" });
  let text = null;

  async function load() {
    let jobs = [];
    try {
      jobs = (await call("GET", "v1/jobs")).data;
      put(empty, "There is no job. Upload a whole fine-tuned checkpoint, and the server compresses it in one.");
    } catch (error) {
      put(empty, error.code === "unknown_url" ? "This server does not take whole checkpoints; compress them with deltaserve compress." : error.message);
    }
    table.hidden = jobs.length === 0;
    empty.hidden = jobs.length > 0;
    if (JSON.stringify(jobs) === text) return;
    text = JSON.stringify(jobs);
    const focused = document.activeElement?.getAttribute("href");
    body.replaceChildren(...jobs.toSorted((a, b) => b.created_at - a.created_at).map(row));
    if (focused) body.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  }

  load();
  const timer = setInterval(() => { if (!document.hidden) load(); }, ASK_MS);
  return {
    title: "Jobs",
    element: h("section", {}, h("div", { class: "head" }, h("h1", {}, "Jobs"), h("a", { class: "button main", href: "#/upload" }, "Upload")),
      h("p", { class: "quiet" }, "Whole checkpoints on their way to becoming small variants."), table, empty),
    update() {},
    close() { clearInterval(timer); },
  };
}

function row(job) {
  return h("tr", {},
    h("th", { scope: "row" }, h("a", { href: `#/jobs/${job.id}` }, job.variant)),
    h("td", { "data-label": "Status" }, statusBadge(job)),
    h("td", { "data-label": "Stage" }, job.error?.message ?? job.stage ?? ""),
    h("td", { "data-label": "Done", class: "number" }, `${Math.round(100 * (job.progress ?? 0))} %`),
    h("td", { "data-label": "Tolerance" }, toleranceText(job.tolerance)),
    h("td", { "data-label": "Created" }, date(job.created_at)));
}
