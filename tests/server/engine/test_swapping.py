"""A variant in the base's weights: it answers like its merged model, and the base comes back byte for byte."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_variants import SMALL, Variant, alone, collect, greedy, random_prompts, random_variant, serving, version
from tiny_models import tiny_gpt2, tiny_llama
from transformers import PreTrainedModel

from deltaserve.delta_store.errors import EngineDown, GenerationFailed, OptionError
from deltaserve.kernels.segments import BASE as BASE_ROWS
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.layers import DeltaLinear
from deltaserve.server.engine.requests import Version

PROMPT = [5, 9, 33, 2]
BASE = tiny_llama(attention_bias=True)
VARIANTS = {version(name).digest: random_variant(BASE, "sparse16", seed) for seed, name in enumerate("abc", start=1)}
A, B = version("a"), version("b")
SWAP, AUTO = replace(SMALL, policy="swap"), replace(SMALL, policy="auto")


def answer(on: Version | None, count: int = 20) -> list[int]:
    return alone(BASE if on is None else VARIANTS[on.digest].merged, PROMPT, count)


def ask(engine: Engine, on: Version | None, count: int = 20) -> list[int]:
    return asyncio.run(collect(engine, PROMPT, on, greedy(count)))


def all_bytes(engine: Engine) -> dict[str, bytes]:
    """Everything that the base's own rows are computed with."""
    model = engine._batching.model
    tensors = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, DeltaLinear) and module.added is not None:
            tensors[f"{name}.added"] = module.added
    return {
        name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()  # view: bfloat16 is not numpy's
        for name, tensor in tensors.items()
    }


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_so():
            await asyncio.sleep(0.01)


# Answers


def served(engine: Engine, prompts: Sequence[list[int]], owners: Sequence[str | None], count: int) -> list[list[int]]:
    """One request after the other, two at a time where neighbours have one owner."""

    async def main() -> list[list[int]]:
        answers: list[list[int]] = []
        for i in range(0, len(prompts), 2):
            some = [
                collect(engine, prompt, None if owner is None else Version(owner, owner, ""), greedy(count))
                for prompt, owner in zip(prompts[i : i + 2], owners[i : i + 2], strict=True)
            ]
            answers += await asyncio.gather(*some)
        return answers

    return asyncio.run(main())


BASES: dict[str, tuple[PreTrainedModel, tuple[str, ...]]] = {
    "tied": (BASE, ("sparse1", "sparse16", "sparse64", "low_rank", "dense", "rows")),
    "untied": (tiny_llama(tied=False), ("sparse16", "low_rank")),
    "transposed": (tiny_gpt2(), ("sparse16", "dense")),
}


@pytest.mark.parametrize("policy", ["auto", "mixed", "swap"])
@pytest.mark.parametrize("name", BASES)
def test_every_policy_equals_the_merged_models(tmp_path: Path, name: str, policy: str) -> None:
    base, kinds = BASES[name]
    variants = {kind: random_variant(base, kind, seed) for seed, kind in enumerate(kinds, start=1)}
    # Alone, alone again, then together with the base: into the weights, staying there, and out of them.
    owners = [owner for kind in kinds for owner in (kind, kind, kind, kind, None, kind)]
    prompts = random_prompts(len(owners), seed=3, longest=30)
    with serving(base, variants, tmp_path, replace(SMALL, policy=policy, bank_slots=6)) as engine:
        before = all_bytes(engine)
        answers = served(engine, prompts, owners, 12)
        swaps = engine.policy.swaps
        ask(engine, None, 1)
        assert all_bytes(engine) == before
    models = {None: base} | {kind: variant.merged for kind, variant in variants.items()}
    assert answers == [alone(models[owner], prompt, 12) for owner, prompt in zip(owners, prompts, strict=True)]
    assert (swaps > 0) == (policy != "mixed")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_swapped_in_is_the_merged_weights_and_comes_out_byte_for_byte(tmp_path: Path, dtype: str) -> None:
    with serving(BASE, VARIANTS, tmp_path, replace(SWAP, dtype=dtype)) as engine:
        before = all_bytes(engine)
        for on in (A, B, A):
            ask(engine, on, 3)
            assert engine.policy.swapped == on.digest
            merged, own = VARIANTS[on.digest].merged, engine._batching.model
            for name, parameter in own.named_parameters():
                if "proj.weight" in name or "norm" in name:
                    values = merged.get_parameter(name)
                    torch.testing.assert_close(parameter.float(), values, rtol=1e-2, atol=1e-3, msg=name)
        assert all_bytes(engine) != before
        ask(engine, None, 3)
        assert engine.policy.swapped == ""
        assert all_bytes(engine) == before


def test_a_vocab_grown_is_swapped_but_for_its_rows(tmp_path: Path) -> None:
    grown = random_variant(BASE, "rows", seed=1, vocab=67)
    with serving(BASE, {"grown": grown}, tmp_path, SWAP) as engine:
        for prompt in ([64, 5, 66], [66], PROMPT):
            answers = asyncio.run(collect(engine, prompt, Version("grown", "grown", ""), greedy(30)))
            assert engine.policy.swapped == "grown"
            assert answers == alone(grown.merged, prompt, 30)
        assert ask(engine, None) == answer(None)


def test_a_prefix_cached_in_one_mode_serves_the_other(tmp_path: Path) -> None:
    prompt = random_prompts(1, seed=5, longest=20, shared=48)[0]

    async def main(engine: Engine) -> list[int]:
        stream = await engine.submit(prompt, A, greedy(20))
        tokens = [token.token_id async for token in stream]
        assert stream.finished is not None
        cached.append(stream.finished.cached_tokens)
        return tokens

    cached: list[int] = []
    with serving(BASE, VARIANTS, tmp_path, SWAP) as engine:
        expected = alone(VARIANTS[A.digest].merged, prompt, 20)
        assert asyncio.run(main(engine)) == expected
        engine.policy.idle = lambda: None  # type: ignore[method-assign]
        engine.policy._room = lambda: 0
        ask(engine, None, 1)
        assert asyncio.run(main(engine)) == expected
        assert engine.policy.swapped == ""
        assert asyncio.run(collect(engine, prompt, None, greedy(20))) == alone(BASE, prompt, 20)
    assert cached[0] == 0 < 48 <= cached[1]


# Versions that go away


def test_d_remove_while_swapped_frees_the_memory_and_the_weights(tmp_path: Path) -> None:
    async def main(engine: Engine) -> None:
        before = all_bytes(engine)
        running = asyncio.create_task(collect(engine, PROMPT, A, greedy(100)))
        await until(lambda: engine.policy.swapped == A.digest)
        engine.forget(A.digest)
        assert await running == answer(A, 100)
        await until(lambda: engine.policy.swapped == "")
        assert engine.bank.used_bytes == 0
        assert all_bytes(engine) == before
        assert await collect(engine, PROMPT, A, greedy(20)) == answer(A)

    with serving(BASE, VARIANTS, tmp_path, SWAP) as engine:
        asyncio.run(main(engine))


def test_d_same_name_new_weights_while_swapped(tmp_path: Path) -> None:
    old, new = Version("v", A.digest, ""), Version("v", B.digest, "")
    for limits in (SWAP, AUTO):
        with serving(BASE, VARIANTS, tmp_path, replace(limits, bank_slots=1)) as engine:
            for on in (old, new, old):
                assert ask(engine, on, 60) == answer(on, 60)


def test_cancelled_while_swapped_and_while_waiting_for_a_turn(tmp_path: Path) -> None:
    async def main(engine: Engine) -> None:
        running = await engine.submit(PROMPT, A, greedy(190))
        waiting = [await engine.submit(PROMPT, on, greedy(50)) for on in (None, B)]
        await until(lambda: engine.policy.swapped == A.digest)
        waiting[0].cancel()
        assert [token async for token in waiting[0]] == []
        running.cancel()
        assert [token.token_id async for token in waiting[1]] == answer(B, 50)
        await until(lambda: engine.requests == 0)

    with serving(BASE, VARIANTS, tmp_path, SWAP) as engine:
        asyncio.run(main(engine))


# Failures


def broken(method: Callable[..., Any]) -> Callable[..., Any]:
    """As ``method``, but it stops half way."""

    def half(weights: list[torch.Tensor], other: Any) -> Any:
        if isinstance(other, list):
            method(weights[::2], other[::2])
        else:
            weights[0].zero_()
        raise RuntimeError("the power went")

    return half


def breaking_vectors(engine: Engine, monkeypatch: pytest.MonkeyPatch, *, swap_in: bool) -> None:
    """The second vector that would be altered on the way in, or out, is not; once."""
    calls = 0

    def alter_of(layer: Any) -> Callable[..., None]:
        own = layer.alter

        def alter(parameter: str, slot: int) -> None:
            nonlocal calls
            calls += (slot != BASE_ROWS) == swap_in
            if calls == 2:
                calls += 1
                raise RuntimeError("the power went")
            own(parameter, slot)

        return alter

    for layer in {layer for layer, _ in engine._wrapped.vectors.values()}:
        monkeypatch.setattr(layer, "alter", alter_of(layer))


@pytest.mark.parametrize("swap_in", [True, False])
def test_a_crash_between_weights_and_norms_leaves_the_base_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap_in: bool
) -> None:
    variants = {"v": random_variant(BASE, "dense", seed=1)}
    on = Version("v", "v", "")
    with serving(BASE, variants, tmp_path, SWAP) as engine:
        before = all_bytes(engine)
        breaking_vectors(engine, monkeypatch, swap_in=swap_in)
        assert ask(engine, on) == alone(variants["v"].merged, PROMPT, 20)
        assert ask(engine, None) == alone(BASE, PROMPT, 20)
        assert all_bytes(engine) == before
        assert "the power went" in (engine.policy.failure or "")


@pytest.mark.parametrize("way", ["swap_in_all_", "swap_out_all_"])
@pytest.mark.parametrize("base", [BASE, tiny_gpt2()], ids=["llama", "gpt2"])
def test_a_crash_in_the_middle_of_a_swap_leaves_the_base_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, base: PreTrainedModel
) -> None:
    variants = {"v": random_variant(base, "sparse16", seed=1)}
    on = Version("v", "v", "")
    with serving(base, variants, tmp_path, SWAP) as engine:
        before = all_bytes(engine)
        backend = engine._wrapped.backend
        monkeypatch.setattr(backend, way, broken(getattr(backend, way)))
        assert ask(engine, on) == alone(variants["v"].merged, PROMPT, 20)
        assert ask(engine, None) == alone(base, PROMPT, 20)
        assert all_bytes(engine) == before
        assert "the power went" in (engine.policy.failure or "")
        assert ask(engine, on) == alone(variants["v"].merged, PROMPT, 20)
        assert engine.policy.swapped == ""


def breaking_after(engine: Engine, steps: int) -> None:
    """The model raises in its forward, once, ``steps`` calls from now."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == steps:
            raise RuntimeError("a kernel broke")

    engine._batching.model.register_forward_pre_hook(hook)


@pytest.mark.parametrize("also", [None, "swap_out_all_"])
def test_a_generation_thread_that_dies_while_swapped_leaves_the_base_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, also: str | None
) -> None:
    async def main(engine: Engine) -> None:
        before = all_bytes(engine)
        breaking_after(engine, 10)
        if also is not None:
            monkeypatch.setattr(backend := engine._wrapped.backend, also, broken(getattr(backend, also)))
        with pytest.raises(GenerationFailed, match="a kernel broke"):
            await collect(engine, PROMPT, A, greedy(100))
        await until(engine.ready)
        assert engine.policy.swapped == ""
        assert all_bytes(engine) == before
        monkeypatch.undo()
        for on in (None, A, None):
            assert await collect(engine, PROMPT, on, greedy(20)) == answer(on)
        assert engine.policy.swaps >= 2
        assert all_bytes(engine) == before

    with serving(BASE, VARIANTS, tmp_path, SWAP) as engine:
        asyncio.run(main(engine))


def test_a_base_that_cannot_be_restored_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(engine: Engine) -> None:
        backend = engine._wrapped.backend
        monkeypatch.setattr(backend, "swap_in_all_", broken(backend.swap_in_all_))
        assert engine.policy._swapping is not None
        monkeypatch.setattr(engine.policy._swapping, "_read", lambda name: torch.zeros(1))
        with pytest.raises(EngineDown, match="checkpoint has changed"):
            await collect(engine, PROMPT, A, greedy(5))
        await until(lambda: "its checkpoint has changed" in (engine.failure or ""))
        with pytest.raises(EngineDown, match="checkpoint has changed"):
            await engine.submit(PROMPT, None, greedy(1))

    with serving(BASE, VARIANTS, tmp_path, SWAP) as engine:
        asyncio.run(main(engine))


# Turns


def test_policy_swap_runs_one_owner_at_a_time_and_a_busy_one_keeps_nobody_out(tmp_path: Path) -> None:
    batches: list[set[str]] = []

    async def main(engine: Engine) -> None:
        decide = engine.policy.before_step
        engine.policy.before_step = lambda jobs: batches.append({job.digest for job in jobs}) or decide(jobs)  # type: ignore[method-assign,func-returns-value]
        flood: list[asyncio.Task[list[int]]] = []
        other: asyncio.Task[list[int]] | None = None
        for i in range(200):
            flood.append(asyncio.create_task(collect(engine, PROMPT, A, greedy(10))))
            await asyncio.sleep(0.005)
            if i == 5:
                other = asyncio.create_task(collect(engine, PROMPT, None, greedy(10)))
            if other is not None and other.done():
                break
        assert other is not None
        assert await other == answer(None, 10)
        assert not flood[-1].done()
        assert await asyncio.gather(*flood) == [answer(A, 10)] * len(flood)

    with serving(BASE, VARIANTS, tmp_path, SWAP) as engine:
        asyncio.run(main(engine))
    assert {len(batch) for batch in batches} == {1}


def test_policy_swap_serves_a_mix_in_order_of_arrival(tmp_path: Path) -> None:
    names = ["a", "b", None, "a", "c", "b", None, "a"]

    async def main(engine: Engine) -> None:
        done: list[str | None] = []

        async def one(name: str | None) -> list[int]:
            tokens = await collect(engine, PROMPT, None if name is None else version(name), greedy(20))
            done.append(name)
            return tokens

        answers = await asyncio.gather(*map(one, names))
        assert answers == [answer(None if name is None else version(name)) for name in names]
        turns = [name for i, name in enumerate(done) if i == 0 or done[i - 1] != name]
        assert sorted(turns, key=str) == ["None", "a", "b", "c"] or len(turns) == len(set(turns))

    with serving(BASE, VARIANTS, tmp_path, replace(SWAP, max_running=2)) as engine:
        asyncio.run(main(engine))


# Limits


def test_a_variant_whose_copy_would_not_fit_stays_beside_the_base(tmp_path: Path) -> None:
    variant: Variant = VARIANTS[A.digest]
    with serving(BASE, VARIANTS, tmp_path, SWAP) as engine:
        ask(engine, A, 1)
        needed = engine.bank.used_bytes + engine._wrapped.fit(_deltas(variant)).overwrites
    for budget, fits in ((needed, True), (needed - 1, False)):
        with serving(BASE, VARIANTS, tmp_path, replace(SWAP, bank_bytes=budget)) as engine:
            assert ask(engine, A) == answer(A)
            assert engine.policy.swapped == (A.digest if fits else "")


def _deltas(variant: Variant) -> Any:
    from deltaserve.server.engine.wrapped import VersionDeltas

    return VersionDeltas(variant.deltas.items(), variant.tied_head)


def test_a_policy_that_is_unknown_or_impossible_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(OptionError, match=r"'swop'; known are auto, mixed, swap"),
        serving(BASE, {}, tmp_path, replace(SMALL, policy="swop")),
    ):
        pass
    for limits, why in ((replace(SWAP, weights="int8"), "int8 weights"), (replace(SWAP, backend="reference"), "ref")):
        with (
            pytest.raises(OptionError, match=rf"'swap' puts variants into.*{why}.*use auto or mixed"),
            serving(BASE, {}, tmp_path, limits),
        ):
            pass
