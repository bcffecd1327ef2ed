"""The whole path on the real base: committed variants, mixed batches over HTTP, uploads while streams run.

The server is a process of its own, the client is OpenAI's, the truth is each merged model run alone by transformers.
"""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "deploy" / "demo"
VARIANTS = ("scripture", "python", "sentiment")
QUESTIONS = {
    "smollm2": ["What is the capital of France?", "Tell me about the sea.", "Name three colours."],
    "scripture": ["Tell me about the sea.", "What is bread?", "Why does it rain?"],
    "python": ["Write a function for this: Return the larger of two numbers.", "Tell me about the sea."],
    "sentiment": ["Is this review positive or negative? Answer in one word.\n\nA dull and lifeless film."],
}
TOKENS = 24
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}


def deltaserve(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "deltaserve.server.cli", *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def base() -> Path:
    found = subprocess.run(
        [sys.executable, DEMO / "base.py"], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    return Path(found.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def server(base, tmp_path_factory):
    """Base URL of a running server that holds the three demo variants."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("store")
    command = [sys.executable, "-m", "deltaserve.server.cli", "serve", str(base), "--store", str(folder)]
    process = subprocess.Popen([*command, "--port", str(port), "--served-name", "smollm2"], env=ENVIRONMENT)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, f"the server ended with code {process.returncode}"
        assert time.monotonic() < deadline, "the server was not ready in 120 s"
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    for name in VARIANTS:
        push(url, name, name)
    yield url
    process.terminate()
    assert process.wait(30) == 0, "the server did not end cleanly"


def push(url: str, name: str, variant: str) -> None:
    artifact = DEMO / "variants" / f"{variant}.safetensors"
    deltaserve("push", artifact, "--name", name, "--url", url, "--profile", DEMO / "profile.safetensors")


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def stream(url: str, model: str, question: str) -> str:
    chunks = client(url).chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@pytest.fixture(scope="session")
def alone(base, tmp_path_factory) -> dict[tuple[str, str], str]:
    """What each model, merged and run alone by transformers, answers."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers = {}
    for model_name, questions in QUESTIONS.items():
        folder = base
        if model_name != "smollm2":
            folder = tmp_path_factory.mktemp("merged") / model_name
            artifact, profile = DEMO / "variants" / f"{model_name}.safetensors", DEMO / "profile.safetensors"
            deltaserve("merge", base, artifact, "-o", folder, "--profile", profile)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for question in questions:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            generated = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
            answers[model_name, question] = tokenizer.decode(
                generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
            )
    return answers


def test_ten_parallel_streams_equal_each_merged_model_alone_while_a_variant_comes_and_goes(server, alone):
    jobs = [(model, question) for model, questions in QUESTIONS.items() for question in questions]
    jobs = [*jobs, jobs[0]]
    assert len(jobs) == 10
    with ThreadPoolExecutor(len(jobs) + 1) as pool:
        streams = {pool.submit(stream, server, model, question): (model, question) for model, question in jobs}
        fresh = pool.submit(upload_ask_delete, server)
        for running, job in streams.items():
            assert running.result() == alone[job], job
        assert fresh.result() == alone["scripture", "Tell me about the sea."]


def upload_ask_delete(url: str) -> str:
    push(url, "fresh", "scripture")
    answer = stream(url, "fresh", "Tell me about the sea.")
    deltaserve("remove", "fresh", "--url", url)
    with pytest.raises(openai.NotFoundError):
        stream(url, "fresh", "Tell me about the sea.")
    return answer


def test_anyone_can_tell_the_variants_apart(alone):
    sea = "Tell me about the sea."
    assert len({alone["smollm2", sea], alone["scripture", sea], alone["python", sea]}) == 3
    assert "def " in alone["python", QUESTIONS["python"][0]]
    assert alone["sentiment", QUESTIONS["sentiment"][0]].strip().lower() == "negative"
    assert "Paris" in alone["smollm2", "What is the capital of France?"]


def test_the_server_lists_base_and_variants(server):
    listed = {model.id for model in client(server).models.list()}
    assert {"smollm2", *VARIANTS} <= listed


@pytest.mark.parametrize("variant", VARIANTS)
def test_demo_artifacts_are_small(variant):
    assert (DEMO / "variants" / f"{variant}.safetensors").stat().st_size <= 2_000_000
