// What is known of a variant beside its versions: a few figures, and its quality report.

import { h } from "./dom.js";
import { bytes, gainKept, nats, percent, rate, ratio, seconds } from "./format.js";
import { server } from "./server.js";

// Rebuild a list only if what it says has changed.
export function fillList(list, rows, made) {
  const text = JSON.stringify(rows);
  if (list.dataset.text === text) return;
  list.dataset.text = text;
  list.replaceChildren(...rows.map((row) => made(...row)));
}

export function cards(variant) {
  const quality = variant.quality, live = server.live.of(variant.id);
  return [
    ["Size", bytes(variant.size_bytes), `${ratio(server.figures.base.bytes / variant.size_bytes)} smaller than 16 bits`],
    ["KL to the full fine-tune", nats(quality?.kl_mean), quality?.kl_base ? `the bare base: ${nats(quality.kl_base)}` : `nats a token, ${quality?.text ?? "held-out text"}`],
    ["Same token first", percent(quality?.top1_agreement), quality?.top1_agreement_base ? `the bare base: ${percent(quality.top1_agreement_base)}` : "as the full fine-tune"],
    ["Requests a minute", rate(live?.requestsPerMinute), `${rate(live?.tokensPerSecond)} tokens/s, ${server.figures.base.kind === "encoder" ? "answered" : "first"} after ${seconds(live?.latency)}`],
  ];
}

export function report(variant) {
  const q = variant.quality;
  if (!q) return [["Not measured", "The artifact has no report; deltaserve compress writes one for language models, with --evaluate FILE for all."]];
  const tolerance = q.tolerance && Object.entries(q.tolerance).map(([name, value]) => `${name.replaceAll("_", " ")}: ${typeof value === "number" ? nats(value) : value}`).join(", ");
  const rows = [
    ["Gain kept", percent(gainKept(q))],
    ["Loss of the base", nats(q.loss_base)],
    ["Loss of the full fine-tune", nats(q.loss_fine_tuned)],
    ["Loss of this artifact", nats(q.loss_artifact)],
    ["KL, 99th percentile", nats(q.kl_p99)],
    ["Tokens measured", q.tokens ? `${q.tokens}${q.text ? ` of ${q.text}` : ""}` : null],
    ["Plain DARE at these bytes", q.dare ? `KL ${nats(q.dare.kl_mean)} in ${bytes(q.dare.bytes)}` : null],
    ["Score of the task", q.score_artifact !== undefined ? `${percent(q.score_artifact)}; full fine-tune ${percent(q.score_fine_tuned)}, base ${percent(q.score_base)}` : null],
    ["Tolerance", tolerance],
    ["Tensors that apply", `${variant.tensors_applied} of ${variant.tensors_total}`],
  ];
  return rows.filter(([, value]) => value && value !== "–");
}
