// What the chosen files are: an artifact, a LoRA adapter, or a whole checkpoint.

const ADAPTER = ["adapter_config.json", "adapter_model.safetensors"];
const BESIDE = /^[^.].*\.jsonl$|^(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json$|^(model\.safetensors\.index\.json|chat_template\.jinja|tokenizer\.model|merges\.txt|vocab\.txt)$/;
const MOST_HEADER = 64 * 2 ** 20;

// {kind, files, left: names that are not sent}; throws an Error that says what is missing.
export async function recognise(chosen) {
  const files = [...chosen].filter((file) => !file.name.startsWith("."));
  const tensors = files.filter((file) => file.name.endsWith(".safetensors"));
  const byName = new Map(files.map((file) => [file.name, file]));
  if (ADAPTER.some((name) => byName.has(name))) {
    const missing = ADAPTER.filter((name) => !byName.has(name));
    if (missing.length) throw new Error(`A LoRA adapter has two files; ${missing.join()} is missing. Choose both.`);
    return found("adapter", ADAPTER.map((name) => byName.get(name)), files);
  }
  if (!tensors.length) {
    const pickle = files.find((file) => /\.(bin|pt|pth|ckpt|pkl)$/.test(file.name));
    throw new Error(pickle ? `${pickle.name} is a pickle, which could run code; save the model as safetensors.`
      : "There is no .safetensors file among these.");
  }
  if (tensors.length === 1 && await isArtifact(tensors[0])) return found("artifact", tensors, files);
  return found("checkpoint", files.filter((file) => tensors.includes(file) || BESIDE.test(file.name)), files);
}

const found = (kind, files, all) => ({ kind, files, left: all.filter((file) => !files.includes(file)).map((file) => file.name) });

// A safetensors file begins with the length of its header and the header, in JSON.
async function isArtifact(file) {
  try {
    const length = Number(new DataView(await file.slice(0, 8).arrayBuffer()).getBigUint64(0, true));
    if (length > Math.min(MOST_HEADER, file.size)) return false;
    return "deltaserve" in (JSON.parse(await file.slice(8, 8 + length).text()).__metadata__ ?? {});
  } catch {
    return false;
  }
}

// SHA-256 in hex, with which the server checks what arrived; null where the browser gives none or the file is large.
export async function digestOf(file) {
  if (!globalThis.crypto?.subtle || file.size > 256 * 2 ** 20) return null;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer()));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
