"""What an engine takes and refuses: admission, seeds, cancelling, replaced and removed versions."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from engine_variants import SMALL, alone, collect, greedy, random_prompts, serving, version
from lettered_variants import BASE, PROMPT, VARIANTS, answer, first, pages_in_use, until_quiet
from tiny_models import save
from transformers import MistralConfig, MistralForCausalLM

from deltaserve.delta_store.errors import (
    ContextTooLong,
    CorruptArtifact,
    QueueFull,
    RequestRefused,
    UnsupportedCheckpoint,
)
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.requests import Sampling, Version
from deltaserve.server.engine.wrapped import VersionDeltas

SEEDED = Sampling(max_tokens=32, temperature=0.8, seed=42, ignore_eos=True)


# Admission


def test_e_length_limits_are_exact(engine: Engine) -> None:
    async def main() -> None:
        context = engine.context_length
        stream = await engine.submit([1] * (context - 1), None, greedy(1))
        assert len([token async for token in stream]) == 1
        for length in (context, context + 1):
            with pytest.raises(ContextTooLong, match=f"holds {context} tokens; the prompt has {length}"):
                await engine.submit([1] * length, None, greedy(1))
        with pytest.raises(RequestRefused, match="empty"):
            await engine.submit([], None, greedy(1))

    asyncio.run(main())


@pytest.mark.parametrize("on", [None, version("a")], ids=["base", "variant"])
def test_e_parameters_out_of_bounds_do_not_disturb_a_running_stream(engine: Engine, on: Version | None) -> None:
    bad = [
        ([5, 64], greedy(3)),
        ([-1], greedy(3)),
        (PROMPT, replace(SEEDED, logit_bias={64: 1.0})),
        (PROMPT, replace(SEEDED, logit_bias={-1: 1.0})),
        (PROMPT, replace(SEEDED, temperature=float("nan"))),
        (PROMPT, replace(SEEDED, seed=2**70)),
    ]

    async def main() -> None:
        running = asyncio.create_task(collect(engine, PROMPT, None, greedy(60)))
        for prompt, sampling in bad:
            with pytest.raises(RequestRefused):
                await engine.submit(prompt, on, sampling)
        assert await running == answer(None, 60)
        assert await collect(engine, PROMPT, None, greedy(20)) == answer(None)

    asyncio.run(main())


def test_f_queue_without_end_is_refused(tmp_path: Path) -> None:
    async def main(engine: Engine) -> None:
        for _ in range(2):
            streams = [await engine.submit(PROMPT, None, greedy(20)) for _ in range(6)]
            with pytest.raises(QueueFull, match="6 requests"):
                await engine.submit(PROMPT, None, greedy(20))
            for stream in streams:
                assert [token.token_id async for token in stream] == answer(None)
        assert engine.requests == 0

    with serving(BASE, VARIANTS, tmp_path, replace(SMALL, max_running=2, max_waiting=4)) as engine:
        asyncio.run(main(engine))


def test_a_base_that_cannot_be_served_right_is_refused_by_name(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    save(MistralForCausalLM(config), tmp_path, vocab=64)
    with pytest.raises(UnsupportedCheckpoint, match=r"MistralForCausalLM.*sliding_window = 8"):
        Engine(tmp_path, limits=SMALL)


# Ends


def test_an_end_token_stops_and_is_not_delivered(engine: Engine) -> None:
    async def main() -> None:
        free = answer(None, 60)
        engine.stop_ids = frozenset({free[7]})
        stream = await engine.submit(PROMPT, None, Sampling(max_tokens=60, temperature=0))
        until_end = free[: free.index(free[7])]
        assert [token.token_id async for token in stream] == until_end
        assert stream.finished is not None
        assert (stream.finished.reason, stream.finished.completion_tokens) == ("stop", len(until_end))
        later = await engine.submit(PROMPT, None, Sampling(max_tokens=60, temperature=0, min_tokens=30))
        assert len([token async for token in later]) >= 30
        assert await collect(engine, PROMPT, None, greedy(60)) == free

    asyncio.run(main())


# Seeds


def test_d_seed_depends_on_neighbours_not(engine: Engine) -> None:
    async def main() -> None:
        alone = await collect(engine, PROMPT, version("a"), SEEDED)
        others = [
            (replace(SEEDED, seed=None), version("b")),
            (replace(SEEDED, seed=1, top_p=0.5), None),
            (greedy(9), None),
        ]
        crowd = [
            asyncio.create_task(collect(engine, prompt, on, sampling))
            for prompt in random_prompts(4, seed=1)
            for sampling, on in others
        ]
        await asyncio.sleep(0.02)
        twins = await asyncio.gather(*(collect(engine, PROMPT, version("a"), SEEDED) for _ in range(2)))
        unseeded = await asyncio.gather(
            *(collect(engine, PROMPT, version("a"), replace(SEEDED, seed=None)) for _ in range(2))
        )
        await asyncio.gather(*crowd)
        assert twins == [alone, alone]
        assert unseeded[0] != unseeded[1] != alone

    asyncio.run(main())


# Cancelling


@pytest.mark.parametrize("on", [None, version("a")], ids=["base", "variant"])
def test_f_client_gone_while_streaming(engine: Engine, on: Version | None) -> None:
    async def main() -> None:
        for _ in range(20):
            stream = await engine.submit(PROMPT, on, greedy(190))
            await first(stream)
            stream.cancel()
            stream.cancel()
            rest = [token async for token in stream]
            assert stream.finished is not None
            assert stream.finished.reason == "cancelled"
            assert len(rest) < 150
            await until_quiet(engine)
        assert pages_in_use(engine) == 0
        router = engine._batching.router
        assert (router.jobs, router.result_handlers, router.output_queue.qsize()) == ({}, {}, 0)

    asyncio.run(main())


def test_f_client_gone_while_waiting_for_a_slot_and_for_the_batch(tmp_path: Path) -> None:
    async def main(engine: Engine) -> None:
        running = await engine.submit(PROMPT, version("a"), greedy(190))
        waiting = asyncio.create_task(engine.submit(PROMPT, version("b"), greedy(5)))
        queued = await engine.submit(PROMPT, None, greedy(190))
        await first(running)
        waiting.cancel()
        queued.cancel()
        assert [token async for token in queued] == []
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert engine.requests == 1
        running.cancel()
        await until_quiet(engine)
        assert await collect(engine, PROMPT, version("c"), greedy(20)) == answer("c")

    with serving(BASE, VARIANTS, tmp_path, replace(SMALL, bank_slots=1, max_running=1)) as engine:
        asyncio.run(main(engine))


def test_f_client_gone_with_its_event_loop(engine: Engine) -> None:
    async def leave() -> None:
        await engine.submit(PROMPT, version("a"), greedy(190))

    asyncio.run(leave())
    asyncio.run(until_quiet(engine))
    assert asyncio.run(collect(engine, PROMPT, version("a"), greedy(20))) == answer("a")


def test_cancelling_lets_displaced_requests_in_again(tmp_path: Path) -> None:
    """The library lets them in when another request finishes; one that is cancelled does not count there."""

    async def main(engine: Engine) -> None:
        streams = [await engine.submit(PROMPT, None, greedy(120)) for _ in range(3)]
        for _ in range(60):
            await first(streams[0])
        for stream in streams[:2]:
            stream.cancel()
        async with asyncio.timeout(10):
            assert [token.token_id async for token in streams[2]] == answer(None, 120)

    with serving(BASE, VARIANTS, tmp_path, replace(SMALL, cache_tokens=160, context=150)) as engine:
        asyncio.run(main(engine))


# Versions


def test_d_more_variants_than_slots_all_finish(tmp_path: Path) -> None:
    async def main(engine: Engine) -> None:
        names = ["a", "b", "c", None] * 3
        answers = await asyncio.gather(
            *(collect(engine, PROMPT, None if name is None else version(name), greedy(20)) for name in names)
        )
        assert answers == [answer(name) for name in names]
        long = await engine.submit(PROMPT, version("a"), greedy(190))
        await first(long)
        waits = asyncio.create_task(collect(engine, PROMPT, version("b"), greedy(20)))
        assert await collect(engine, PROMPT, None, greedy(20)) == answer(None)
        assert await collect(engine, PROMPT, version("a"), greedy(20)) == answer("a")
        assert not waits.done()
        assert long.finished is None
        long.cancel()
        assert await waits == answer("b")

    with serving(BASE, VARIANTS, tmp_path, replace(SMALL, bank_slots=1)) as engine:
        asyncio.run(main(engine))


def test_d_same_name_new_weights_answer_like_a_fresh_server(engine: Engine) -> None:
    old, new = Version("v", version("a").digest, ""), Version("v", version("b").digest, "")
    longer = [*PROMPT * 10, 7]

    async def main() -> None:
        spanning = asyncio.create_task(collect(engine, longer, old, greedy(100)))
        await asyncio.sleep(0.03)
        for version_now, name in ((old, "a"), (new, "b"), (old, "a")):
            model = VARIANTS[version(name).digest].merged
            for prompt in (PROMPT * 10, longer):
                assert await collect(engine, prompt, version_now, greedy(12)) == alone(model, prompt, 12)
        assert await spanning == alone(VARIANTS[old.digest].merged, longer, 100)

    asyncio.run(main())


def test_d_remove_while_busy_finishes_what_runs_and_frees_the_memory(engine: Engine) -> None:
    async def main() -> None:
        running = [asyncio.create_task(collect(engine, PROMPT, version("a"), greedy(100))) for _ in range(4)]
        base = asyncio.create_task(collect(engine, PROMPT, None, greedy(100)))
        cancelled = await engine.submit(PROMPT, version("a"), greedy(100))
        await first(cancelled)
        engine.forget(version("a").digest)
        engine.forget(version("a").digest)
        cancelled.cancel()
        assert await asyncio.gather(*running) == [answer("a", 100)] * 4
        assert await base == answer(None, 100)
        await until_quiet(engine)
        assert engine.bank.used_bytes == 0
        assert await collect(engine, PROMPT, version("a"), greedy(20)) == answer("a")

    asyncio.run(main())


def test_a_damaged_artifact_fails_its_own_requests_before_the_first_token(tmp_path: Path) -> None:
    def load(wanted: Version) -> VersionDeltas:
        if wanted.variant == "bad":
            raise CorruptArtifact("artifact of 'bad' is damaged")
        good = VARIANTS[wanted.digest]
        return VersionDeltas(good.deltas.items(), good.tied_head)

    async def main(engine: Engine) -> None:
        running = asyncio.create_task(collect(engine, PROMPT, version("a"), greedy(60)))
        with pytest.raises(CorruptArtifact, match="'bad'"):
            await engine.submit(PROMPT, version("bad"), greedy(5))
        assert await running == answer("a", 60)
        assert engine.requests == 0

    with serving(BASE, VARIANTS, tmp_path, load=load) as engine:
        asyncio.run(main(engine))
