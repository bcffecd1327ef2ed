"""Uploads through the page: each kind, its progress, and what is refused."""

import json
import re
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from playwright.sync_api import Page, Route, expect
from tiny_models import fine_tuned, save, tiny_llama
from web_console import Console


def choose(console: Console, page: Page, name: str, *files: Path) -> None:
    console.show(page, "upload")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Files").set_input_files([str(file) for file in files])


def upload(page: Page) -> None:
    page.get_by_role("button", name="Upload", exact=True).click()


def test_an_artifact_becomes_a_version_after_its_bytes_were_counted(console: Console, page: Page) -> None:
    file = console.file("sent.safetensors", 71)
    choose(console, page, "sent", file)
    expect(page.get_by_text("An artifact, as deltaserve compress makes it")).to_be_visible()
    seen = page.evaluate_handle(
        """() => {
            const seen = new Set(), bar = document.querySelector("progress");
            new MutationObserver(() => seen.add(bar.value)).observe(bar, {attributes: true});
            return seen;
        }"""
    )
    with page.expect_request("**/v1/variants/sent*") as sent:
        upload(page)
    expect(page.get_by_role("heading", name="sent, version 1, is there")).to_be_visible()
    digest = console.server.http.get("/v1/variants/sent").json()["current"]["digest"]
    assert sent.value.url.endswith(f"?digest={digest}")
    assert 1 in seen.evaluate("seen => [...seen]")
    page.get_by_role("link", name="Show it").click()
    expect(page.get_by_role("heading", name="sent", exact=True)).to_be_visible()


def test_a_name_that_is_there_gets_another_version_and_the_page_says_so(console: Console, page: Page) -> None:
    console.put("twice", 72)
    choose(console, page, "twice", console.file("second.safetensors", 73))
    expect(page.get_by_text("twice is there; this becomes its newest version")).to_be_visible()
    upload(page)
    expect(page.get_by_role("heading", name="twice, version 2, is there")).to_be_visible()


def test_one_may_look_elsewhere_while_something_is_sent(console: Console, page: Page) -> None:
    held: list[Route] = []
    page.route("**/v1/variants/slow?*", lambda route: held.append(route))
    choose(console, page, "slow", console.file("slow.safetensors", 75))
    upload(page)
    cancel = page.get_by_role("button", name="Cancel")
    cancel.wait_for()
    views = page.get_by_role("navigation", name="Main")
    views.get_by_role("link", name="Variants").click()
    page.get_by_role("heading", name="Variants").wait_for()
    views.get_by_role("link", name="Upload").click()
    expect(cancel).to_be_visible()
    views.get_by_role("link", name="Jobs").click()
    page.get_by_role("heading", name="Jobs").wait_for()
    held[0].continue_()
    expect(page.get_by_text("slow, version 1, is there.")).to_be_visible()


def test_a_cancelled_upload_leaves_nothing(console: Console, page: Page) -> None:
    page.route("**/v1/variants/regretted?*", lambda route: None)
    choose(console, page, "regretted", console.file("regretted.safetensors", 76))
    upload(page)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("alert").filter(has_text="Cancelled; nothing was changed.")).to_be_visible()
    assert console.server.http.get("/v1/variants/regretted").status_code == 404
    upload(page)
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()


def test_an_adapter_of_two_files(console: Console, page: Page, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(vocab=300), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    files = [tmp_path / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    choose(console, page, "adapted", files[0])
    expect(page.get_by_text("adapter_model.safetensors is missing")).to_be_visible()
    page.get_by_label("Files").set_input_files([str(file) for file in files])
    upload(page)
    expect(page.get_by_role("heading", name="adapted, version 1, is there")).to_be_visible()
    assert console.server.http.get("/v1/variants/adapted").json()["current"]["tensors_applied"] == 2


def test_a_checkpoint_becomes_a_job_that_can_be_cancelled(console: Console, page: Page, tmp_path: Path) -> None:
    save(fine_tuned(tiny_llama(vocab=300)), tmp_path, vocab=300)
    (tmp_path / "training_args.bin").write_bytes(b"x")
    texts = [json.dumps({"prompt": "ab", "answer": "abcdefgh" * 9 + str(i)}) for i in range(40)]
    (tmp_path / "held-out.jsonl").write_text("\n".join(texts))
    choose(console, page, "whole", *tmp_path.iterdir())
    expect(page.get_by_text("A whole fine-tuned checkpoint")).to_contain_text("Not sent: training_args.bin.")
    page.get_by_label("Kind").select_option("Same token first, at least")
    page.get_by_label("Limit").fill("much")
    upload(page)
    expect(page.get_by_role("alert").filter(has_text="“much” is no limit")).to_be_visible()
    page.get_by_label("Limit").fill("0.9")
    upload(page)
    expect(page.get_by_role("heading", name="whole", exact=True)).to_be_visible()
    (job,) = (one for one in console.server.http.get("/v1/jobs").json()["data"] if one["variant"] == "whole")
    assert job["tolerance"] == {"min_agreement": 0.9}
    page.get_by_role("button", name="Cancel the job").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
    expect(page.locator("h1 + span")).to_have_text("cancelled")
    expect(page.get_by_role("button", name="Cancel the job")).to_be_hidden()
    assert console.server.http.get(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.bin", b"x", "is a pickle, which could run code"),
        ("notes.txt", b"x", "There is no .safetensors file among these"),
    ],
)
def test_files_that_are_no_model_are_refused_before_they_are_sent(
    console: Console, page: Page, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    choose(console, page, "nothing", tmp_path / name)
    expect(page.get_by_role("alert").filter(has_text=said)).to_be_visible()
    upload(page)
    expect(page.get_by_role("alert").filter(has_text=said)).to_be_visible()
    assert console.server.http.get("/v1/variants/nothing").status_code == 404


def test_an_artifact_of_another_base_is_refused_in_the_words_of_the_api(console: Console, page: Page) -> None:
    choose(console, page, "foreign", console.file("foreign.safetensors", 74, base="f" * 64))
    upload(page)
    expect(page.get_by_role("alert").filter(has_text=re.compile("base", re.I))).to_contain_text("ffff")
    assert console.server.http.get("/v1/variants/foreign").status_code == 404
    expect(page.get_by_role("button", name="Upload", exact=True)).to_be_enabled()
