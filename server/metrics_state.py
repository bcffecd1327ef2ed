"""Prometheus metrics that say what there is at the moment of asking: requests, cache, variants in memory, artifacts."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deltaserve.server.engine.reports import EngineState
from deltaserve.server.metrics_labels import ModelLabels


class StateMetrics(Collector):
    """Asks ``state`` and ``artifacts`` (bytes of each variant's, None if they cannot be had) whenever it is asked."""

    def __init__(
        self, labels: ModelLabels, state: Callable[[], EngineState], artifacts: Callable[[], Mapping[str, int] | None]
    ) -> None:
        self._labels, self._state, self._artifacts = labels, state, artifacts

    def collect(self) -> Iterator[Metric]:
        artifacts = self._artifacts()
        if artifacts is not None:
            self._labels.keep(artifacts)
        now = self._state()
        yield from self._requests(now)
        yield from self._residency(now)
        if artifacts is not None:
            yield self._by_model("deltaserve_artifact_bytes", "Bytes of the current artifact.", artifacts.items())
            yield self._engine("deltaserve_variants", "Variants in the registry.", len(artifacts))

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must ask nobody."""
        return ()

    def _requests(self, now: EngineState) -> Iterator[Metric]:
        yield self._engine("vllm:num_requests_running", "Requests in a batch.", now.running)
        yield self._engine("vllm:num_requests_waiting", "Requests that wait for a batch.", now.waiting)
        yield self._engine("deltaserve_requests_cold", "Requests that wait for their variant's weights.", now.cold)
        yield self._engine("vllm:kv_cache_usage_perc", "Used share of the key-value cache, 0 to 1.", now.cache_used)

    def _residency(self, now: EngineState) -> Iterator[Metric]:
        resident = [(one.variant, one.nbytes) for one in now.residents]
        yield self._engine("deltaserve_bank_slots", "Most variants in memory.", now.bank_slots)
        yield self._engine("deltaserve_bank_slots_used", "Versions in memory.", len(resident))
        yield self._engine("deltaserve_bank_bytes", "Most bytes of variants in memory.", now.bank_bytes)
        yield self._engine("deltaserve_bank_bytes_used", "Bytes of versions in memory.", sum(n for _, n in resident))
        yield self._by_model("deltaserve_variant_resident_bytes", "Bytes of a variant in memory.", resident)
        swapped = [(now.swapped, 1)] if now.swapped else []
        yield self._by_model("deltaserve_variant_swapped", "1 for the variant in the base's weights.", swapped)
        yield CounterMetricFamily("deltaserve_swaps", "Swaps into and out of the base's weights.", now.swaps)
        yield CounterMetricFamily("deltaserve_swap_seconds", "Seconds that swaps took.", now.swap_s)
        failed = int(now.swap_failure is not None)
        yield self._engine("deltaserve_swap_failed", "1 if a swap failed, and none is done any more.", failed)

    def _engine(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._labels.base,), value)
        return family

    def _by_model(self, name: str, text: str, values: Iterable[tuple[str, int]]) -> Metric:
        total: Counter[str] = Counter()
        for variant, value in values:
            total[self._labels.of(variant)] += value
        family = GaugeMetricFamily(name, text, labels=("model_name",))
        for label, value in total.items():
            family.add_metric((label,), value)
        return family
