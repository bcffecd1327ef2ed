// Rates and latencies of the last minute, from counters that only grow.

const WINDOW_S = 60;
const SHARED = "other"; // of models that have no counters of their own
const QUIET = { inFlight: 0, requestsPerMinute: 0, tokensPerSecond: 0, firstToken: null, request: null };

export class Live {
  #samples = [];

  // Take what `GET v1/console` said; a server that restarted begins anew.
  add(figures) {
    const last = this.#samples.at(-1);
    if (last && (last.clock > figures.clock_s || fell(last.counts, figures.counts))) this.#samples = [];
    this.#samples.push({ clock: figures.clock_s, counts: figures.counts, isCounted: figures.base.kind === "decoder" });
    while (this.#samples.length > 2 && this.#samples[1].clock < figures.clock_s - WINDOW_S) this.#samples.shift();
  }

  // Null where there is nothing to tell: yet, or of an encoder, whose requests have no such counters. Times are means in seconds.
  of(model) {
    const first = this.#samples[0], last = this.#samples.at(-1);
    const now = last?.counts[model];
    if (!last || last.clock === first.clock || !last.isCounted) return null;
    if (!now) return SHARED in last.counts ? null : { ...QUIET };
    const before = first.counts[model] ?? {};
    const grown = (name) => now[name] - (before[name] ?? 0);
    const elapsed = last.clock - first.clock;
    return {
      inFlight: now.in_flight,
      requestsPerMinute: (60 * grown("requests")) / elapsed,
      tokensPerSecond: grown("tokens") / elapsed,
      firstToken: grown("first_tokens") > 0 ? grown("first_token_s") / grown("first_tokens") : null,
      request: grown("requests") > 0 ? grown("request_s") / grown("requests") : null,
    };
  }

  // All models together.
  total() {
    const rates = Object.keys(this.#samples.at(-1)?.counts ?? {}).map((model) => this.of(model)).filter(Boolean);
    if (!rates.length) return null;
    const sum = (name) => rates.reduce((total, one) => total + one[name], 0);
    return { requestsPerMinute: sum("requestsPerMinute"), tokensPerSecond: sum("tokensPerSecond") };
  }
}

const fell = (before, now) => Object.keys(before).some((model) => now[model] && now[model].requests < before[model].requests);
