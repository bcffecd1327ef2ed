"""The unmodified openai client against the real engine, with a tiny random base and a variant of it."""

import asyncio
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from running_server import Running, artifact, running, wait_until
from tiny_models import save, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltaserve.delta_store.codec.artifact import open_artifact

CHANGED = "model.layers.0.mlp.down_proj.weight"
VOCABULARY = 260
PROMPT = "The sea is "
TOKENS = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> dict[str, PreTrainedModel]:
    """What each name must answer like: the base, and the variant merged."""
    folder = save(tiny_llama(vocab=VOCABULARY), tmp_path_factory.mktemp("base") / "base", vocab=VOCABULARY)
    file = artifact(folder, folder.parent / "noisy.safetensors", seed=3)
    base, merged = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    delta = open_artifact(file).delta(CHANGED).parts[0].values.data
    with torch.no_grad():
        merged.get_parameter(CHANGED).add_(delta.view(merged.get_parameter(CHANGED).shape))
    return {"base": base, "noisy": merged}


@pytest.fixture(scope="module")
def server(models: Any, tmp_path_factory: Any) -> Iterator[Running]:
    folder = Path(models["base"].config._name_or_path)
    with running(folder, tmp_path_factory.mktemp("store"), max_running=4, max_waiting=4) as server:
        artifact_bytes = (folder.parent / "noisy.safetensors").read_bytes()
        server.http.put("/v1/variants/noisy", content=artifact_bytes).raise_for_status()
        yield server


@pytest.fixture
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def greedy(model: PreTrainedModel, prompt: str) -> str:
    """What transformers itself answers."""
    tokenizer = tiny_tokenizer(VOCABULARY)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["base", "noisy"])
def test_greedy_answers_equal_transformers_whole_and_streamed(client: OpenAI, models: Any, name: str) -> None:
    ask: Any = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    whole = client.completions.create(**ask)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True))
    assert whole.choices[0].text == streamed
    # transformers shows an unfinished character at the end, which we drop
    assert whole.choices[0].text.rstrip("\ufffd") == greedy(models[name], PROMPT).rstrip("\ufffd")
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(PROMPT)


def test_base_and_variant_answer_differently_side_by_side(server: Running, models: Any) -> None:
    async def one(client: AsyncOpenAI, name: str) -> str:
        stream = await client.completions.create(
            model=name, prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, name) for name in ("base", "noisy") * 4))

    base, noisy, *others = asyncio.run(together())
    assert base != noisy
    assert others == [base, noisy] * 3


def test_seeds_repeat_and_choices_differ(client: OpenAI) -> None:
    def ask(**fields: Any) -> list[str]:
        answer = client.completions.create(model="noisy", prompt=PROMPT, max_tokens=TOKENS, **fields)
        return [choice.text for choice in answer.choices]

    first, second = ask(seed=7, n=2)
    assert first != second
    assert ask(seed=7, n=2) == [first, second]
    assert ask(seed=7) == [first]
    for seed in (-(2**63), -1, 0, 2**63 - 1):
        assert ask(seed=seed) == ask(seed=seed)


@pytest.mark.parametrize("temperature", [0, 1])
def test_logprobs_are_the_model_s_own(client: OpenAI, models: Any, temperature: float) -> None:
    answer = client.completions.create(
        model="noisy", prompt=PROMPT, max_tokens=1, temperature=temperature, logprobs=5, seed=1
    )
    found = answer.choices[0].logprobs
    ids = tiny_tokenizer(VOCABULARY)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = models["noisy"](ids).logits[0, -1].log_softmax(-1)
    assert found is not None
    assert found.top_logprobs is not None
    assert found.token_logprobs is not None
    values = sorted(found.top_logprobs[0].values(), reverse=True)[:5]
    assert values == pytest.approx(expected.topk(5).values.tolist(), abs=1e-4)
    assert found.token_logprobs[0] <= 0
    assert any(abs(value - found.token_logprobs[0]) < 1e-4 for value in expected.tolist())


def test_e_parameters_out_of_bounds_filtered_logprobs_are_strict_json(server: Running) -> None:
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 4,
        "logprobs": True,
        "top_logprobs": 20,
        "top_k": 1,
        "logit_bias": {str(token): -100 for token in range(200)},
    }
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in the answer")

    content = json.loads(answer.text, parse_constant=refuse)["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    assert all(math.isfinite(top["logprob"]) for entry in content for top in entry["top_logprobs"])


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e-30},
        {"temperature": 2, "top_p": 1e-9, "min_p": 1},
        {"repetition_penalty": 10, "presence_penalty": -2, "frequency_penalty": 2},
        {"repetition_penalty": 0.1, "top_k": VOCABULARY},
        {"logit_bias": {str(token): 100 for token in range(VOCABULARY)}},
        {"min_tokens": 8, "max_tokens": 8, "ignore_eos": True},
    ],
)
def test_e_parameters_out_of_bounds_the_bounds_themselves_work(client: OpenAI, fields: dict[str, Any]) -> None:
    ask: dict[str, Any] = {"model": "noisy", "prompt": PROMPT, "max_tokens": 8}
    standard = {name: fields.pop(name) for name in ("temperature", "top_p", "max_tokens") if name in fields}
    answer = client.completions.create(**ask | standard, extra_body=fields)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_e_length_limits(client: OpenAI) -> None:
    answer = client.completions.create(model="base", prompt=[5] * 255, max_tokens=100, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (1, "length")
    with pytest.raises(openai.BadRequestError) as failure:
        client.completions.create(model="noisy", prompt=[5] * 256)
    assert failure.value.code == "context_length_exceeded"


def test_f_client_gone(server: Running) -> None:
    """Streaming and not, with n: every request of theirs ends within a moment, and the places are free again."""
    engine = server.app.state.engine
    body = {"model": "noisy", "prompt": PROMPT, "max_tokens": 200, "n": 2, "ignore_eos": True}
    for stream in (True, False):
        for _ in range(5):
            with httpx.Client(base_url=server.url) as http:
                if stream:
                    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                        lines = answer.iter_lines()
                        next(lines)
                else:
                    with pytest.raises(httpx.ReadTimeout):
                        http.post("/v1/completions", json=body, timeout=0.02)
            wait_until(lambda: engine.requests == 0, 2)
    assert set(engine.bank.holders.values()) <= {0}
    wait_until(lambda: engine.state().cache_used == 0)


def test_f_client_gone_while_its_variant_waits_for_a_slot(models: Any, tmp_path: Path) -> None:
    """It is counted as cancelled, although no batch has seen it."""
    folder = Path(models["base"].config._name_or_path)
    body = {"prompt": PROMPT, "max_tokens": 240, "ignore_eos": True, "stream": True}
    with running(folder, tmp_path / "store", bank_slots=1) as server:
        for seed, name in enumerate("ab"):
            file = artifact(folder, tmp_path / name, seed=seed)
            server.http.put(f"/v1/variants/{name}", content=file.read_bytes()).raise_for_status()
        engine = server.app.state.engine
        engine._batching.reports.generated = lambda *_: time.sleep(0.02)  # so that an answer lasts for 5 s
        with server.http.stream("POST", "/v1/completions", json=body | {"model": "a"}) as answer:
            lines = answer.iter_lines()
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/completions", json=body | {"model": "b"}, timeout=0.5)
            wait_until(lambda: engine.bank.waiting == 0)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        ended = server.app.state.metrics.ended
        counts = {how: int(ended.labels("b", how)._value.get()) for how in ("abort", "error", "stop", "length")}
        assert counts == {"abort": 1, "error": 0, "stop": 0, "length": 0}


def test_f_queue_without_end(server: Running, client: OpenAI) -> None:
    """8 places: of 40 at once some are told to come back, those accepted are whole, and then there is room again."""

    def send(_: int) -> str:
        try:
            answer = client.completions.create(
                model="noisy", prompt=PROMPT, max_tokens=100, temperature=0, extra_body={"ignore_eos": True}
            )
        except openai.RateLimitError as error:
            return f"refused, again in {error.response.headers['retry-after']} s"
        return answer.choices[0].text

    with ThreadPoolExecutor(40) as pool:
        texts = list(pool.map(send, range(40)))
    refused = "refused, again in 1 s"
    assert len(set(texts)) == 2
    assert texts.count(refused) > 0
    assert send(0) in set(texts) - {refused}
    wait_until(lambda: server.app.state.engine.requests == 0)
