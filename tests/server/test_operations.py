"""Metrics, request ids, health, traces and an orderly end, over real HTTP."""

import json
import logging
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvicorn
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import ScriptedEngine
from scripted_service import Service, serving

from deltaserve.server import draining, tracing

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "deltaserve.json"
ASK = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}


def scraped(http) -> dict[str, list]:
    """The samples of /metrics, by name."""
    samples: dict[str, list] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return samples


def value(samples, name, **labels):
    return sum(s.value for s in samples.get(name, []) if labels.items() <= s.labels.items())


def test_metrics_of_a_real_server_and_every_name_on_the_dashboard(server):
    body = {**ASK, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200
    samples = scraped(server.http)
    assert value(samples, "vllm:request_success_total", model_name="base", finished_reason="length") == 1
    assert value(samples, "vllm:generation_tokens_total", model_name="base") >= 5
    assert value(samples, "vllm:time_to_first_token_seconds_count", model_name="base") == 1
    assert value(samples, "vllm:inter_token_latency_seconds_count", model_name="base") == 4
    assert value(samples, "vllm:request_queue_time_seconds_count", model_name="base") == 1
    assert value(samples, "vllm:num_requests_running") == 0
    assert value(samples, "http_requests_total", handler="/v1/chat/completions", status="200") == 1
    known = set(re.findall(r"^# TYPE (\S+)", server.http.get("/metrics").text, re.M))
    asked = set(
        re.findall(r"\b(?:vllm:|deltaserve_|http_)\w+", json.dumps(json.loads(DASHBOARD.read_text())["panels"]))
    )
    assert {name for name in asked if name.removesuffix("_bucket").removesuffix("_count") not in known} == set()


def test_labels_of_variants_are_bounded_and_come_back(tmp_path):
    with serving(tmp_path, ScriptedEngine(), metrics_variants=2) as service, service.http() as http:
        service.say("ok")
        for name in "abcd":
            service.register(name)
            assert http.post("/v1/chat/completions", json=ASK | {"model": name}).status_code == 200
        samples = scraped(http)
        ended = {s.labels["model_name"]: s.value for s in samples["vllm:request_success_total"]}
        assert ended == {"a": 1, "b": 1, "other": 2}
        http.delete("/v1/variants/a")
        scraped(http)
        http.post("/v1/chat/completions", json=ASK | {"model": "c"})
        assert value(scraped(http), "vllm:request_success_total", model_name="c") == 1
        assert http.get("/v1/variants/nobody").status_code == 404
        assert value(scraped(http), "deltaserve_errors_total", code="model_not_found") == 1


def test_a_request_id_comes_back_and_stands_in_the_log(tmp_path, caplog):
    with serving(tmp_path, ScriptedEngine()) as service, service.http() as http, caplog.at_level(logging.INFO):
        service.say("ok")
        answer = http.post("/v1/chat/completions", json=ASK, headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        for bad in ("with blank", "x" * 200):
            assert re.fullmatch(r"[0-9a-f]{32}", http.get("/no", headers={"x-request-id": bad}).headers["x-request-id"])
    (line,) = [record for record in caplog.records if getattr(record, "model", None) == "base"]
    assert (line.status, line.completion_tokens, line.finish_reasons) == (200, 2, ["stop"])


def test_health_tells_of_an_engine_that_only_a_restart_helps(tmp_path):
    with serving(tmp_path, ScriptedEngine()) as service, service.http() as http:
        assert [http.get(path).status_code for path in ("/health", "/ready")] == [200, 200]
        service.engine.failure = "The generation thread is gone"
        assert [http.get(path).status_code for path in ("/health", "/ready")] == [200, 503]
        service.engine.lost = service.engine.failure
        refused = http.get("/health")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_down")


def test_spans_continue_the_clients_trace(tmp_path, monkeypatch):
    spans = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "exporter", lambda endpoint: spans)
    with serving(tmp_path, ScriptedEngine(), otlp_endpoint="http://collector:4318") as service, service.http() as http:
        service.say("ok")
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        http.post("/v1/chat/completions", json=ASK | {"stream": True}, headers={"traceparent": parent})
        http.get("/ready")
    finished = {span.name: span for span in spans.get_finished_spans()}
    assert len(finished) == 2
    work = finished.pop("generate")
    (whole,) = finished.values()
    assert f"{work.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert work.parent.span_id == whole.context.span_id
    assert work.attributes["gen_ai.usage.output_tokens"] == 2
    assert work.attributes["gen_ai.response.finish_reasons"] == ("stop",)


def test_told_to_stop_it_finishes_what_runs_and_takes_nothing_new(tmp_path, monkeypatch):
    kept: list[draining.DrainingServer] = []

    def draining_server(config: uvicorn.Config) -> draining.DrainingServer:
        kept.append(draining.DrainingServer(config, config.app))
        return kept[0]

    engine = ScriptedEngine()
    monkeypatch.setattr("scripted_service.uvicorn.Server", draining_server)
    with serving(tmp_path, engine) as service, service.http() as http, ThreadPoolExecutor(1) as pool:
        go = threading.Event()
        service.say("ok", begins=go.is_set)
        running = pool.submit(_ask, service)
        service.wait_until(lambda: engine.live == 1)
        kept[0].handle_exit(signal.SIGTERM, None)
        service.wait_until(lambda: service.app.state.draining.begun)
        refused = http.post("/v1/chat/completions", json=ASK)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert [http.get(path).status_code for path in ("/ready", "/health")] == [503, 200]
        go.set()
        assert running.result() == "ok"
        kept[0]._captured_signals.clear()


def _ask(service: Service) -> str:
    return service.openai().chat.completions.create(**ASK).choices[0].message.content


@pytest.fixture(autouse=True)
def _no_leftover_logging():
    yield
    logging.getLogger().setLevel(logging.WARNING)
