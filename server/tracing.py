"""OpenTelemetry traces, where a collector is set: a span a request, and one within for the model's work.

This module is imported only then; without it a server does not even load OpenTelemetry. The SDK reads its own
``OTEL_*`` variables (service name, sampling, headers of the exporter).
"""

import time
from typing import TYPE_CHECKING, Any

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.version import installed_version

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.trace import Status, StatusCode
except ImportError as error:
    raise OptionError(f"Traces need OpenTelemetry ({error}): pip install 'deltaserve[otel]'") from error

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from deltaserve.server.access.visits import Visit

UNTRACED = "health,ready,metrics"


def exporter(endpoint: str) -> SpanExporter:
    """Sends spans to a collector's ``/v1/traces``."""
    path = "/v1/traces"
    return OTLPSpanExporter(endpoint.rstrip("/").removesuffix(path) + path)


class Tracing:
    """Where spans go. ``close`` sends what is left."""

    def __init__(self, endpoint: str) -> None:
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "deltaserve"}))
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter(endpoint)))
        self._tracer = self._provider.get_tracer("deltaserve", installed_version())

    def middleware(self, app: "ASGIApp") -> "ASGIApp":
        """A span for each request, continuing its ``traceparent``."""
        traced: Any = OpenTelemetryMiddleware(
            app, tracer_provider=self._provider, exclude_spans=["receive", "send"], excluded_urls=UNTRACED
        )
        return traced

    def record(self, visit: "Visit", failure: BaseException | None) -> None:
        """The span of a visit that has ended, in that of its request."""
        since_epoch_s = time.time() - time.perf_counter()

        def at(moment_s: float) -> int:
            return int(1e9 * (since_epoch_s + moment_s))

        span = self._tracer.start_span("generate", start_time=at(visit.arrived), attributes=_attributes(visit))
        begun = [choice.times[0] for choice in visit.choices if choice.times]
        if begun:
            span.set_attribute("gen_ai.latency.time_to_first_token", min(begun) - visit.arrived)
            span.add_event("first token", timestamp=at(min(begun)))
        if failure is not None:
            span.set_status(Status(StatusCode.ERROR, f"{type(failure).__name__}: {failure}"))
        elif any(choice.outcome == "error" for choice in visit.choices):
            span.set_status(Status(StatusCode.ERROR, "Generation failed after the answer had begun"))
        span.end(at(visit.ended))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _attributes(visit: "Visit") -> dict[str, Any]:
    """The names of OpenTelemetry's conventions for generative AI, and vLLM's for latencies."""
    attributes: dict[str, Any] = {
        "gen_ai.request.model": visit.model,
        "gen_ai.request.id": visit.request.state.request_id,
        "gen_ai.usage.input_tokens": visit.prompt_tokens,
        "gen_ai.latency.e2e": visit.ended - visit.arrived,
    }
    if visit.key is not None:
        attributes["deltaserve.key"] = visit.key.id
    if visit.most_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = visit.most_tokens
    if visit.answer is not None:
        attributes["deltaserve.version"] = visit.answer.served.digest
        attributes["gen_ai.usage.output_tokens"] = sum(choice.completion_tokens for choice in visit.choices)
        attributes["gen_ai.response.finish_reasons"] = [choice.outcome for choice in visit.choices]
        queued = [choice.finished.queued_s for choice in visit.choices if choice.finished is not None]
        if known := [seconds for seconds in queued if seconds is not None]:
            attributes["gen_ai.latency.time_in_queue"] = max(known)
    return attributes
