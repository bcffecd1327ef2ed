"""Prometheus metrics: counted as things happen, under vLLM's names where they mean the same.

vLLM's own dashboards and routers read these; what vLLM does not have begins with ``deltaserve_``. Metrics of the whole
engine carry the base's name as ``model_name``, all others that of the model that was asked (see metrics_labels.py).
What there is at one moment is in metrics_state.py.
"""

from collections.abc import Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from deltaserve.server.engine.reports import Reports
from deltaserve.server.metrics_labels import ModelLabels

M = TypeVar("M", bound=MetricWrapperBase)

FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
NEXT_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LOAD = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics(Reports):
    """One server's metrics in a registry of their own."""

    def __init__(self, base: str, variants: int) -> None:
        self.registry = CollectorRegistry()
        self.labels = ModelLabels(base, variants, self._forget)
        self._by_model: list[MetricWrapperBase] = []
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

        self.http = Counter("http_requests", "HTTP requests.", ("method", "handler", "status"), registry=self.registry)
        self.http_seconds = Histogram(
            "http_request_duration_seconds",
            "Seconds until an HTTP answer was sent whole.",
            ("method", "handler"),
            buckets=FIRST_TOKEN,
            registry=self.registry,
        )
        self.refused = Counter(
            "deltaserve_errors", "Answers that were an error, by OpenAI's code.", ("code",), registry=self.registry
        )

        self.ended = self._counter("vllm:request_success", "Ended choices, by how they ended.", "finished_reason")
        self.in_flight = self._gauge("deltaserve_requests_in_flight", "Generating requests that were let in.")
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "Seconds from a request to its first token.", FIRST_TOKEN
        )
        self.next_token = self._histogram(
            "vllm:inter_token_latency_seconds", "Seconds between two tokens of a choice.", NEXT_TOKEN
        )
        self.next_token_older = self._histogram(
            "vllm:time_per_output_token_seconds", "The same under its older name.", NEXT_TOKEN
        )
        self.mean_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean seconds between tokens of a choice.", NEXT_TOKEN
        )
        self.whole = self._histogram("vllm:e2e_request_latency_seconds", "Seconds from a request to its end.", WHOLE)
        self.queue = self._histogram("vllm:request_queue_time_seconds", "Seconds before a choice's first step.", WHOLE)
        self.inference = self._histogram(
            "vllm:request_inference_time_seconds", "Seconds from a choice's first step to its end.", WHOLE
        )
        self.prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "Seconds from a choice's first step to its first token.", WHOLE
        )
        self.decode = self._histogram(
            "vllm:request_decode_time_seconds", "Seconds from a choice's first token to its last.", WHOLE
        )
        self.request_prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self.request_generation = self._histogram(
            "vllm:request_generation_tokens", "Tokens of a request's answer.", TOKENS
        )
        self.request_longest = self._histogram(
            "vllm:request_max_num_generation_tokens", "Tokens of a request's longest choice.", TOKENS
        )
        self.params_n = self._histogram("vllm:request_params_n", "Choices asked for.", (1, 2, 5, 10, 20))
        self.params_max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "Most tokens of a choice, where a request said.", TOKENS
        )

        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that entered a batch.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Generated tokens.")
        self.prefix_queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self.prefix_hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the cache.")
        self.preemptions = self._counter("vllm:num_preemptions", "Requests that left a batch for lack of cache.")
        self.step_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens of a model step.", STEP_TOKENS)

        self.loads = self._histogram("deltaserve_variant_load_seconds", "Seconds to read and decode a variant.", LOAD)
        self.load_failures = self._counter("deltaserve_variant_load_failures", "Variants that could not be loaded.")
        self.evictions = self._counter("deltaserve_variant_evictions", "Variants that left the memory.")
        self.cold_waits = self._histogram(
            "deltaserve_cold_wait_seconds", "Seconds that a request waited for its variant's weights.", LOAD
        )

    def began(self, variant: str, prompt_tokens: int, cached_tokens: int) -> None:
        label = self.labels.of(variant)
        self.prompt_tokens.labels(label).inc(prompt_tokens)
        self.prefix_queries.labels(label).inc(prompt_tokens)
        self.prefix_hits.labels(label).inc(cached_tokens)

    def stepped(self, tokens: int) -> None:
        self.step_tokens.labels(self.labels.base).observe(tokens)

    def generated(self, variant: str, tokens: int) -> None:
        self.generation_tokens.labels(self.labels.of(variant)).inc(tokens)

    def displaced(self, requests: int) -> None:
        self.preemptions.labels(self.labels.base).inc(requests)

    def waited(self, variant: str, seconds: float) -> None:
        self.cold_waits.labels(self.labels.of(variant)).observe(seconds)

    def loaded(self, variant: str, seconds: float) -> None:
        self.loads.labels(self.labels.of(variant)).observe(seconds)

    def load_failed(self, variant: str) -> None:
        self.load_failures.labels(self.labels.of(variant)).inc()

    def evicted(self, variant: str) -> None:
        self.evictions.labels(self.labels.of(variant)).inc()

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        return self._kept(Counter(name, text, ("model_name", *more), registry=self.registry))

    def _gauge(self, name: str, text: str) -> Gauge:
        return self._kept(Gauge(name, text, ("model_name",), registry=self.registry))

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return self._kept(Histogram(name, text, ("model_name",), buckets=buckets, registry=self.registry))

    def _kept(self, metric: M) -> M:
        self._by_model.append(metric)
        return metric

    def _forget(self, label: str) -> None:
        for metric in self._by_model:
            metric.remove_by_labels({"model_name": label})
