"""How a run is going, on stderr while it does: requests done, failures, tokens a second so far."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deltaserve.server.bench.client import Outcome, Record


@contextmanager
def requests_progress(requests: int, warmup: int) -> Iterator[Callable[[Record], None]]:
    """Gives a function to call with each request's record; the first ``warmup`` of them warm up."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("Warming up" if warmup else "Requests", total=requests)
        done = failed = tokens = 0
        start = time.perf_counter()

        def on_record(record: Record) -> None:
            nonlocal done, failed, tokens, start
            done += 1
            if done == warmup:
                start = time.perf_counter()
            if done > warmup:
                failed += record.outcome is not Outcome.COMPLETED
                tokens += record.tokens if record.outcome is Outcome.COMPLETED else 0
                rate = tokens / (time.perf_counter() - start)
                progress.update(bar, description=f"{rate:.1f} tokens/s, {failed} failed")
            progress.advance(bar)

        yield on_record
