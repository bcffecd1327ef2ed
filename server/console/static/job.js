// One compress job as it goes: stage, progress, every point it tried, and what came out.

import { call, events, open } from "./api.js";
import { confirmed, h, put, toast } from "./dom.js";
import { NONE, bytes, date, gainKept, nats, percent, ratio } from "./format.js";
import { frontier } from "./frontier.js";
import { isOver, statusBadge, toleranceText } from "./jobs.js";
import { refresh, server } from "./server.js";

const AGAIN_MS = 2000;

export function jobView(id) {
  const status = h("span", {});
  const stage = h("p", { role: "status" });
  const bar = h("progress", { max: 1, "aria-label": "Progress" });
  const done = h("span", { class: "quiet" });
  const facts = h("dl", { class: "facts" });
  const problem = h("p", { class: "notice bad", role: "alert", hidden: true });
  const plot = h("div", {});
  const heading = h("h1", {}, "Job");
  const link = h("div", { class: "actions", hidden: true });
  const cancel = h("button", { type: "button", hidden: true, onclick: askCancel }, "Cancel the job");
  const leaving = new AbortController();
  let drawn = null;
  let wasOver = null;

  async function follow() {
    while (!leaving.signal.aborted) {
      try {
        fill(await call("GET", `v1/jobs/${id}`));
        for await (const job of events(await open("GET", `v1/jobs/${id}/events`, undefined, leaving.signal))) fill(job);
        return;
      } catch (error) {
        if (leaving.signal.aborted) return;
        say(error.message);
        if (error.status === 404 || error.status === 403) return;
      }
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
    }
  }

  function say(text) {
    put(problem, text ?? "");
    problem.hidden = !text;
  }

  function fill(job) {
    put(heading, job.variant);
    status.replaceChildren(statusBadge(job));
    put(stage, job.status === "succeeded" ? `Registered as version ${job.result.version}` : job.stage || job.status);
    bar.value = job.progress ?? 0;
    put(done, `${Math.round(100 * (job.progress ?? 0))} %`);
    cancel.hidden = isOver(job);
    say(job.error?.message);
    link.hidden = job.status !== "succeeded";
    link.replaceChildren(h("a", { class: "button main", href: `#/variants/${job.variant}` }, "Show the variant"),
      h("a", { class: "button", href: `#/playground?models=${encodeURIComponent(`${server.figures.base.id},${job.variant}`)}` }, "Ask it"));
    const rows = described(job);
    facts.replaceChildren(...rows.map(([title, value]) => h("div", {}, h("dt", {}, title), h("dd", {}, value))));
    const points = job.points ?? [];
    const now = `${points.length} ${job.status}`;
    if (now !== drawn) {
      drawn = now;
      const isOpen = plot.querySelector("details")?.open;
      plot.replaceChildren(frontier(points, limits(job), job.result?.size_bytes));
      if (isOpen) plot.querySelector("details").open = true;
    }
    if (isOver(job) && wasOver === false) refresh();
    wasOver = isOver(job);
  }

  async function askCancel() {
    if (!await confirmed("Cancel this job?", "Nothing is registered, and the variant stays as it is. What was uploaded is kept.", "Cancel the job", true)) return;
    try {
      fill(await call("POST", `v1/jobs/${id}/cancel`));
    } catch (error) {
      toast(error.message, true);
    }
  }

  follow();
  return {
    title: "Job",
    element: h("section", {}, h("p", { class: "crumbs" }, h("a", { href: "#/jobs" }, "Jobs")), h("div", { class: "head start" }, heading, status),
      problem, h("div", { class: "card" }, stage, h("div", { class: "bar-line" }, bar, done), h("div", { class: "actions" }, cancel, link)),
      h("h2", {}, "Frontier"), plot, h("h2", {}, "Result"), facts),
    update() {},
    close() { leaving.abort(); },
  };
}

// A tolerance in nats or bytes has a line in the plot; a share of the base's KL has one once the report names that.
function limits(job) {
  const { max_kl: kl, bytes: size } = job.tolerance ?? {};
  const share = typeof kl === "string" && kl.endsWith("%") ? parseFloat(kl) / 100 : null;
  const base = job.quality?.kl_base;
  return { kl: share === null ? Number(kl) || null : base ? share * base : null, bytes: size ?? null };
}

function described(job) {
  const quality = job.quality, result = job.result;
  return [
    ["Tolerance", toleranceText(job.tolerance)],
    ["Created", date(job.created_at)],
    ["Finished", job.finished_at ? date(job.finished_at) : null],
    ["Size", result ? `${bytes(result.size_bytes)}, ${ratio(server.figures.base.bytes / result.size_bytes)} smaller than 16 bits` : null],
    ["KL to the full fine-tune", quality ? nats(quality.kl_mean) : null],
    ["Same token first", quality ? percent(quality.top1_agreement) : null],
    ["Gain kept", quality ? percent(gainKept(quality)) : null],
    ["Plain DARE at these bytes", quality?.dare ? `KL ${nats(quality.dare.kl_mean)} in ${bytes(quality.dare.bytes)}` : null],
  ].filter(([, value]) => value && value !== NONE);
}
