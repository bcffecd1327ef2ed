"""The table of variants and what may be done with one."""

import re

import pytest
from playwright.sync_api import Page, expect
from web_console import QUALITY, Console

from deltaserve.delta_store.registry import Receipt


def cells(page: Page, name: str) -> dict[str, str]:
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True))
    return row.locator("td").evaluate_all(
        "cells => Object.fromEntries(cells.map(c => [c.dataset.label, c.textContent]))"
    )


def press(page: Page, button: str, confirm: str | None = None) -> None:
    page.get_by_role("button", name=button, exact=True).click()
    if confirm:
        page.get_by_role("dialog").get_by_role("button", name=confirm).click()


def test_the_table_shows_what_the_api_says(console: Console, page: Page) -> None:
    console.show(page, "variants")
    page.get_by_role("link", name="reviews", exact=True).wait_for()
    said = cells(page, "reviews")
    size = console.server.http.get("/v1/variants/reviews").json()["current"]["size_bytes"]
    ratio = console.server.http.get("/v1/console").json()["base"]["bytes"] / size
    assert (said["Version"], said["KL"], said["Same token"], said["Gain kept"]) == ("2", "0.00312", "96.3 %", "98.4 %")
    assert (said["Size"], said["Smaller"]) == (f"{size / 1000:.3g} kB", f"{ratio:.1f}×")
    assert cells(page, "team/python")["KL"] == "–"


def test_rate_and_latency_follow_requests(console: Console, page: Page) -> None:
    console.show(page, "variants")
    page.get_by_role("link", name="reviews", exact=True).wait_for()
    ask = {"model": "reviews", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "ignore_eos": True}
    console.server.http.post("/v1/chat/completions", json=ask).raise_for_status()
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="reviews", exact=True))
    expect(row.locator("[data-label='Req/min']")).not_to_have_text(re.compile("^(0|–)$"))
    expect(row.locator("[data-label='First token']")).to_have_text(re.compile(r"^\d+ ms$|^\d\.\d s$"))
    page.get_by_label("Show").select_option("Asked in the last minute")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.get_by_label("Show").select_option("All")


def test_pin_unpin_and_prefetch(console: Console, page: Page) -> None:
    console.put("pinned", 11)
    console.show(page, "variants/pinned")
    place = page.locator(".head .badge").first
    expect(place).to_have_text("stored")
    press(page, "Prefetch")
    expect(place).to_have_text("in memory")
    press(page, "Pin")
    expect(page.get_by_role("button", name="Unpin")).to_be_visible()
    assert console.server.app.state.engine.bank.pinned == {"pinned"}
    press(page, "Unpin")
    expect(page.get_by_role("button", name="Pin", exact=True)).to_be_visible()
    assert not console.server.app.state.engine.bank.pinned


def test_roll_back_to_the_version_before_and_to_a_chosen_one(console: Console, page: Page) -> None:
    digests = [console.put("rolled", seed, QUALITY)["digest"] for seed in (21, 22, 23)]

    def current() -> object:
        return console.server.http.get("/v1/variants/rolled").json()["current"]["digest"]

    console.show(page, "variants/rolled")
    press(page, "Roll back", "Cancel")
    assert current() == digests[2]
    press(page, "Roll back", "Use version 2")
    expect(page.get_by_role("row").filter(has_text="current")).to_contain_text(digests[1][:12])
    assert current() == digests[1]
    press(page, "Use version 1", "Use version 1")
    expect(page.get_by_role("row").filter(has_text="current")).to_contain_text(digests[0][:12])
    assert current() == digests[0]
    expect(page.get_by_role("button", name="Roll back")).to_be_disabled()


def test_a_split_is_set_changed_and_ended(console: Console, page: Page) -> None:
    digests = [console.put("shared", seed, QUALITY)["digest"] for seed in (24, 25)]

    def split() -> tuple[str, str | None, float]:
        known = console.server.http.get("/v1/variants/shared/versions").json()
        return known["current"], known["canary"], known["share"]

    console.show(page, "variants/shared")
    said = page.locator(".split")
    press(page, "Split with version 1", "Cancel")
    assert split() == (digests[1], None, 0)
    page.get_by_role("button", name="Split with version 1").click()
    for unfit in ("100", "0", ""):
        page.get_by_role("spinbutton").fill(unfit)
        page.get_by_role("button", name="Split", exact=True).click()
        assert page.evaluate("document.querySelector('dialog input:invalid') !== null"), "it is not sent"
    page.get_by_role("spinbutton").fill("7")
    page.get_by_role("button", name="Split", exact=True).click()
    expect(said).to_have_text(re.compile("^Version 1 answers 7.0 % of the requests, version 2 the rest"))
    expect(page.get_by_role("row").filter(has_text="canary, 7.0 %")).to_contain_text(digests[0][:12])
    assert split() == (digests[1], digests[0], 0.07)
    press(page, "Change share")
    expect(page.get_by_role("spinbutton")).to_have_value("7")
    page.get_by_role("spinbutton").fill("33.3")
    page.get_by_role("button", name="Change", exact=True).click()
    expect(said).to_contain_text("33.3 %")
    assert split()[2] == 0.333
    press(page, "End split")
    expect(said).to_be_hidden()
    expect(page.get_by_text("Version 2 of shared answers all requests again.")).to_be_visible()
    assert split() == (digests[1], None, 0)


def test_delete_asks_first_and_removes_the_row(console: Console, page: Page) -> None:
    console.put("doomed", 31)
    console.show(page, "variants/doomed")
    press(page, "Delete", "Cancel")
    assert console.server.http.get("/v1/variants/doomed").status_code == 200
    press(page, "Delete", "Delete")
    page.get_by_role("heading", name="Variants").wait_for()
    assert console.server.http.get("/v1/variants/doomed").status_code == 404
    expect(page.get_by_role("link", name="doomed")).to_have_count(0)


def test_a_refusal_is_shown_in_the_words_of_the_api(console: Console, page: Page) -> None:
    console.put("gone", 41)
    console.show(page, "variants/gone")
    page.get_by_role("button", name="Pin", exact=True).wait_for()
    console.server.http.delete("/v1/variants/gone").raise_for_status()
    press(page, "Pin")
    expect(page.locator("main")).to_contain_text("There is no variant of this name")


def test_names_from_elsewhere_are_text(console: Console, page: Page) -> None:
    console.show(page, "variants/<img src=x onerror=alert(1)>")
    expect(page.locator("h1")).to_have_text("<img src=x onerror=alert(1)>")
    assert page.locator("main img").count() == 0


def test_an_outage_is_told_and_what_was_known_stays(console: Console, page: Page) -> None:
    console.show(page, "variants")
    page.get_by_role("link", name="reviews", exact=True).wait_for()
    page.route("**/v1/console", lambda route: route.abort())
    outage = page.get_by_role("alert").filter(has_text="The server does not answer")
    expect(outage).to_be_visible()
    expect(page.get_by_role("link", name="reviews", exact=True)).to_be_visible()
    page.unroute("**/v1/console")
    expect(outage).to_be_hidden()


@pytest.fixture
def thousand(console: Console) -> None:
    """They stay, and sort after all others."""
    registry = console.server.app.state.registry
    digest = console.put("zz", 51)["digest"]
    base = console.server.app.state.engine.fingerprint
    for number in range(1000):
        registry.register(f"zz/{number:04d}", Receipt(digest, 10**6 + number, base, None, 1, 1, QUALITY))


def test_a_thousand_are_searched_sorted_and_paged_at_once(console: Console, page: Page, thousand: None) -> None:
    count = len(console.server.http.get("/v1/variants").json()["data"])
    console.show(page, "variants")
    found = page.locator(".filters p")
    expect(found).to_have_text(f"{count:,} variants")
    assert page.locator("tbody tr").count() == 50
    page.get_by_role("button", name="Next").click()
    expect(page.locator(".pages")).to_contain_text(f"Page 2 of {-(-count // 50)}")
    page.get_by_role("button", name="Size").click()
    page.get_by_role("button", name="Size").click()
    expect(page.locator("thead th").nth(2)).to_have_attribute("aria-sort", "descending")
    expect(page.locator("tbody th").first).to_have_text("zz/0999")
    milliseconds = page.evaluate(
        """() => {
            const search = document.querySelector("input[type=search]"), began = performance.now();
            search.value = "zz/09";
            search.dispatchEvent(new Event("input"));
            return performance.now() - began;
        }"""
    )
    expect(found).to_have_text(f"100 of {count:,} variants")
    assert milliseconds < 500
