// Numbers as people read them; "–" is what is not known.

export const NONE = "–";

const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

export function bytes(count) {
  if (!known(count)) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 999.5 && unit < units.length - 1) { count /= 1000; unit += 1; }
  return `${unit === 0 ? count : Number(count.toPrecision(3))} ${units[unit]}`;
}

export function count(value) {
  if (!known(value)) return NONE;
  if (value < 10000) return String(Math.round(value));
  return new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value);
}

export const ratio = (value) => (known(value) ? `${value >= 10 ? Math.round(value) : value.toFixed(1)}×` : NONE);
export const percent = (value) => (known(value) ? `${(100 * value).toFixed(1)} %` : NONE);
export const nats = (value) => (known(value) ? Number(value.toPrecision(3)).toString() : NONE);
export const rate = (value) => (known(value) ? (value === 0 ? "0" : value.toFixed(value < 10 ? 1 : 0)) : NONE);

export function seconds(value) {
  if (!known(value)) return NONE;
  if (value < 1) return `${Math.round(1000 * value)} ms`;
  return value < 100 ? `${value.toFixed(1)} s` : `${Math.round(value / 60)} min`;
}

export function date(unix) {
  if (!known(unix)) return NONE;
  return new Date(1000 * unix).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

export const short = (digest) => (digest ? digest.slice(0, 12) : NONE);
export const plural = (n, noun) => `${new Intl.NumberFormat("en").format(n)} ${noun}${n === 1 ? "" : "s"}`;

// What a quality report says beside what it has: the share of fine-tuning's gain that is kept.
export function gainKept(quality) {
  if (!quality) return null;
  if (quality.gain_kept !== undefined) return quality.gain_kept; // null: nothing was gained, or on that text it says nothing
  const gained = quality.loss_base - quality.loss_fine_tuned;
  return known(gained) && gained > 0 ? (quality.loss_base - quality.loss_artifact) / gained : null;
}
