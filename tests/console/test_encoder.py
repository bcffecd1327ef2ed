"""The console of a server whose base is an encoder: what it asks, and what it tells of rates and latencies."""

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect
from running_server import Running, running, wait_until
from tiny_encoders import classifier_of, save_encoder, tiny_encoder

from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.errors import GenerationFailed


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("encoder")
    encoder = tiny_encoder()
    base = save_encoder(encoder, folder / "base")
    compress(base, save_encoder(classifier_of(encoder), folder / "fine"), folder / "artifact", method="lossless")
    with running(base, folder / "store") as server:
        for name in ("mood", "quiet"):
            server.http.put(f"/v1/variants/{name}", content=(folder / "artifact").read_bytes()).raise_for_status()
        yield server


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_page() as page:
        yield page


def test_a_text_is_classified_and_a_model_without_a_head_says_so(server: Running, page: Page) -> None:
    page.goto(f"{server.url}/console/#/playground?models=base,mood")
    page.get_by_label("Text").fill("a good thing")
    page.get_by_role("button", name="Classify").click()
    page.get_by_text("Not all could answer.").wait_for()
    said = server.http.post("/v1/classify", json={"model": "mood", "input": "a good thing"}).json()["data"][0]
    expect(page.get_by_role("article", name="Answer of mood")).to_contain_text(said["label"])
    expect(page.get_by_role("article", name="Answer of base")).to_contain_text("no classification head")


def test_rate_and_latency_follow_requests(server: Running, page: Page) -> None:
    page.goto(f"{server.url}/console/#/variants")
    page.get_by_role("link", name="mood", exact=True).wait_for()
    for _ in range(3):
        server.http.post("/v1/classify", json={"model": "mood", "input": "a good thing"}).raise_for_status()
    cells = page.get_by_role("row").filter(has=page.get_by_role("link", name="mood", exact=True))
    some = re.compile(r"^(?!0$)(\d+|\d\.\d)$")
    expect(cells.locator("[data-label='Req/min']")).to_have_text(some)
    expect(cells.locator("[data-label='Tokens/s']")).to_have_text(some)
    expect(cells.locator("[data-label='Answer']")).to_have_text(re.compile(r"^\d+ ms$|^\d\.\d s$"))
    quiet = page.get_by_role("row").filter(has=page.get_by_role("link", name="quiet", exact=True))
    expect(quiet.locator("[data-label='Req/min']")).to_have_text("0")
    expect(quiet.locator("[data-label='Answer']")).to_have_text("–")
    page.get_by_label("Show").select_option("Asked in the last minute")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.get_by_role("link", name="mood", exact=True).click()
    expect(page.get_by_text(re.compile(r"tokens/s, answered after \d+ ms"))).to_be_visible()


def ended(server: Running) -> Counter[str]:
    """Requests to the base by how they ended."""
    metrics = server.http.get("/metrics").text
    found = re.findall(r'vllm:request_success_total\{finished_reason="(\w+)",model_name="base"\} (\S+)', metrics)
    return Counter({reason: int(float(count)) for reason, count in found})


def test_figures_count_answers_and_no_refusals(server: Running) -> None:
    def counted() -> dict[str, float]:
        return server.http.get("/v1/console").json()["counts"].get("base", {"requests": 0, "prompt_tokens": 0})

    before, ended_before = counted(), ended(server)
    body = {"model": "base", "input": ["a good thing", "bad"]}
    tokens = server.http.post("/v1/embeddings", json=body).raise_for_status().json()["usage"]["prompt_tokens"]
    assert server.http.post("/v1/embeddings", json=body | {"dimensions": 7}).status_code == 400
    after = counted()
    assert after["requests"] - before["requests"] == 1
    assert after["prompt_tokens"] - before["prompt_tokens"] == tokens
    assert (after["tokens"], after["first_tokens"], after["in_flight"]) == (0, 0, 0)
    assert after["request_s"] > 0
    assert ended(server) - ended_before == {"stop": 1}


def test_what_failed_and_who_left_are_counted_apart(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise GenerationFailed("broken")

    async def hang(*_: object) -> None:
        await asyncio.sleep(60)

    before, body = ended(server), {"model": "base", "input": "a good thing"}
    monkeypatch.setattr(server.app.state.engine, "embed", fail)
    assert server.http.post("/v1/embeddings", json=body).status_code == 500
    monkeypatch.setattr(server.app.state.engine, "embed", hang)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=0.5)
    wait_until(lambda: ended(server) - before == {"error": 1, "abort": 1})
