"""Texts of many variants in one batch: each gets what its merged model, run alone by plain transformers, gives."""

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import (
    FAMILIES,
    classified_alone,
    classifier_of,
    embedded_alone,
    random_deltas,
    random_texts,
    save_encoder,
    tiny_encoder,
)
from transformers import BertForMaskedLM, BertForSequenceClassification, PreTrainedModel

from deltaserve.delta_store.architecture import open_architecture
from deltaserve.delta_store.errors import (
    ContextTooLong,
    EngineDown,
    GenerationFailed,
    OptionError,
    QueueFull,
    RequestRefused,
)
from deltaserve.kernels.codes import float_codes
from deltaserve.kernels.parts import Delta, Rows
from deltaserve.server.engine.encoder import EncoderEngine
from deltaserve.server.engine.encoder_model import EncoderDeltas
from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.requests import Version

SMALL = EngineLimits(bank_slots=4, batch_tokens=64, max_running=4, max_waiting=60)
FLAT = {"bert", "roberta", "distilbert"}


class Served:
    """An engine of ``base`` with its variants, and the models that they stand for, by name (empty for the base)."""

    def __init__(self, base: PreTrainedModel, fines: Mapping[str, PreTrainedModel], folder: Path, limits=SMALL) -> None:
        self.models: dict[str, PreTrainedModel] = {"": base}
        self.deltas: dict[str, EncoderDeltas] = {}
        for seed, (name, fine) in enumerate(fines.items()):
            deltas, self.models[name] = random_deltas(fine, base, seed)
            architecture = open_architecture(save_encoder(fine, folder / name))
            self.deltas[name] = EncoderDeltas(list(deltas.items()), architecture)
        self.engine = EncoderEngine(
            save_encoder(base, folder / "base"), limits=limits, load=lambda version: self.deltas[version.variant]
        )

    def version(self, name: str) -> Version | None:
        return Version(name, f"digest of {name}", "") if name else None

    async def embed(self, name: str, texts: list[list[int]]) -> list[torch.Tensor]:
        return await self.engine.embed(texts, self.version(name))

    async def classify(self, name: str, texts: list[list[int]]) -> list[torch.Tensor]:
        return (await self.engine.classify(texts, self.version(name)))[1]


@pytest.fixture(params=FAMILIES)
def served(request: Any, tmp_path: Path) -> Any:
    base = tiny_encoder(request.param)
    fines = {
        "three": classifier_of(base, 1),
        "two": classifier_of(base, 2, labels={0: "no", 1: "yes"}),
        "body": tiny_encoder(request.param, 3),
    }
    served = Served(base, fines, tmp_path)
    served.engine.start()
    yield served
    assert served.engine.requests == 0
    served.engine.stop()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_mixed_batches_equal_merged_models_alone(served: Served) -> None:
    assert served.engine.model.form.flat == (served.models[""].config.model_type in FLAT)
    asked = [(name, random_texts(5, seed)) for seed, name in enumerate(["", "three", "two", "body"] * 2)]

    async def together() -> Any:
        embedding = [served.embed(name, texts) for name, texts in asked]
        classifying = [served.classify(name, texts) for name, texts in asked if name in ("two", "three")]
        return await asyncio.gather(*embedding, *classifying)

    results = iter(asyncio.run(together()))
    for name, texts in asked:
        for vector, text in zip(next(results), texts, strict=True):
            close(vector, embedded_alone(served.models[name], text))
    for name, texts in asked:
        if name in ("two", "three"):
            for scores, text in zip(next(results), texts, strict=True):
                close(scores, classified_alone(served.models[name], text))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: Any) -> Any:
    base = tiny_encoder()
    served = Served(base, {"a": classifier_of(base, 1), "b": classifier_of(base, 2)}, tmp_path_factory.mktemp("bert"))
    served.engine.start()
    yield served
    served.engine.stop()


@pytest.fixture(autouse=True)
def _nothing_is_left(request: Any) -> Any:
    yield
    if "bert" in request.fixturenames:
        engine = request.getfixturevalue("bert").engine
        assert engine.requests == 0
        assert set(engine.bank.holders.values()) <= {0}


class Gate:
    """Holds the engine's thread before a batch of which ``stops`` is true, until ``open``."""

    def __init__(self, engine: EncoderEngine, monkeypatch: Any, stops: Any = lambda batch: True) -> None:
        run = engine._batches._run_batch
        self.open, self.reached = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []

        def held(batch: Any) -> Any:
            self.batches.append([text.work.variant for text in batch])
            if stops(batch):
                self.reached.set()
                assert self.open.wait(30)
            return run(batch)

        monkeypatch.setattr(engine._batches, "_run_batch", held)


def test_a_cold_variant_does_not_stall_others(bert: Served, monkeypatch: Any) -> None:
    opened = threading.Event()
    deltas = bert.deltas["b"]

    class Slow(dict):
        def __getitem__(self, name: str) -> EncoderDeltas:
            assert opened.wait(30)
            return deltas

    text = random_texts(1, 5)

    async def ask() -> None:
        await bert.embed("a", text)
        bert.engine.forget("digest of b")
        bert.deltas = Slow()
        cold = asyncio.create_task(bert.embed("b", text))
        await asyncio.sleep(0)
        for name in ("", "a"):
            close((await bert.embed(name, text))[0], embedded_alone(bert.models[name], text[0]))
        assert not cold.done()
        opened.set()
        close((await cold)[0], embedded_alone(bert.models["b"], text[0]))

    kept = bert.deltas
    try:
        asyncio.run(ask())
    finally:
        bert.deltas = kept


def test_requests_take_turns(bert: Served, monkeypatch: Any) -> None:
    """A request of many texts does not keep one of a single text waiting until it is done."""
    gate = Gate(bert.engine, monkeypatch)

    async def ask() -> None:
        many = asyncio.create_task(bert.embed("", [[5] * 30] * 40))
        await asyncio.to_thread(gate.reached.wait)
        one = asyncio.create_task(bert.embed("a", [[6] * 30]))
        while len(bert.engine._batches._waiting) < 2:
            await asyncio.sleep(0.001)
        gate.open.set()
        await asyncio.gather(many, one)

    asyncio.run(ask())
    assert "a" in gate.batches[1]
    assert len(gate.batches) == 21


def test_a_cancelled_request_leaves(bert: Served, monkeypatch: Any) -> None:
    gate = Gate(bert.engine, monkeypatch)

    async def ask() -> None:
        leaving = asyncio.create_task(bert.embed("a", [[5] * 30] * 40))
        await asyncio.to_thread(gate.reached.wait)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert bert.engine.bank.holders["digest of a"] == 1  # a batch has rows of it
        gate.open.set()
        await bert.embed("", [[5]])
        await bert.embed("", [[5]])

    asyncio.run(ask())
    assert [batch for batch in gate.batches if "a" in batch] == [["a", "a"]]


def test_a_request_that_fails_fails_alone(bert: Served, monkeypatch: Any) -> None:
    gate = Gate(bert.engine, monkeypatch, lambda batch: len(gate.batches) == 1)
    run = bert.engine.model.run

    def breaks(texts: Any, slots: Any, whole: Any) -> Any:
        if [7, 7, 7] in [list(text) for text in texts]:
            raise RuntimeError("out of memory")
        return run(texts, slots, whole)

    monkeypatch.setattr(bert.engine.model, "run", breaks)

    async def ask() -> list[Any]:
        first = asyncio.create_task(bert.embed("", [[5]]))
        await asyncio.to_thread(gate.reached.wait)
        others = [asyncio.create_task(bert.embed(*asked)) for asked in (("a", [[7, 7, 7]]), ("a", [[8]]), ("", [[9]]))]
        while len(bert.engine._batches._waiting) < 3:
            await asyncio.sleep(0.001)
        gate.open.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    first, broken, *sound = asyncio.run(ask())
    assert isinstance(broken, GenerationFailed)
    assert "out of memory" in str(broken)
    for (name, text), found in zip([("", [5]), ("a", [8]), ("", [9])], [first, *sound], strict=True):
        close(found[0], embedded_alone(bert.models[name], text))
    assert bert.engine.ready()


def test_numbers_that_are_not_finite_are_a_failure(bert: Served, monkeypatch: Any) -> None:
    run = bert.engine.model.run

    def spoilt(texts: Any, slots: Any, whole: Any) -> Any:
        hidden = run(texts, slots, whole)
        return replace(hidden, rows=hidden.rows * torch.nan)

    monkeypatch.setattr(bert.engine.model, "run", spoilt)
    with pytest.raises(GenerationFailed, match="not finite"):
        asyncio.run(bert.embed("", [[5], [6]]))


def test_a_model_that_does_not_work_at_all_is_told_to_health(tmp_path: Path, monkeypatch: Any) -> None:
    served = Served(tiny_encoder(), {}, tmp_path)
    served.engine.start()

    def dead(*_: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(served.engine.model, "run", dead)
    for _ in range(3):
        assert served.engine.ready()
        with pytest.raises(GenerationFailed, match="the device is gone"):
            asyncio.run(served.embed("", [[5]]))
    served.engine._batches._thread.join(30)
    assert not served.engine.ready()
    assert "the device is gone" in str(served.engine.failure)
    assert served.engine.lost == served.engine.failure
    with pytest.raises(EngineDown, match="the device is gone"):
        asyncio.run(served.embed("", [[5]]))
    served.engine.stop()


@pytest.mark.parametrize(
    ("texts", "error", "told"),
    [
        ([[5], []], RequestRefused, "A text of 'input' is empty"),
        ([[5] * 41], ContextTooLong, "reads 40 tokens; a text of 'input' has 41"),
        ([[5, 64]], RequestRefused, "token ids from 0 to 63; got 64"),
        ([[-1]], RequestRefused, "token ids from 0 to 63; got -1"),
    ],
)
@pytest.mark.parametrize("name", ["", "a"])
def test_what_cannot_be_read_is_refused(bert: Served, name: str, texts: Any, error: type, told: str) -> None:
    with pytest.raises(error, match=told):
        asyncio.run(bert.embed(name, texts))


def test_a_model_without_a_head_does_not_classify(bert: Served) -> None:
    with pytest.raises(RequestRefused, match="no classification head"):
        asyncio.run(bert.classify("", [[5]]))


def test_a_full_queue_refuses(bert: Served, monkeypatch: Any) -> None:
    gate = Gate(bert.engine, monkeypatch)

    async def ask() -> None:
        tasks = [asyncio.create_task(bert.embed("", [[5]])) for _ in range(64)]
        await asyncio.to_thread(gate.reached.wait)
        with pytest.raises(QueueFull, match="64 requests"):
            await bert.embed("", [[5]])
        gate.open.set()
        await asyncio.gather(*tasks)

    asyncio.run(ask())


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
def test_a_base_with_a_head_of_its_own(tmp_path: Path, kind: Any) -> None:
    """A masked language model has no pooler: the variant brings its own. A classifier's labels may be others."""
    torch.manual_seed(0)
    base = kind(FAMILIES["bert"]).eval()
    served = Served(
        base, {"three": classifier_of(base, 1), "two": classifier_of(base, 2, labels={0: "n", 1: "y"})}, tmp_path
    )
    served.engine.start()
    texts = random_texts(4, 1)

    async def ask() -> Any:
        names = ["three", "two"] + [""] * (kind is BertForSequenceClassification)
        return names, await asyncio.gather(*(served.classify(name, texts) for name in names))

    names, results = asyncio.run(ask())
    for name, found in zip(names, results, strict=True):
        for scores, text in zip(found, texts, strict=True):
            close(scores, classified_alone(served.models[name], text))
    served.engine.stop()


def test_added_vocabulary(tmp_path: Path) -> None:
    base = tiny_encoder()
    served = Served(base, {"a": classifier_of(base)}, tmp_path)
    own = base.get_input_embeddings().weight.detach()
    added = torch.randn(4, own.shape[1])
    values = torch.cat([torch.zeros_like(own), added])
    name = "embeddings.word_embeddings.weight"
    deltas = dict(served.deltas["a"].deltas)
    part = Rows(tuple(values.shape), torch.arange(64, 68), float_codes(added), None, 64)
    deltas[name] = Delta(tuple(values.shape), (part,))
    served.deltas["a"] = EncoderDeltas(list(deltas.items()), served.deltas["a"].architecture)
    merged = served.models["a"]
    merged.resize_token_embeddings(68)
    merged.get_input_embeddings().weight.data = torch.cat([own, added])
    served.engine.start()
    text = [5, 66, 7, 64, 67]
    close(asyncio.run(served.embed("a", [text]))[0], embedded_alone(merged, text))
    with pytest.raises(RequestRefused, match="from 0 to 63"):
        asyncio.run(served.embed("", [text]))
    served.engine.stop()


@pytest.mark.parametrize(("weights", "tolerance"), [("packed", 1e-4), ("int8", 0.2)])
def test_other_kinds_of_weights(tmp_path: Path, weights: str, tolerance: float) -> None:
    base = tiny_encoder()
    served = Served(base, {"a": classifier_of(base)}, tmp_path, limits=replace(SMALL, weights=weights))
    served.engine.start()
    text = random_texts(1, 3)
    for name in ("", "a"):
        found = asyncio.run(served.embed(name, text))[0]
        torch.testing.assert_close(found, embedded_alone(served.models[name], text[0]), rtol=0, atol=tolerance)
    served.engine.stop()


def test_swap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="use policy auto or mixed"):
        Served(tiny_encoder(), {}, tmp_path, limits=replace(SMALL, policy="swap"))
