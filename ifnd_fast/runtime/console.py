"""What a person sees while a command runs: progress bars with ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ifnd_fast.runtime import distributed

T = TypeVar("T")
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """A line, from rank 0."""
    if distributed.rank() == 0:
        console.print(message, markup=False)


def warn(message: str) -> None:
    """A line on standard error that starts with "warning:", from rank 0."""
    if distributed.rank() == 0:
        errors.print(f"warning: {message}", markup=False)


@contextmanager
def progress(description: str, total: int, completed: int = 0, hidden: bool = False) -> Iterator[Any]:
    """A bar that `advance(n=1, note="")` moves; removed when done. Nothing is drawn off a terminal or if hidden."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=console, transient=True,
        disable=hidden or not console.is_terminal or distributed.rank() != 0,
    )  # fmt: skip
    with bar:
        task = bar.add_task(description, total=total, completed=completed, note="")

        def advance(n: int = 1, note: str = "") -> None:
            bar.update(task, advance=n, note=note)

        yield advance


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """The items, with a progress bar."""
    with progress(description, total) as advance:
        for item in items:
            yield item
            advance()


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; the first column is left-aligned, the others right."""
    if distributed.rank() != 0:
        return
    grid = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
