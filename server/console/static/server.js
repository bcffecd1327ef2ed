// What the page knows of the server, asked again and again while it is looked at.

import { ApiError, call, key } from "./api.js";
import { Live } from "./live.js";

const FIGURES_MS = 2000;
const VARIANTS_MS = 15000;

export const server = new EventTarget();
Object.assign(server, { figures: null, variants: null, models: null, live: new Live(), outage: null, needsKey: false });

let variantsDue = 0;
let polling = null;
let again = false;

export const isAdmin = () => server.figures?.caller.role === "admin";
export const byName = (name) => server.variants?.find((variant) => variant.id === name);

// Where a variant is now: the list may be some seconds old, what is in memory is not.
export function tierOf(variant) {
  if (server.figures.memory.resident.includes(variant.digest)) return "resident";
  return variant.tier === "resident" ? "host" : variant.tier;
}

export const isPinned = (variant) => server.figures.memory.pinned.includes(variant.id);

// Ask at once, the list of variants too: after something was changed.
export function refresh() {
  variantsDue = 0;
  return poll();
}

async function poll() {
  if (polling) {
    again = true;
    return polling;
  }
  polling = ask();
  await polling;
  polling = null;
  if (again) {
    again = false;
    await poll();
  }
}

async function ask() {
  try {
    const figures = await call("GET", "v1/console");
    server.live.add(figures);
    Object.assign(server, { figures, outage: null, needsKey: false });
    if (Date.now() >= variantsDue) {
      variantsDue = Date.now() + VARIANTS_MS;
      if (isAdmin()) server.variants = (await call("GET", "v1/variants")).data;
      else server.models = (await call("GET", "v1/models")).data.map((model) => model.id);
    }
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) Object.assign(server, { needsKey: true, refusal: key.get() ? error.message : null, figures: null, variants: null });
    else server.outage = error.message;
  }
  server.dispatchEvent(new Event("change"));
}

// Names that may be asked: the base first.
export function askable() {
  if (!isAdmin()) return server.models ?? [];
  const usable = (server.variants ?? []).filter((variant) => variant.base_matches).map((variant) => variant.id);
  return [server.figures.base.id, ...usable];
}

export function start() {
  poll();
  setInterval(() => { if (!document.hidden && !server.needsKey) poll(); }, FIGURES_MS);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
}
