// The server's API: every failure becomes an ApiError whose message can be shown as it is.

const STORED = "deltaserve.key";

export const key = {
  get: () => sessionStorage.getItem(STORED),
  set: (text) => (text ? sessionStorage.setItem(STORED, text) : sessionStorage.removeItem(STORED)),
};

export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

export const at = (name) => `v1/variants/${name.split("/").map(encodeURIComponent).join("/")}`;

const address = (path) => new URL(`../${path}`, document.baseURI).href;
const headers = () => (key.get() ? { authorization: `Bearer ${key.get()}` } : {});
const UNREACHABLE = "The server does not answer. Is it running, and can this machine reach it?";

// The answer of a JSON route; `body` is sent as JSON.
export async function call(method, path, body) {
  return (await open(method, path, body)).json();
}

// The response itself, once its status is good: for streams.
export async function open(method, path, body, signal) {
  const json = body === undefined ? {} : { "content-type": "application/json" };
  let response;
  try {
    response = await fetch(address(path), {
      method, signal, headers: { ...headers(), ...json }, body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(UNREACHABLE);
  }
  if (!response.ok) throw failure(response.status, await response.text(), response.headers.get("retry-after"));
  return response;
}

// Server-sent events of a response, each parsed; an error event is thrown.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines.filter((one) => one.startsWith("data:"))) {
        const text = line.slice(5).trim();
        if (text === "[DONE]") return;
        const event = JSON.parse(text);
        if (event.error && !event.object) throw new ApiError(event.error.message, 0, event.error.code);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection was lost before the end.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Send a file or a form; fetch tells no progress of what it sends, so this is the older way.
export function send(method, path, body, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open(method, address(path));
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => onProgress(event.loaded, event.total));
    request.addEventListener("load", () => {
      if (request.status >= 200 && request.status < 300) resolve(JSON.parse(request.responseText));
      else reject(failure(request.status, request.responseText, request.getResponseHeader("retry-after")));
    });
    request.addEventListener("error", () => reject(new ApiError("The connection was lost before all was sent. Send it again.")));
    request.addEventListener("abort", () => reject(new ApiError("Cancelled; nothing was changed.")));
    signal.addEventListener("abort", () => request.abort());
    request.send(body);
  });
}

function failure(status, text, retryAfter) {
  let error = {};
  try { error = JSON.parse(text).error ?? {}; } catch { /* a proxy's page */ }
  const message = error.message ?? `The server answered ${status}, without saying why.`;
  const wait = status === 429 && retryAfter ? ` Try again in ${retryAfter} s.` : "";
  return new ApiError(message + wait, status, error.code);
}
