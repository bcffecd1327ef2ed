"""Decoder blocks in one call against the same blocks in plain torch, with deltas, biases and norms of variants."""

import pytest
import torch
from dense_oracle import assert_close, random_delta
from random_pages import random_pages

from deltaserve.kernels import dispatch, reference
from deltaserve.kernels.decoder import Block, Heads, Norm, Step
from deltaserve.kernels.paged import Pages
from deltaserve.kernels.segments import BASE, Segments
from deltaserve.kernels.weights import Weight, quantised

compiled = pytest.mark.parametrize("name", [name for name in dispatch.BACKENDS if name.startswith("cpu")])
SLOTS = 3


def random_blocks(rng, backends, heads, width, inner, *, int8=False):
    """The same blocks, prepared by each backend, with a variant in every slot but the last."""
    queries, keys = heads.count * heads.width, heads.keys * heads.width
    shapes = {"input": [(queries, width), (keys, width), (keys, width)], "output": [(width, queries)]}
    shapes |= {"gate_and_up": [(inner, width)] * 2, "down": [(width, inner)]}
    made = [{} for _ in backends]
    for name, outs in shapes.items():
        weights = [torch.randn(shape, generator=rng) * shape[1] ** -0.5 for shape in outs]
        biases = [torch.randn(len(weight), generator=rng) for weight in weights]
        kept = [quantised(w, b) if int8 else Weight(w, None, b) for w, b in zip(weights, biases, strict=True)]
        for one, backend in zip(made, backends, strict=True):
            one[name] = backend.layers(kept, SLOTS)
        for layer, shape in enumerate(outs):
            for slot in range(SLOTS - 1):
                delta, _ = random_delta(rng, ["sparse", "low_rank"], *shape, 16, "int4")
                bias = torch.randn(shape[0], generator=rng)
                for one, backend in zip(made, backends, strict=True):
                    one[name].install(layer, slot, backend.prepare(delta))
                    one[name].install_bias(layer, slot, bias)
    for name in ("attention_norm", "mlp_norm"):
        table = torch.rand(SLOTS + 1, width, generator=rng) + 0.5
        for one in made:
            one[name] = Norm(table[0].clone(), table, 1e-5, 0.0)
    return [Block(**one) for one in made]


def random_step(rng, heads, lengths, blocks, *, segments=None, tokens=16):
    """Rows of requests that hold ``lengths`` keys, the last of which is the row's own."""
    pages, rows = random_pages(rng, lengths, tokens)
    cache = [tuple(torch.randn(2, rows, heads.keys, heads.width, generator=rng)) for _ in range(blocks)]
    writes = torch.tensor([int(pages.of(row)[-1]) for row in range(len(lengths))])
    turns = torch.randn(2, len(lengths), heads.width, generator=rng)
    places = None if segments is None else segments.slot_of_row() - BASE
    return Step(cache, pages, writes, turns[0], turns[1], places, segments)


def copied(step: Step) -> Step:
    cache = [(keys.clone(), values.clone()) for keys, values in step.cache]
    return Step(cache, step.pages, step.writes, step.cosines, step.sines, step.places, step.segments)


@compiled
@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("mixed", [False, True], ids=["base", "mixed"])
@pytest.mark.parametrize(
    ("heads", "width", "inner"),
    [(Heads(6, 2, 16, 0.25), 48, 100), (Heads(4, 4, 24, 0.2), 33, 17), (Heads(5, 1, 64, 0.125), 80, 64)],
    ids=str,
)
def test_blocks_equal_plain_torch(name, heads, width, inner, mixed, int8):
    rng = torch.Generator().manual_seed(width)
    backend = dispatch.BACKENDS[name]
    pairs = [random_blocks(rng, (backend, reference), heads, width, inner, int8=int8) for _ in range(2)]
    lengths = [1, 17, 130, 16, 300, 2, 40]
    segments = Segments.of([2, 1, 3, 1], [0, BASE, 1, 2]) if mixed else None
    step = random_step(rng, heads, lengths, 2, segments=segments)
    x = torch.randn(len(lengths), width, generator=rng)
    y, expected, other = x.clone(), x.clone(), copied(step)

    backend.decoder([pair[0] for pair in pairs], heads).run(y, step)
    reference.decoder([pair[1] for pair in pairs], heads).run(expected, other)

    assert_close(y, expected.double(), torch.float32, "x")
    for ours, theirs in zip(step.cache, other.cache, strict=True):
        for mine, its in zip(ours, theirs, strict=True):
            assert_close(mine, its.double(), torch.float32, "cache")


@compiled
def test_a_row_is_the_same_bit_for_bit_whatever_is_beside_it(name):
    rng = torch.Generator().manual_seed(5)
    backend, heads = dispatch.BACKENDS[name], Heads(6, 2, 16, 0.25)
    blocks = [random_blocks(rng, (backend,), heads, 48, 100)[0] for _ in range(2)]
    decoder = backend.decoder(blocks, heads)
    lengths = [1, 17, 130, 16, 300, 2, 40, 5] * 4
    step = random_step(rng, heads, lengths, 2)
    x = torch.randn(len(lengths), 48, generator=rng)
    together = x.clone()
    decoder.run(together, copied(step))
    for rows in (slice(2, 3), slice(3, 6), slice(4, 30)):
        pages = Pages(step.pages.starts, step.pages.first[rows], step.pages.lengths[rows], step.pages.tokens)
        few = Step(step.cache, pages, step.writes[rows], step.cosines[rows], step.sines[rows], None, None)
        alone = x[rows].clone()
        decoder.run(alone, copied(few))
        assert torch.equal(alone, together[rows])


@compiled
def test_what_does_not_fit_is_refused_before_anything_is_written(name):
    rng = torch.Generator().manual_seed(6)
    backend, heads = dispatch.BACKENDS[name], Heads(2, 2, 16, 0.25)
    block = random_blocks(rng, (backend,), heads, 32, 40)[0]
    decoder = backend.decoder([block], heads)
    good = random_step(rng, heads, [3, 4], 1)
    x = torch.randn(2, 32, generator=rng)
    before, cache = x.clone(), [one.clone() for one in good.cache[0]]

    def refused(match: str, **changed: object) -> None:
        fields = {name: getattr(good, name) for name in Step.__slots__}
        with pytest.raises(ValueError, match=match):
            decoder.run(x, Step(**(fields | changed)))

    refused("outside of the cache", writes=torch.tensor([0, 10**6]))
    refused("slot", places=torch.tensor([0, SLOTS + 1]), segments=Segments.of([1, 1], [0, 1]))
    refused("places must be", places=torch.tensor([0]))
    refused("writes must be", writes=good.writes.int())
    refused("cache of 0 layers", cache=[])
    refused("cache is", cache=[tuple(one.double() for one in good.cache[0])])
    refused("does not fit", cosines=good.cosines[:1])
    with pytest.raises(ValueError, match="float32"):
        decoder.run(x.double(), good)
    assert torch.equal(x, before)
    assert all(torch.equal(one, old) for one, old in zip(good.cache[0], cache, strict=True))
