"""Progress on stderr: one bar for each stage of the work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn


class Bars(Progress):
    """Bars on stderr, which begin with the first task: without any, rich ends with an empty line all the same."""

    def __init__(self, *columns: ProgressColumn) -> None:
        super().__init__(*columns, console=Console(stderr=True))

    def __enter__(self) -> Self:
        return self

    def add_task(self, description: str, *arguments: Any, **more: Any) -> TaskID:
        self.start()
        return super().add_task(description, *arguments, **more)

    def stop(self) -> None:
        if self.tasks:
            super().stop()


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function that is called with a stage's name, how much of it is done, and of how much."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Bars(*columns) as progress:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                _finish(progress)
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield show
        _finish(progress)


def _finish(progress: Progress) -> None:
    """A stage says how far it is before each step, so the last step is over when the next stage begins."""
    for task in progress.tasks:
        progress.update(task.id, completed=task.total)
