"""What everybody can use: keyboard, labels, contrast in both schemes, a phone's width."""

import pytest
from playwright.sync_api import Page, expect
from web_console import Console

PLACES = ("variants", "variants/reviews", "upload", "jobs", "playground?models=base,reviews")

# Elements whose text has less contrast to what lies behind it than WCAG's AA asks: 4.5, of large text 3.
FAINT = """() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
    const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => [r, g, b].map((v) => linear(v / 255))
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const behind = (element) => element === null ? [255, 255, 255, 1] :
        over(rgba(getComputedStyle(element).backgroundColor), behind(element.parentElement));
    const found = [];
    for (const element of document.body.querySelectorAll("*")) {
        const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
        if (!text || !element.checkVisibility() || element.closest("svg, :disabled, .unseen")) continue;
        const style = getComputedStyle(element), ground = behind(element);
        const [a, b] = [light(over(rgba(style.color), ground)), light(ground)].sort((x, y) => y - x);
        const ratio = (a + .05) / (b + .05), isLarge = parseFloat(style.fontSize) >= 24;
        if (ratio < (isLarge ? 3 : 4.5)) found.push(`${text.slice(0, 30)}: ${ratio.toFixed(2)}`);
    }
    return found;
}"""

# Things to operate that have no name for who does not see them.
NAMELESS = """() => [...document.querySelectorAll("input, select, textarea, button, a")]
    .filter((e) => e.checkVisibility())
    .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim()))
    .map((e) => e.outerHTML)"""

TABBED = """() => {
    const e = document.activeElement, style = getComputedStyle(e);
    return [e.outerHTML, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
}"""
OPERATED = """() => [...document.querySelectorAll("a[href], button, input, select, textarea, summary")]
    .filter((e) => e.checkVisibility() && !e.disabled).map((e) => e.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_text_is_legible_and_nothing_sticks_out(console: Console, scheme: str, width: int) -> None:
    with console.context(color_scheme=scheme, viewport={"width": width, "height": 800}) as context:
        page = context.new_page()
        for place in PLACES:
            console.show(page, place)
            assert page.evaluate(FAINT) == [], place
            assert page.evaluate(NAMELESS) == [], place
            assert page.evaluate("document.documentElement.scrollWidth") <= width, place


def test_the_tab_key_reaches_everything_and_shows_where_it_is(console: Console, page: Page) -> None:
    for place in PLACES:
        console.show(page, place)
        page.wait_for_load_state("networkidle") if False else page.wait_for_timeout(100)
        wanted = page.evaluate(OPERATED)
        reached = []
        for _ in range(len(wanted) + 1):
            page.keyboard.press("Tab")
            element, is_outlined = page.evaluate(TABBED)
            assert is_outlined or element.startswith("<body"), f"{place}: the focus is not seen on {element}"
            reached.append(element)
        assert set(wanted) <= set(reached), f"{place}: {set(wanted) - set(reached)}"


def test_a_variant_is_deleted_with_the_keyboard_alone(console: Console, page: Page) -> None:
    console.put("a-key-press", 91)
    console.show(page, "variants")
    page.get_by_role("link", name="a-key-press").wait_for()
    page.get_by_role("searchbox").focus()
    page.keyboard.type("key-press")
    expect(page.locator("tbody tr")).to_have_count(1)
    tab_to(page, "a-key-press")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Delete").wait_for()
    assert page.evaluate("document.activeElement.id") == "main", "a new view has the focus"
    tab_to(page, "Delete")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "Cancel", "the harmless answer has the focus"
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert page.evaluate("document.activeElement.textContent") == "Delete", "the focus is back where it was"
    page.keyboard.press("Enter")
    tab_to(page, "Delete")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Variants").wait_for()
    assert console.server.http.get("/v1/variants/a-key-press").status_code == 404
    page.get_by_role("searchbox").fill("")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_a_split_is_set_and_ended_with_the_keyboard_alone(console: Console, scheme: str) -> None:
    name = f"{scheme}-split"
    digests = [console.put(name, seed)["digest"] for seed in (92, 93)]
    with console.context(color_scheme=scheme, viewport={"width": 360, "height": 740}) as context:
        page = context.new_page()
        console.show(page, f"variants/{name}")
        page.get_by_role("button", name="Split with version 1").wait_for()
        tab_to(page, "Split with version 1")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.type") == "number", "what is asked for has the focus"
        assert page.evaluate(FAINT) == page.evaluate(NAMELESS) == []
        page.keyboard.type("25")
        page.keyboard.press("Enter")
        expect(page.locator(".split")).to_contain_text("Version 1 answers 25.0 % of the requests")
        known = console.server.http.get(f"/v1/variants/{name}/versions").json()
        assert (known["current"], known["canary"], known["share"]) == (digests[1], digests[0], 0.25)
        assert page.evaluate("document.activeElement.textContent") == "Change share", "the focus is near where it was"
        assert page.evaluate(FAINT) == page.evaluate(NAMELESS) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        tab_to(page, "End split")
        page.keyboard.press("Enter")
        expect(page.locator(".split")).to_be_hidden()
        assert console.server.http.get(f"/v1/variants/{name}/versions").json()["canary"] is None
        assert page.evaluate("document.activeElement.textContent") == "Use version 1"


def tab_to(page: Page, text: str) -> None:
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == text:
            return
    raise AssertionError(f"the Tab key does not reach {text!r}")
