// How each kind of upload goes over the wire, with the bytes that are on their way told to `onProgress(sent)`.

import { ApiError, at, call, send } from "./api.js";
import { digestOf } from "./recognise.js";

const PART_BYTES = 32 * 2 ** 20;
const TRIES = 3;

// The receipt of the new version.
export async function sendArtifact(name, [file], onProgress, signal) {
  const digest = await digestOf(file);
  return send("PUT", at(name) + (digest ? `?digest=${digest}` : ""), file, onProgress, signal);
}

export function sendAdapter(name, files, onProgress, signal) {
  const form = new FormData();
  form.append("name", name);
  for (const file of files) form.append("adapter", file, file.name);
  return send("POST", "v1/variants", form, onProgress, signal);
}

// The job that compresses the checkpoint.
export async function sendCheckpoint(name, files, tolerance, onProgress, signal) {
  const ids = [];
  let before = 0;
  for (const file of files) {
    ids.push(await sendFile(file, (sent) => onProgress(before + Math.min(sent, file.size)), signal));
    before += file.size;
  }
  return call("POST", "v1/variants", { name, file_ids: ids, ...tolerance });
}

// A file that the server has already is not sent again; a large one goes in parts, of which a lost one is repeated.
async function sendFile(file, onProgress, signal) {
  const digest = await digestOf(file);
  const there = digest ? (await call("GET", `v1/files?sha256=${digest}`)).data : [];
  if (there.length) return there[0].id;
  if (file.size <= PART_BYTES) {
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", file, file.name);
    return (await send("POST", "v1/files", form, onProgress, signal)).id;
  }
  const upload = await call("POST", "v1/uploads", { filename: file.name, bytes: file.size, mime_type: "application/octet-stream", purpose: "fine-tune" });
  try {
    const parts = [];
    for (let start = 0; start < file.size; start += PART_BYTES) {
      parts.push(await sendPart(upload.id, file.slice(start, start + PART_BYTES), (sent) => onProgress(start + sent), signal));
    }
    return (await call("POST", `v1/uploads/${upload.id}/complete`, { part_ids: parts })).file.id;
  } catch (error) {
    call("POST", `v1/uploads/${upload.id}/cancel`).catch(() => {});
    throw error;
  }
}

async function sendPart(upload, piece, onProgress, signal) {
  const form = new FormData();
  form.append("data", piece, "part");
  for (let tries = 1; ; tries += 1) {
    try {
      return (await send("POST", `v1/uploads/${upload}/parts`, form, onProgress, signal)).id;
    } catch (error) {
      const isWorthAnother = error instanceof ApiError && (error.status === 0 || error.status >= 500) && !signal.aborted;
      if (!isWorthAnother || tries === TRIES) throw error;
    }
  }
}
