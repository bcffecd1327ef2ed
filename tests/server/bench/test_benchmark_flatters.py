"""Case F-benchmark-flatters: what the benchmark counts, against a server whose timing is known.

The server's own record of when it sent what is the truth: on a busy machine it sends late, and the benchmark has to see
just that. Its waits never end early: the nominal timing is a lower bound. Five warm-up requests open the connections.
"""

import asyncio
from itertools import pairwise
from statistics import median

import pytest
from fake_server import FakeServer, Script, Sent, fake_server
from typer.testing import CliRunner

from deltaserve.server.bench.client import Asking, Outcome
from deltaserve.server.bench.prompts import random_prompts
from deltaserve.server.bench.report import Report
from deltaserve.server.bench.run import run
from deltaserve.server.bench.setup import Setup
from deltaserve.server.bench.statistics import Distribution
from deltaserve.server.cli import app

TOLERANCE_MS = 10.0
WARMUP = 5


def measure(server: FakeServer, requests: int = 10, timeout_s: float = 60.0) -> Report:
    setup = Setup(
        url=server.url,
        mix="uniform",
        models=tuple(server.scripts),
        requests=requests,
        concurrency=5,
        warmup_requests=WARMUP,
        prompts="random words",
        seed=0,
        asking=Asking(timeout_s=timeout_s),
    )
    return asyncio.run(run(setup, random_prompts(4, WARMUP + requests, seed=0)))


def bench(server: FakeServer, *options: str) -> tuple[int, str]:
    """Exit status and output of the command, ten requests with five under way."""
    arguments = ["bench", server.url, "--requests", "10", "--concurrency", "5", "--warmup", "0", *options]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    return result.exit_code, result.output


def answers(server: FakeServer) -> list[Sent]:
    """What the server sent in full and with text, without the warm-up."""
    return [sent for sent in server.sent[WARMUP:] if sent.ended and sent.texts]


def gaps(server: FakeServer) -> list[float]:
    return [later - earlier for sent in answers(server) for earlier, later in pairwise(sent.texts)]


def assert_close(server: FakeServer, found: Distribution | None, truth_s: float, samples: int) -> None:
    """The median is the truth within 10 ms, and what the machine itself is late: twice, for sender and receiver."""
    assert found is not None
    assert found.samples == samples
    assert found.median == pytest.approx(1000 * truth_s, abs=TOLERANCE_MS + 2000 * server.lag_s)


def assert_plain_timing(report: Report, server: FakeServer, completed: int = 10) -> None:
    total, whole = report.total, answers(server)
    first = median(sent.texts[0] - sent.arrived for sent in whole)
    each = median((sent.texts[-1] - sent.texts[0]) / 10 for sent in whole)
    last = median(sent.texts[-1] - sent.arrived for sent in whole)
    assert first >= 0.2
    assert last >= 0.4
    assert_close(server, total.ttft, first, completed)
    assert_close(server, total.itl, median(gaps(server)), 10 * completed)
    assert_close(server, total.tpot, each, completed)
    assert_close(server, total.e2e, last, completed)
    assert total.output_tokens == 11 * completed


def test_f_benchmark_flatters_plain() -> None:
    with fake_server(plain=Script()) as server:
        report = measure(server)
    assert_plain_timing(report, server)
    assert report.total.outcomes[Outcome.COMPLETED] == 10
    assert report.total.failed_share == 0.0
    assert not report.total.tokens_estimated


def test_f_benchmark_flatters_role_only_event_is_not_the_first_token() -> None:
    with fake_server(role_first=Script(role_event=True)) as server:
        report = measure(server)
    assert_plain_timing(report, server)


def test_f_benchmark_flatters_two_tokens_in_one_event() -> None:
    with fake_server(pairs=Script(tokens_per_event=2)) as server:
        report = measure(server)
    total = report.total
    assert total.output_tokens == 110
    each = median((sent.texts[-1] - sent.texts[0]) / 10 for sent in answers(server))
    assert_close(server, total.tpot, each, 10)
    assert_close(server, total.itl, median(gaps(server)), 50)
    assert median(gaps(server)) > 0.035
    assert report.as_json()["itl_per_event_ms"]["samples"] == 50


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("500", "HTTP 500: out of memory"),
        ("error event", "error event: the generation thread died"),
        ("cut", "the stream broke off without [DONE] or a finish_reason"),
    ],
)
def test_f_benchmark_flatters_failed_answers_are_in_no_figure(failure: str, reason: str) -> None:
    with fake_server(flaky=Script(fail_every=5, failure=failure)) as server:
        report = measure(server)
    assert report.total.outcomes == {
        Outcome.COMPLETED: 8,
        Outcome.FAILED: 2,
        Outcome.EMPTY: 0,
        Outcome.TIMED_OUT: 0,
    }
    assert report.total.reasons == ((Outcome.FAILED, reason, 2),)
    assert_plain_timing(report, server, completed=8)


def test_f_benchmark_flatters_empty_answer_is_listed_apart() -> None:
    with fake_server(silent=Script(fail_every=10, failure="empty")) as server:
        report = measure(server)
    assert report.total.outcomes[Outcome.EMPTY] == 1
    assert report.total.reasons == ((Outcome.EMPTY, "no text, 0 tokens by usage", 1),)
    assert_plain_timing(report, server, completed=9)


def test_f_benchmark_flatters_endless_answer_times_out() -> None:
    with fake_server(stuck=Script(fail_every=10, failure="endless")) as server:
        report = measure(server, timeout_s=4.0)
    assert report.total.outcomes[Outcome.TIMED_OUT] == 1
    assert report.total.reasons == ((Outcome.TIMED_OUT, "no end of the answer within 4 s", 1),)
    assert_plain_timing(report, server, completed=9)
    assert report.total.span_s < 4.0, "the wait for the endless answer must not lower the throughput of the others"


def test_f_benchmark_flatters_tokens_come_from_usage_not_from_text() -> None:
    with fake_server(wordy=Script(text="several words in every token ", tokens_per_event=2)) as server:
        report = measure(server)
    assert report.total.output_tokens == 110
    assert report.as_json()["output_tokens_from"] == "usage"


def test_f_benchmark_flatters_without_usage_the_count_is_estimated_and_says_so() -> None:
    with fake_server(bare=Script(usage=False)) as server:
        report = measure(server)
        status, output = bench(server)
    assert report.total.tokens_estimated
    assert report.as_json()["output_tokens_from"] == "estimate: events with text"
    assert status == 0
    assert "110 output tokens (estimated)" in output
    assert "tokens are estimated" in output


@pytest.mark.parametrize(("options", "status"), [([], 1), (["--max-failed", "0.1"], 1), (["--max-failed", "0.2"], 0)])
def test_f_benchmark_flatters_exit_status_tells_of_failures(options: list[str], status: int) -> None:
    with fake_server(flaky=Script(fail_every=5, first_s=0.02, every_s=0.001)) as server:
        found, output = bench(server, *options)
    assert found == status
    assert "8 completed, 2 failed, 0 empty, 0 timed out" in output
    assert "2 failed: HTTP 500: out of memory" in output


def test_f_benchmark_flatters_report_names_its_conditions() -> None:
    with fake_server(a=Script(first_s=0.02, every_s=0.001), b=Script(first_s=0.02, every_s=0.001)) as server:
        status, output = bench(server, "--mix", "zipf", "--warmup", "3")
        report = measure(server)
    assert status == 0
    assert "Mix: zipf over a, b. Concurrency: 5 (closed loop). Requests: 10 after 3 to warm up (0 failed)" in output
    assert "linear interpolation between the closest ranks" in output
    assert "per event" in output
    assert "* of fewer than 100 samples" in output
    document = report.as_json()
    assert document["ttft_ms"]["samples"] == document["setup"]["requests"] == 10, "warm-up requests are in no figure"
    assert document["ttft_ms"]["p99_is_rough"] is True
    assert document["setup"]["warmup_requests"] == WARMUP
    assert len(server.sent) == 3 + 10 + WARMUP + 10
    assert sum(part["outcomes"]["completed"] for part in document["per_model"].values()) == 10
