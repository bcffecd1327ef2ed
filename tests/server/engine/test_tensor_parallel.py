"""A base on two processes, with gloo: every request gets, token for token, what its merged model says alone."""

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import torch
from engine_variants import SMALL, alone, collect, greedy, random_prompts
from running_server import serving
from tiny_models import fine_tuned, save, tiny_gpt2, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.errors import ArtifactError, EngineDown, GenerationFailed, OptionError
from deltaserve.delta_store.merge import merge
from deltaserve.delta_store.pruning.options import Value
from deltaserve.server.engine.encoder import EncoderEngine
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.requests import Version

TWO = replace(SMALL, tensor_parallel=2, threads=1, bank_slots=3, cache_tokens=4096, context=2000)
NEW_TOKENS = 12


@dataclass(frozen=True)
class Variant:
    """An artifact, and the model that it stands for."""

    version: Version
    merged: PreTrainedModel


def tiny_qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    """Four heads, two key heads, biases of query, key and value, a head of its own."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.1,
        eos_token_id=0,
    )
    return Qwen2ForCausalLM(config).eval()


def variant(base: PreTrainedModel, folder: Path, name: str, seed: int, method: str, **options: Value) -> Variant:
    """A fine-tune in which every parameter changed: also norms, biases, embeddings and head."""
    fine = save(fine_tuned(base, seed, scale=0.2), folder / f"{name} fine", vocab=64)
    artifact, text, profile = folder / f"{name}.safetensors", folder / "text.jsonl", folder / "profile.safetensors"
    text.write_text('{"prompt": "what the base", "answer": " is run over"}\n' * 8)
    weighs = {"calibration": text, "profile": profile} if method == "weighted" else {}
    receipt = compress(folder / "base", fine, artifact, method=method, options=options, **weighs)
    merged = merge(folder / "base", artifact, folder / f"{name} merged", profile_file=weighs.get("profile")).folder
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    return Variant(Version(name, receipt.digest, str(artifact)), model)


@contextmanager
def engine_of(folder: Path, limits: EngineLimits = TWO) -> Iterator[Engine]:
    engine = Engine(folder / "base", limits=limits, profile_path=lambda digest: folder / "profile.safetensors")
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def worker_of(engine: Engine) -> int:
    """The id of process 1."""
    (process, _), *_ = engine._team._members.values()
    return process.pid


async def answers(
    engine: Engine, prompts: Sequence[Sequence[int]], owners: Sequence[Variant | None], count: int = NEW_TOKENS
) -> list[list[int]]:
    """All at once: mixed batches."""
    return await asyncio.gather(
        *(
            collect(engine, prompt, None if owner is None else owner.version, greedy(count))
            for prompt, owner in zip(prompts, owners, strict=True)
        )
    )


def expected(
    base: PreTrainedModel, prompts: Sequence[Sequence[int]], owners: Sequence[Variant | None], count: int = NEW_TOKENS
) -> list[list[int]]:
    return [
        alone(base if owner is None else owner.merged, prompt, count)
        for prompt, owner in zip(prompts, owners, strict=True)
    ]


@dataclass(frozen=True)
class Llama:
    base: PreTrainedModel
    folder: Path
    engine: Engine


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    folder = tmp_path_factory.mktemp("llama")
    base = tiny_llama(attention_bias=True, context=2048)
    save(base, folder / "base", vocab=64)
    with engine_of(folder) as engine:
        yield Llama(base, folder, engine)


@pytest.fixture(scope="module")
def sparse(llama: Llama) -> Variant:
    """Blocks of 16 rows, of which a process has half where keys and values are; int2, which has no zero; a profile."""
    return variant(llama.base, llama.folder, "sparse", 1, "weighted", drop=0.5, block=16, codec="int2")


@pytest.fixture(scope="module")
def low_rank(llama: Llama) -> Variant:
    return variant(llama.base, llama.folder, "low-rank", 2, "low-rank", linear_rank=4)


def test_a_mixed_batch_of_base_and_variants(llama: Llama, sparse: Variant, low_rank: Variant) -> None:
    prompts = random_prompts(9, seed=3)
    owners = [None, sparse, low_rank] * 3
    wanted = expected(llama.base, prompts, owners)
    assert asyncio.run(answers(llama.engine, prompts, owners)) == wanted
    assert wanted != expected(llama.base, prompts, [None] * 9)


def test_versions_are_loaded_replaced_and_unloaded_while_requests_run(
    llama: Llama, sparse: Variant, low_rank: Variant
) -> None:
    """The successor of ``sparse`` comes while a request of it runs."""
    engine, prompt = llama.engine, random_prompts(1, seed=4)[0]
    successor = variant(llama.base, llama.folder, "successor", 3, "dense", codec="int4")
    renamed = Variant(replace(successor.version, variant="sparse"), successor.merged)

    async def run() -> list[list[int]]:
        stream = await engine.submit(prompt, sparse.version, greedy(200))
        await anext(stream)
        found = await answers(engine, [prompt] * 3, [renamed, low_rank, None])
        assert set(engine.bank.holders) == {one.version.digest for one in (sparse, renamed, low_rank)}
        assert engine.bank.holders[sparse.version.digest] == 1
        engine.forget(sparse.version.digest)
        old = [token.token_id async for token in stream]
        engine.forget(low_rank.version.digest)
        assert set(engine.bank.holders) == {renamed.version.digest}
        again = await answers(engine, [prompt] * 2, [low_rank, sparse])
        return [*found, old, *again]

    wanted = expected(llama.base, [prompt] * 3, [renamed, low_rank, None])
    wanted.append(alone(sparse.merged, prompt, 200)[1:])
    wanted += expected(llama.base, [prompt] * 2, [low_rank, sparse])
    assert asyncio.run(run()) == wanted


def test_a_version_that_cannot_be_loaded_fails_alone(llama: Llama, low_rank: Variant) -> None:
    """Also where only the other process finds that out: its file has gone between the two."""
    prompt = random_prompts(1, seed=5)[0]
    broken = llama.folder / "broken.safetensors"
    broken.write_bytes(Path(low_rank.version.path).read_bytes()[:-9])
    for path, message in ((broken, "broken.safetensors"), (llama.folder / "none", "is not at")):
        with pytest.raises(ArtifactError, match=message):
            asyncio.run(collect(llama.engine, prompt, Version("broken", "0" * 64, str(path)), greedy(1)))
    assert asyncio.run(answers(llama.engine, [prompt], [low_rank])) == expected(llama.base, [prompt], [low_rank])


def test_an_artifact_is_checked_whole(llama: Llama, sparse: Variant) -> None:
    assert llama.engine.check_fits(open_artifact(Path(sparse.version.path))).applied > 20


def test_when_a_process_dies_requests_are_told_and_nothing_hangs(llama: Llama, sparse: Variant) -> None:
    """The last test of this engine."""
    engine = llama.engine

    async def run() -> None:
        stream = await engine.submit([5, 9], sparse.version, greedy(1900))
        await anext(stream)
        os.kill(worker_of(engine), signal.SIGKILL)
        with pytest.raises(GenerationFailed, match="Process 1 of 2 was ended by SIGKILL"):
            async for _ in stream:
                pass
        with pytest.raises(EngineDown, match="Process 1 of 2 was ended by SIGKILL"):
            await engine.submit([5, 9], None, greedy(1))

    asyncio.run(asyncio.wait_for(run(), 30))
    assert engine.ended == engine.lost == engine.failure == "Process 1 of 2 was ended by SIGKILL"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel": 3}, "which must divide each of: 4 attention heads, 2 key-value heads, .* can be 1, 2"),
        ({"policy": "swap"}, "Policy 'swap' is not supported with tensor_parallel 2"),
        ({"weights": "int8"}, "Weights 'int8' are not supported with tensor_parallel 2"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    save(tiny_llama(), tmp_path, vocab=64)
    with pytest.raises(OptionError, match=message):
        Engine(tmp_path, limits=replace(TWO, **changes))


def test_a_family_without_a_plan_is_refused(tmp_path: Path) -> None:
    save(tiny_gpt2(), tmp_path, vocab=64)
    with pytest.raises(OptionError, match="no plan for sharing out gpt2 models; use 1"):
        Engine(tmp_path, limits=TWO)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Encoders run in one process; use tensor_parallel 1"):
        EncoderEngine(tmp_path, limits=TWO)


def test_over_http_until_a_process_dies(tmp_path: Path) -> None:
    """A server on two processes answers; when one dies it says so, and ends by itself with status 1."""
    base = tiny_qwen2()
    save(base, tmp_path / "base", vocab=64)
    models = {"base": base}
    prompt = random_prompts(1, seed=7)[0]
    asked = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    with (
        serving(tmp_path / "base", tmp_path / "store", "--tensor-parallel", "2") as (url, process),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        for seed, (method, options) in enumerate((("lossless", {}), ("structural", {"drop": 0.5})), start=1):
            made = variant(base, tmp_path, method, seed, method, **options)
            sent = http.put(f"/v1/variants/{method}", content=Path(made.version.path).read_bytes())
            assert sent.is_success, sent.text
            models[method] = made.merged
        for name, model in models.items():
            answer = http.post("/v1/completions", json=asked | {"model": name}).json()
            wanted = tiny_tokenizer().convert_ids_to_tokens(alone(model, prompt, 8))
            assert answer["choices"][0]["logprobs"]["tokens"] == wanted
        (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        long = asked | {"model": "lossless", "max_tokens": 1900, "stream": True}
        with http.stream("POST", "/v1/completions", json=long) as running:
            lines = (line for line in running.iter_lines() if line)
            next(lines)
            os.kill(int(worker), signal.SIGKILL)
            assert "Process 1 of 2 was ended by SIGKILL" in list(lines)[-1]
        health = http.get("/health")
        assert health.status_code == 503
        assert "Process 1 of 2 was ended by SIGKILL" in health.json()["error"]["message"]
        assert process.wait(30) == 1
