"""The same question to several models, side by side."""

import re

from playwright.sync_api import Page, expect
from running_server import wait_until
from web_console import Console


def test_the_answers_of_several_models_are_those_of_the_api(console: Console, page: Page) -> None:
    console.show(page, "playground?models=base,reviews")
    page.get_by_label("Add a model").fill("team/python")
    page.keyboard.press("Enter")
    page.get_by_text("System message, temperature, length").click()
    page.get_by_label("Most tokens").fill("12")
    page.get_by_label("Question").fill("What is the sea?")
    page.keyboard.press("Control+Enter")
    page.get_by_text("All have answered.").wait_for()
    for model in ("base", "reviews", "team/python"):
        body = {"model": model, "messages": [{"role": "user", "content": "What is the sea?"}], "max_tokens": 12}
        answer = console.server.http.post("/v1/chat/completions", json=body | {"temperature": 0})
        column = page.get_by_role("article", name=f"Answer of {model}", exact=True)
        assert column.locator(".answer").text_content() == answer.json()["choices"][0]["message"]["content"]
        expect(column).to_contain_text(re.compile(r"first token .* · 12 tokens · "))
        expect(column).to_contain_text(answer.headers["x-deltaserve-version"][:12])


STOP_AFTER = """(count) => {
    const answer = document.querySelector(".answer"), lengths = new Set();
    window.lengths = lengths;
    new MutationObserver(() => {
        lengths.add(answer.textContent.length);
        const buttons = [...document.querySelectorAll("button")];
        if (lengths.size === count) buttons.find((one) => one.textContent === "Stop").click();
    }).observe(answer, {subtree: true, characterData: true, childList: true});
}"""


def test_answers_come_as_they_are_written_and_can_be_stopped(console: Console, page: Page) -> None:
    console.show(page, "playground?models=base")
    page.get_by_text("System message, temperature, length").click()
    page.get_by_label("Most tokens").fill("220")
    page.get_by_label("Question").fill("go on")
    page.evaluate(STOP_AFTER, 5)
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("form").get_by_role("status")).to_have_text("Stopped.")
    assert page.evaluate("window.lengths.size") >= 5, "the answer came in one piece"
    expect(page.get_by_role("article")).to_contain_text("stopped")
    wait_until(lambda: not console.server.app.state.engine.requests)
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()


def test_a_model_that_fails_says_why_and_the_others_answer(console: Console, page: Page) -> None:
    console.put("short-lived", 61)
    console.show(page, "playground?models=base,short-lived")
    page.get_by_label("Question").fill("hi")
    console.server.http.delete("/v1/variants/short-lived").raise_for_status()
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("Not all could answer.").wait_for()
    expect(page.get_by_role("article", name="Answer of short-lived")).to_contain_text("does not exist")
    expect(page.get_by_role("article", name="Answer of base", exact=True)).to_contain_text("first token")


def test_a_name_that_is_none_is_refused(console: Console, page: Page) -> None:
    console.show(page, "playground?models=base")
    page.get_by_label("Add a model").fill("nobody")
    page.keyboard.press("Enter")
    expect(page.get_by_text("There is no model “nobody”")).to_be_visible()
    expect(page.get_by_role("list", name="Models that are asked").get_by_role("listitem")).to_have_count(1)
