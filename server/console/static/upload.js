// Upload: files in, a new version of a variant out, or the job that will make one.

import { field, h, put, toast } from "./dom.js";
import { bytes, plural, ratio, seconds } from "./format.js";
import { recognise } from "./recognise.js";
import { sendAdapter, sendArtifact, sendCheckpoint } from "./sending.js";
import { byName, refresh, server } from "./server.js";

const KINDS = {
  artifact: "An artifact, as deltaserve compress makes it: registered as it is.",
  adapter: "A LoRA adapter: becomes an artifact on arrival.",
  checkpoint: "A whole fine-tuned checkpoint: the server compresses it in a job, within the tolerance below.",
};
const TOLERANCES = {
  max_kl: ["KL to the full fine-tune, at most", "2%", "Nats a token, or a share of the bare base’s KL such as 2%."],
  min_agreement: ["Same token first, at least", "0.97", "A share of the tokens, from 0 to 1."],
  bytes: ["Bytes, at most", "1000000", "The whole variant."],
};
const NAME = "[A-Za-z0-9][A-Za-z0-9._\\-]*(/[A-Za-z0-9][A-Za-z0-9._\\-]*)*";

let underWay = null; // the view that sends something now: one may look elsewhere meanwhile and come back to it

addEventListener("beforeunload", (event) => { if (underWay) event.preventDefault(); });

export const uploadView = (query) => underWay ?? newView(query);

function newView(query) {
  const name = h("input", { required: true, maxlength: 128, pattern: NAME, autocomplete: "off", spellcheck: "false", oninput: tellVersion,
    title: "Letters, digits, '.', '_', '-' and '/'", value: query.get("name") ?? "" });
  const versionNote = h("p", { class: "quiet", role: "status" });
  const files = h("input", { type: "file", multiple: true, onchange: () => { choosing = choose(files.files); } });
  const folder = h("input", { type: "file", webkitdirectory: true, onchange: () => { choosing = choose(folder.files); } });
  const drop = h("div", { class: "drop", ondragover: over, ondragleave: leave, ondrop: dropped },
    field("Files", files, "An artifact, the two files of a LoRA adapter, or the files of a checkpoint. They can be dropped here."),
    field("Or a folder", folder));
  const recognised = h("p", { role: "status" });
  const kind = h("select", { onchange: () => offer(kind.value) }, ...Object.entries(TOLERANCES).map(([value, [text]]) => h("option", { value }, text)));
  const amount = h("input", { required: true, autocomplete: "off" });
  const amountField = field("Limit", amount, " ");
  const force = h("input", { type: "checkbox" });
  const tolerance = h("fieldset", { hidden: true, disabled: true }, h("legend", {}, "Tolerance"), h("div", { class: "fields" }, field("Kind", kind), amountField),
    h("label", { class: "check" }, force, "Where nothing is within it, take the nearest"));
  const go = h("button", { class: "main" }, "Upload");
  const cancel = h("button", { type: "button", hidden: true, onclick: () => stopping.abort() }, "Cancel");
  const bar = h("progress", { "aria-label": "Sent" });
  const told = h("p", { class: "quiet", role: "status" });
  const progress = h("div", { hidden: true }, h("div", { class: "bar-line" }, bar), told);
  const problem = h("p", { class: "notice bad", role: "alert", hidden: true });
  const result = h("div", { role: "status" });
  let chosen = null;
  let choosing = null; // while the files are being looked into
  let stopping = null;

  function offer(value) {
    amount.value = TOLERANCES[value][1];
    put(amountField.querySelector("small"), TOLERANCES[value][2]);
  }

  function over(event) { event.preventDefault(); drop.classList.add("over"); }
  function leave() { drop.classList.remove("over"); }
  function dropped(event) {
    event.preventDefault();
    leave();
    choosing = choose(event.dataTransfer.files);
  }

  async function choose(list) {
    chosen = null;
    say(null);
    result.replaceChildren();
    try {
      if (list.length) chosen = await recognise(list);
      const size = chosen?.files.reduce((sum, file) => sum + file.size, 0);
      const left = chosen?.left.length ? ` Not sent: ${chosen.left.join(", ")}.` : "";
      put(recognised, chosen ? `${KINDS[chosen.kind]} ${plural(chosen.files.length, "file")}, ${bytes(size)}.${left}` : "");
    } catch (error) {
      put(recognised, "");
      say(error.message);
    }
    tolerance.hidden = tolerance.disabled = chosen?.kind !== "checkpoint";
  }

  function tellVersion() {
    const there = byName(name.value.trim());
    put(versionNote, there ? `${there.id} is there; this becomes its newest version, and requests get it at once.` : "");
  }

  function say(text) {
    put(problem, text ?? "");
    problem.hidden = !text;
  }

  function isLimit() {
    return kind.value === "max_kl" ? /^\d*\.?\d+%?$/.test(amount.value.trim()) : Number(amount.value) > 0;
  }

  function wanted() {
    const text = amount.value.trim();
    return { [kind.value]: kind.value === "max_kl" && text.endsWith("%") ? text : Number(text), force: force.checked };
  }

  async function submit(event) {
    event.preventDefault();
    await choosing;
    if (stopping) return;
    if (!chosen) return say(problem.textContent || "Choose the files first.");
    const size = chosen.files.reduce((sum, file) => sum + file.size, 0);
    const most = server.figures.max_upload_bytes;
    if (chosen.kind !== "checkpoint" && size > most) return say(`These are ${bytes(size)}; the server takes at most ${bytes(most)} (DELTASERVE_MAX_UPLOAD_BYTES).`);
    if (chosen.kind === "checkpoint" && !isLimit()) return say(`“${amount.value}” is no limit; write it like ${TOLERANCES[kind.value][1]}.`);
    say(null);
    result.replaceChildren();
    stopping = new AbortController();
    underWay = view;
    busy(true);
    const started = performance.now();
    const onProgress = (sent) => {
      bar.value = Math.min(1, sent / size);
      const elapsed = (performance.now() - started) / 1000;
      put(told, sent >= size ? "All is sent; the server checks it …" : `${bytes(sent)} of ${bytes(size)}, ${seconds((elapsed * (size - sent)) / sent)} to go`);
    };
    try {
      await { artifact: register, adapter: register, checkpoint: begin }[chosen.kind](name.value.trim(), onProgress);
    } catch (error) {
      say(error.message);
      if (!view.element.isConnected) toast(`${name.value}: ${error.message}`, true);
    }
    stopping = underWay = null;
    busy(false);
    await refresh();
  }

  async function register(variant, onProgress) {
    const sending = chosen.kind === "artifact" ? sendArtifact : sendAdapter;
    const receipt = await sending(variant, chosen.files, onProgress, stopping.signal);
    if (!view.element.isConnected) toast(`${receipt.id}, version ${receipt.version}, is there.`);
    result.replaceChildren(h("div", { class: "card good" },
      h("h2", {}, `${receipt.id}, version ${receipt.version}, is there`),
      h("p", {}, `${bytes(receipt.size_bytes)}, ${ratio(server.figures.base.bytes / receipt.size_bytes)} smaller than 16 bits; ${receipt.tensors_applied} of ${receipt.tensors_total} tensors apply.`),
      h("p", { class: "actions" }, h("a", { class: "button main", href: `#/variants/${receipt.id}` }, "Show it"),
        h("a", { class: "button", href: `#/playground?models=${encodeURIComponent(`${server.figures.base.id},${receipt.id}`)}` }, "Ask it"))));
  }

  async function begin(variant, onProgress) {
    const job = await sendCheckpoint(variant, chosen.files, wanted(), onProgress, stopping.signal);
    if (view.element.isConnected) location.hash = `#/jobs/${job.id}`;
    else toast(`${variant} is sent; its job has begun.`);
  }

  function busy(isBusy) {
    for (const control of [name, files, folder, go]) control.disabled = isBusy;
    tolerance.disabled = isBusy || chosen?.kind !== "checkpoint";
    cancel.hidden = progress.hidden = !isBusy;
    bar.value = 0;
    put(told, "Reading the files …");
    if (isBusy) cancel.focus();
  }

  offer("max_kl");
  const view = {
    title: "Upload",
    element: h("section", {},
      h("h1", {}, "Upload a variant"),
      h("form", { class: "card form", onsubmit: submit }, field("Name", name, "What requests say as their model."), versionNote, drop, recognised, tolerance,
        problem, progress, h("div", { class: "actions" }, go, cancel)),
      result),
    update: tellVersion,
    close() {},
  };
  return view;
}
