"""How one request's tokens are chosen, and that no other request has a say in it."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from deltaserve.delta_store.errors import RequestRefused
from deltaserve.server.engine.requests import Sampling, Token
from deltaserve.server.engine.sampler import NUCLEUS_GUESS, Chooser, check, check_ids, choose

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0, 0.0])
SAMPLED = Sampling(max_tokens=100, temperature=1.0, seed=7)
GREEDY = replace(SAMPLED, temperature=0)


def draws(sampling: Sampling, count: int = 4000, logits: torch.Tensor = LOGITS) -> Counter[int]:
    chooser = Chooser(sampling, [0], ())
    return Counter(chooser.choose(logits).token_id for _ in range(count))


def frequencies(sampling: Sampling) -> torch.Tensor:
    drawn = draws(sampling)
    return torch.tensor([drawn[i] / drawn.total() for i in range(len(LOGITS))])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_draws_from_the_softmax(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(0)
    torch.testing.assert_close(frequencies(replace(SAMPLED, temperature=temperature)), expected, atol=0.03, rtol=0)


def test_a_tiny_temperature_is_greedy() -> None:
    assert draws(replace(SAMPLED, temperature=1e-9), 50) == {0: 50}


def test_filters_keep_what_they_say() -> None:
    assert set(draws(replace(SAMPLED, top_k=2))) == {0, 1}
    assert set(draws(replace(SAMPLED, top_k=1000))) == set(draws(SAMPLED))
    p = LOGITS.softmax(0)
    assert set(draws(replace(SAMPLED, top_p=float(p[0] + p[1] / 2)))) == {0, 1}
    assert set(draws(replace(SAMPLED, top_p=1e-9))) == {0}
    assert set(draws(replace(SAMPLED, min_p=float(p[1] / p[0]) * 0.99))) == {0, 1}
    assert set(draws(replace(SAMPLED, top_k=3, top_p=0.99))) <= {0, 1, 2}


def test_a_flat_nucleus_larger_than_the_first_guess_is_found_whole() -> None:
    flat = torch.zeros(4 * NUCLEUS_GUESS)
    assert len(draws(replace(SAMPLED, top_p=0.9), 6000, flat)) > 1.5 * NUCLEUS_GUESS


def test_d_seed_depends_on_neighbours_not_a_seed_alone_decides() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    alone = Chooser(SAMPLED, [0], ())
    beside = [Chooser(replace(SAMPLED, seed=None), [0], ()), Chooser(SAMPLED, [0], ()), Chooser(GREEDY, [0], ())]
    for _ in range(30):
        expected = choose(logits[1:2], [alone])
        assert choose(logits[:3], beside)[1] == expected[0]


def test_d_seed_unseeded_requests_differ() -> None:
    unseeded = replace(SAMPLED, seed=None)
    runs = {tuple(Chooser(unseeded, [0], ()).choose(torch.zeros(1000)).token_id for _ in range(1)) for _ in range(8)}
    assert len(runs) > 1


def test_penalties_look_at_the_whole_history() -> None:
    chooser = Chooser(replace(GREEDY, frequency_penalty=0.6), [0], ())
    assert [t.token_id for _ in range(5) for t in choose(LOGITS[None], [chooser])] == [0, 0, 1, 0, 2]
    chooser = Chooser(replace(GREEDY, presence_penalty=1.2), [0], ())
    assert [t.token_id for _ in range(4) for t in choose(LOGITS[None], [chooser])] == [0, 1, 0, 0]
    chooser = Chooser(replace(GREEDY, repetition_penalty=3.0), [0], ())
    assert chooser.choose(LOGITS).token_id == 1  # the prompt counts
    chooser = Chooser(replace(GREEDY, repetition_penalty=3.0), [3], ())
    assert float(chooser._adjust(LOGITS)[3]) == -3.0  # a negative logit becomes smaller, not larger


def test_bias_and_min_tokens() -> None:
    assert Chooser(replace(GREEDY, logit_bias={4: 6.0, 0: -1.0}), [0], ()).choose(LOGITS).token_id == 4
    chooser = Chooser(replace(GREEDY, min_tokens=2), [0], stop_ids=[0])
    assert [t.token_id for _ in range(3) for t in choose(LOGITS[None], [chooser])] == [1, 1, 0]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    sampling = replace(SAMPLED, logprobs=2, temperature=0.1, logit_bias={3: 50.0})
    token = Chooser(sampling, [0], ()).choose(LOGITS)
    own = LOGITS.log_softmax(0)
    assert token.token_id == 3
    assert token.logprob == pytest.approx(float(own[3]))
    assert token.top == ((0, pytest.approx(float(own[0]))), (1, pytest.approx(float(own[1]))))
    certain = Chooser(replace(GREEDY, logprobs=5), [0], ()).choose(torch.tensor([80.0, -math.inf, -math.inf]))
    assert certain == Token(0, 0.0, ((0, 0.0),))


def test_a_bad_row_fails_alone() -> None:
    logits = LOGITS.repeat(4, 1)
    logits[1, 3] = math.nan
    broken = Chooser(replace(GREEDY, logit_bias={99: 1.0}), [0], ())  # an id that admission would have refused
    good = [Chooser(SAMPLED, [0], ()) for _ in range(2)]
    results = choose(logits, [good[0], Chooser(GREEDY, [0], ()), broken, good[1]])
    assert [isinstance(result, Exception) for result in results] == [False, True, True, False]
    assert "not finite" in str(results[1])
    assert results[0] == results[3] == Chooser(SAMPLED, [0], ()).choose(LOGITS)


BAD = [
    ("max_tokens", 0), ("max_tokens", -5), ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
    ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("min_p", 2.0), ("presence_penalty", math.inf),
    ("frequency_penalty", math.nan), ("repetition_penalty", 0.0), ("seed", 2**70), ("logprobs", -1),
    ("logprobs", 1_000_000), ("min_tokens", 101), ("logit_bias", {1: 1e9}), ("logit_bias", {1: math.nan}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD)
def test_e_parameters_out_of_bounds_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestRefused, match=field) as refused:
        check(replace(SAMPLED, **{field: value}))  # type: ignore[arg-type]
    assert refused.value.param == field


def test_e_parameters_token_ids_must_be_of_the_vocabulary() -> None:
    check_ids("prompt", [0, 63], 64)
    for bad in (-1, 64):
        with pytest.raises(RequestRefused, match=f"token id {bad}.*0 to 63"):
            check_ids("logit_bias", [3, bad], 64)
