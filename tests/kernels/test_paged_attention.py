"""Attention over a paged cache against a dense float64 softmax, over shapes, dtypes, pages and lengths."""

import pytest
import torch
from dense_oracle import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from random_pages import random_pages

from deltaserve.kernels import dispatch
from deltaserve.kernels.paged import Pages

backends = pytest.mark.parametrize("backend", dispatch.BACKENDS.values(), ids=dispatch.BACKENDS)


def dense(query, keys, values, pages, scale):
    """``[rows, heads, width]`` in float64."""
    out = torch.empty(query.shape, dtype=torch.float64)
    for row in range(len(query)):
        at = [
            int(pages.starts[int(pages.first[row]) + t // pages.tokens]) + t % pages.tokens
            for t in range(pages.lengths[row])
        ]
        for head in range(query.shape[1]):
            key_head = head * keys.shape[1] // query.shape[1]
            scores = keys[at, key_head].double() @ query[row, head].double() * scale
            out[row, head] = scores.softmax(0) @ values[at, key_head].double()
    return out


@backends
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.sampled_from([1, 2, 15, 16, 17, 127, 128, 129, 300]), min_size=1, max_size=6),
    key_heads=st.sampled_from([1, 2, 3]),
    sharing=st.sampled_from([1, 2, 3, 4, 5, 7]),
    width=st.sampled_from([2, 8, 16, 24, 64, 80, 128]),
    tokens=st.sampled_from([1, 5, 16, 32, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_attention_equals_the_dense_softmax(backend, seed, lengths, key_heads, sharing, width, tokens, dtype):
    rng = torch.Generator().manual_seed(seed)
    pages, rows = random_pages(rng, lengths, tokens)
    keys, values = (torch.randn(rows, key_heads, width, generator=rng).to(dtype) for _ in range(2))
    query = torch.randn(len(lengths), key_heads * sharing, width, generator=rng).to(dtype)
    scale = width**-0.5
    assert_close(
        backend.attend(query, keys, values, pages, scale), dense(query, keys, values, pages, scale), dtype, "attended"
    )


compiled = pytest.mark.parametrize("name", [name for name in dispatch.BACKENDS if name.startswith("cpu")])


@compiled
def test_a_row_is_the_same_bit_for_bit_whatever_is_beside_it_and_however_many_threads(name):
    """Long rows are cut between threads; where, depends on all the rows."""
    backend, rng = dispatch.BACKENDS[name], torch.Generator().manual_seed(1)
    lengths = [2000, 700, 33, 1290, 128, 1]
    pages, rows = random_pages(rng, lengths, 16)
    keys, values = torch.randn(2, rows, 3, 64, generator=rng)
    query = torch.randn(len(lengths), 9, 64, generator=rng)
    together = backend.attend(query, keys, values, pages, 0.125)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(backend.attend(query, keys, values, pages, 0.125), together)
            for row in range(len(lengths)):
                one = Pages(pages.starts, pages.first[row : row + 1], pages.lengths[row : row + 1], 16)
                assert torch.equal(backend.attend(query[row : row + 1], keys, values, one, 0.125)[0], together[row])
    finally:
        torch.set_num_threads(threads)


@compiled
def test_large_scores_neither_overflow_nor_vanish(name):
    pages, rows = random_pages(torch.Generator().manual_seed(2), [300], 16)
    at, values = pages.of(0), torch.randn(rows, 1, 16)
    keys = torch.zeros(rows, 1, 16)
    keys[at[7]], keys[at[250]] = 1e4, -1e4
    out = dispatch.BACKENDS[name].attend(torch.ones(1, 1, 16), keys, values, pages, 1.0)
    assert_close(out[0, 0], values[at[7], 0].double(), torch.float32, "attended")


@compiled
@pytest.mark.parametrize(
    ("starts", "first", "length"), [([48], 0, 16), ([-1], 0, 1), ([0], 1, 1), ([0], 0, 17), ([0], 0, 0), ([0], -1, 1)]
)
def test_pages_outside_of_the_cache_are_refused(name, starts, first, length):
    cache = torch.ones(63, 1, 16)
    pages = Pages(torch.tensor(starts), torch.tensor([first]), torch.tensor([length]), 16)
    with pytest.raises(ValueError, match="outside of the cache"):
        dispatch.BACKENDS[name].attend(torch.ones(1, 1, 16), cache, cache, pages, 1.0)


@compiled
def test_tables_of_another_kind_are_refused(name):
    backend, cache, row = dispatch.BACKENDS[name], torch.ones(64, 1, 16), torch.ones(1, 1, 16)
    zero, one = torch.tensor([0]), torch.tensor([1])
    with pytest.raises(ValueError, match="int64"):
        backend.attend(row, cache, cache, Pages(zero.int(), zero, one, 16), 1.0)
    with pytest.raises(ValueError, match="2 rows for 1"):
        backend.attend(row, cache, cache, Pages(zero, zero.repeat(2), one.repeat(2), 16), 1.0)
    with pytest.raises(ValueError, match="cache is"):
        backend.attend(row, cache.transpose(0, 2), cache, Pages(zero, zero, one, 16), 1.0)
