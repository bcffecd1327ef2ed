"""A running server with keys, and a browser that looks at its console."""

from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page
from running_server import Running, artifact

FIRST_KEY = """if (location.protocol === "http:" && sessionStorage.getItem("deltaserve.key") === null)
    sessionStorage.setItem("deltaserve.key", "%s");"""
QUALITY = {
    "tokens": 4063,
    "kl_mean": 0.00765,
    "kl_p99": 0.0564,
    "top1_agreement": 0.963,
    "loss_base": 1.958,
    "loss_fine_tuned": 1.322,
    "loss_artifact": 1.332,
    "kl_base": 0.61,
    "top1_agreement_base": 0.712,
    "dare": {"made_by": "dare", "bytes": 9000, "kl_mean": 0.02},
}


@dataclass(frozen=True)
class Console:
    """A server with a console, and what opens it: ``key`` is an admin's."""

    server: Running
    base: Path
    folder: Path
    browser: Browser
    key: str

    def context(self, key: str | None = "", **options: object) -> BrowserContext:
        """A browser session with the admin's key, another one, or None."""
        context = self.browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(10_000)
        if key is not None:
            context.add_init_script(FIRST_KEY % (key or self.key))
        return context

    def show(self, page: Page, place: str) -> None:
        """Open a view, anew."""
        page.goto("about:blank")
        page.goto(f"{self.server.url}/console/#/{place}")
        page.locator("h1").first.wait_for()

    def file(self, name: str, seed: int, **more: object) -> Path:
        """An artifact of the base."""
        return artifact(self.base, self.folder / name, seed=seed, **more)

    def put(self, name: str, seed: int, quality: dict[str, object] | None = None) -> dict[str, object]:
        """Register one as ``name``; returns its receipt."""
        file = self.file(f"{name.replace('/', '-')}-{seed}", seed, quality=quality)
        answer = self.server.http.put(f"/v1/variants/{name}", content=file.read_bytes())
        return answer.raise_for_status().json()
