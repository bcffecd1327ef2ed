"""Jobs: the list, one as it goes on, and its frontier."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from web_console import QUALITY, Console

from deltaserve.server.jobs.store import SearchOrder

POINTS = [
    {"bytes": 400_000, "kl": 0.05, "agreement": 0.90, "setting": "weighted, p = 0.99", "text": "calibration"},
    {"bytes": 900_000, "kl": 0.012, "agreement": 0.95, "setting": "weighted, p = 0.98", "text": "calibration"},
    {"bytes": 1_000_000, "kl": 0.03, "agreement": 0.92, "setting": "dare, p = 0.98", "text": "calibration"},
    {"bytes": 850_000, "kl": 0.011, "agreement": 0.95, "setting": "weighted, p = 0.98", "text": "short"},
]


@pytest.fixture
def job(console: Console, tmp_path: Path) -> str:
    """A job whose steps are the test's: nobody runs it."""
    store = console.server.app.state.jobs
    (tmp_path / "config.json").write_text("{}")
    made = store.create("compressed", {"config.json": tmp_path / "config.json"}, None, SearchOrder({"max_kl": 0.02}))
    store.begin(made.id)
    store.report(made.id, "Survey", 0.2, POINTS[:1])
    return made.id


def test_a_job_is_followed_to_its_end_and_every_point_is_drawn(console: Console, page: Page, job: str) -> None:
    store = console.server.app.state.jobs
    console.show(page, f"jobs/{job}")
    expect(page.get_by_text("Survey")).to_be_visible()
    expect(page.locator("figure > svg .point")).to_have_count(1)
    store.report(job, "Contest", 0.6, POINTS)
    expect(page.get_by_text("Contest")).to_be_visible()
    expect(page.locator("figure > svg .point")).to_have_count(4)
    assert page.locator("progress").evaluate("bar => bar.value") == 0.6

    marks = page.locator("figure > svg .point").evaluate_all(
        "marks => marks.map(m => [+m.getAttribute('cx'), +m.getAttribute('cy'), m.classList.contains('behind')])"
    )
    for one, point in zip(marks, POINTS, strict=True):
        for other, another in zip(marks, POINTS, strict=True):
            assert (one[0] < other[0]) == (point["bytes"] < another["bytes"])
            assert (one[1] < other[1]) == (point["kl"] > another["kl"])
    assert [behind for *_, behind in marks] == [False, False, True, True], (
        "dare is beaten; short text is another measure"
    )
    limit = page.locator("figure > svg .limit").evaluate("line => +line.getAttribute('y1')")
    assert marks[1][1] > limit > marks[2][1]

    page.get_by_text("All 4 points as a table").click()
    row = page.get_by_role("row", name=re.compile("dare, p = 0.98"))
    expect(row).to_contain_text("1 MB")
    receipt = console.put("compressed", 81, QUALITY)
    store.succeed(job, receipt | {"size_bytes": 900_000})
    expect(page.locator("h1 + span")).to_have_text("succeeded")
    expect(page.locator("figure > svg .chosen title")).to_have_text("chosen: weighted, p = 0.98")
    page.get_by_role("link", name="Show the variant").click()
    expect(page.get_by_role("heading", name="compressed", exact=True)).to_be_visible()


def test_a_failed_job_says_why_in_the_list_and_in_its_view(console: Console, page: Page, job: str) -> None:
    why = "Nothing is within the tolerance; the nearest has KL 0.05"
    console.server.app.state.jobs.fail(
        job, {"message": why, "type": "invalid_request_error", "param": None, "code": None}
    )
    console.show(page, "jobs")
    row = page.get_by_role("row").filter(has=page.locator(f"a[href='#/jobs/{job}']"))
    expect(row).to_contain_text(f"failed{why}")
    row.get_by_role("link").click()
    expect(page.get_by_role("alert").filter(has_text=why)).to_be_visible()


def test_a_job_that_is_none_says_so(console: Console, page: Page) -> None:
    console.show(page, "jobs/job_none")
    expect(page.get_by_role("alert").filter(has_text="There is no job 'job_none'")).to_be_visible()
