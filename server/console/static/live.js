// Rates and latencies of the last minute, from counters that only grow.

const WINDOW_S = 60;
const SHARED = "other"; // of models that have no counters of their own
const QUIET = { requestsPerMinute: 0, tokensPerSecond: 0, latency: null };

export class Live {
  #samples = [];

  // Take what `GET v1/console` said; a server that restarted begins anew.
  add(figures) {
    const last = this.#samples.at(-1);
    if (last && (last.clock > figures.clock_s || fell(last.counts, figures.counts))) this.#samples = [];
    this.#samples.push({ clock: figures.clock_s, counts: figures.counts, isEncoder: figures.base.kind === "encoder" });
    while (this.#samples.length > 2 && this.#samples[1].clock < figures.clock_s - WINDOW_S) this.#samples.shift();
  }

  // Null where there is nothing to tell yet. Tokens are those generated, of an encoder those read; the latency is the mean time
  // to the first token, of an encoder to the answer, in seconds.
  of(model) {
    const first = this.#samples[0], last = this.#samples.at(-1);
    const now = last?.counts[model];
    if (!last || last.clock === first.clock) return null;
    if (!now) return SHARED in last.counts ? null : { ...QUIET };
    const before = first.counts[model] ?? {};
    const grown = (name) => now[name] - (before[name] ?? 0);
    const mean = (sum, count) => (grown(count) > 0 ? grown(sum) / grown(count) : null);
    const elapsed = last.clock - first.clock;
    return {
      requestsPerMinute: (60 * grown("requests")) / elapsed,
      tokensPerSecond: grown(last.isEncoder ? "prompt_tokens" : "tokens") / elapsed,
      latency: last.isEncoder ? mean("request_s", "requests") : mean("first_token_s", "first_tokens"),
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
