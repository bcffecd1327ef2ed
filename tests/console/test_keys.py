"""A server with keys: the page asks for one, and says what a role may not do."""

from playwright.sync_api import expect
from web_console import Console


def test_the_page_asks_for_a_key_refuses_a_wrong_one_and_keeps_the_right_one(console: Console) -> None:
    with console.context(key=None) as context:
        page = context.new_page()
        console.show(page, "variants")
        page.get_by_label("API key").fill("sk-wrong")
        page.get_by_role("button", name="Go on").click()
        expect(page.get_by_role("alert").filter(has_text="unknown or revoked")).to_be_visible()
        page.get_by_label("API key").fill(console.key)
        page.keyboard.press("Enter")
        page.get_by_role("link", name="reviews", exact=True).wait_for()
        page.reload()
        page.get_by_role("link", name="reviews", exact=True).wait_for()
        assert page.evaluate("Object.keys(localStorage).length") == 0
        page.get_by_role("button", name="Key: root (admin)").click()
        expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
        assert page.evaluate("sessionStorage.getItem('deltaserve.key')") is None


def test_a_role_that_may_only_ask_is_told_so_and_asks(console: Console) -> None:
    key = console.server.app.state.keys.create("alice", "infer", ["team/*"])[1]
    with console.context(key=key) as context:
        page = context.new_page()
        refused: list[int] = []
        page.on("response", lambda answer: refused.append(answer.status) if answer.status >= 400 else None)
        for place, what in (
            ("variants", "see or change variants"),
            ("upload", "upload variants"),
            ("jobs", "see jobs"),
        ):
            console.show(page, place)
            expect(page.get_by_role("heading", name=f"This key may not {what}")).to_be_visible()
        expect(page.locator("main")).to_contain_text("“alice” has the role infer. It may ask team/*")
        page.get_by_role("link", name="Open the playground").click()
        expect(page.get_by_role("list", name="Models that are asked")).to_have_text("team/python×")
        page.get_by_label("Question").fill("hi")
        page.get_by_role("button", name="Ask").click()
        page.get_by_text("All have answered.").wait_for()
        assert refused == [], "the page asks for nothing that the role may not have"
