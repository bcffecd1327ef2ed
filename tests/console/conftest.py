"""A browser, and a server with keys, for the tests of the console; without Chromium they are skipped.

Playwright's event loop runs in this thread as long as the browser is open, and no other may: a file's tests have a
browser of their own, which is closed before those of another file begin.
"""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from running_server import running
from tiny_models import save, tiny_llama
from web_console import QUALITY, Console

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
expect.set_options(timeout=10_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def console(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    folder = tmp_path_factory.mktemp("console")
    base = save(tiny_llama(vocab=300), folder / "base", vocab=300)
    with running(base, folder / "store", keys="required") as server:
        server.app.state.runner.stop()  # jobs go as far as a test says
        key = server.app.state.keys.create("root", "admin")[1]
        server.http.headers["authorization"] = f"Bearer {key}"
        console = Console(server, base, folder, browser, key)
        console.put("reviews", 1, QUALITY)
        console.put("reviews", 2, QUALITY | {"kl_mean": 0.00312})
        console.put("team/python", 3)
        yield console


@pytest.fixture(scope="module")
def session(console: Console) -> Iterator[BrowserContext]:
    with console.context() as context:
        yield context


@pytest.fixture
def page(session: BrowserContext) -> Iterator[Page]:
    """A tab with the admin's key. What the browser complains about, the page's policy included, fails the test."""
    page = session.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if "Content Security Policy" in said.text else None)
    yield page
    page.close()
    assert complaints == []
