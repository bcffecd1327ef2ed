import pytest

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.bench.client import Outcome, Record
from deltaserve.server.bench.goodput import goodput, parse_limits


def record(ttft: float = 0.1, e2e: float = 0.5, tokens: int = 5, outcome: Outcome = Outcome.COMPLETED) -> Record:
    return Record("m", outcome, 10.0, 10.0 + e2e, (10.0 + ttft, 10.0 + e2e), tokens)


def test_limits_are_read_by_name() -> None:
    assert parse_limits(["ttft:200", "tpot:50.5"]) == {"ttft": 200.0, "tpot": 50.5}


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:fast", "ttft:-1", "ttft:0", "ttft:nan", "ttft:inf", "itl:5"])
def test_bad_limit_is_named_with_what_to_write(text: str) -> None:
    with pytest.raises(OptionError, match=rf"--goodput {text} is no limit; write NAME:MILLISECONDS"):
        parse_limits([text])


def test_only_requests_within_every_limit_count() -> None:
    records = [record(), record(ttft=0.3), record(e2e=0.9), record(outcome=Outcome.FAILED)]
    found = goodput(records, {"ttft": 200.0, "tpot": 150.0}, span_s=2.0)
    assert found is not None
    assert (found.requests, found.share, found.requests_per_s) == (1, 0.25, 0.5)


def test_answer_of_one_token_has_no_time_per_token_to_exceed() -> None:
    found = goodput([record(tokens=1)], {"tpot": 1.0}, span_s=1.0)
    assert found is not None
    assert found.requests == 1


def test_no_limits_no_goodput() -> None:
    assert goodput([record()], {}, span_s=1.0) is None
