"""What a person sees while a command runs: progress bars with ETA on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import datetime
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ifnd_fast.runtime import distributed

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 60.0
"""of a stage that goes on, where output is no terminal; the environment's IFND_FAST_LINE_SECONDS overrides it"""
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


class Guarded:
    """A standard stream whose reader may go away or whose disk may fill: what is written after that is dropped, and
    the program goes on to what it writes elsewhere.

    Attributes:
        error: of the first write that failed, or None.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            return self._give_up(error, len(text))

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError, written: int = 0) -> int:
        self.error = self.error or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())  # or what is left in its buffer would fail again when Python exits
        os.close(nowhere)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard_output() -> Guarded:
    """Guard standard output and error, also where the program was started with them closed; the guard of the former."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one: else a file of the run would
    output = Guarded(sys.stdout or open(os.devnull, "w"))
    sys.stdout, sys.stderr = output, Guarded(sys.stderr or open(os.devnull, "w"))  # type: ignore[assignment]
    return output


def line_seconds() -> float:
    """Seconds between the lines of a stage where output is no terminal."""
    try:
        return max(0.01, float(os.environ["IFND_FAST_LINE_SECONDS"]))
    except (KeyError, ValueError):
        return SECONDS_BETWEEN_LINES


class Lines:
    """A line about a stage each `line_seconds`, also while a single step takes longer than that.

    Args:
        description: of the stage.
        total: steps of it.
        completed: steps that were done before.
        images: in a step; 0: steps are not of images.
        further: steps of the training that follow this stage; None: it is no part of one.
    """

    def __init__(self, description: str, total: int, completed: int, images: int, further: int | None):
        self.description, self.total, self.done, self.images, self.further = (
            description, total, completed, images, further,
        )  # fmt: skip
        self.note = ""
        self.started = time.monotonic()
        self.last = self.started, completed  # when the last line was printed, and the steps done by then
        self.speed: float | None = None  # steps a second, between the last two lines with a step between them
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Lines:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done, self.note = self.done + n, note or self.note

    def _run(self) -> None:
        while not self.ended.wait(line_seconds()):
            console.print(self.line(time.monotonic()), markup=False)

    def line(self, now: float) -> str:
        """What there is to say now; speed and time left are of what was done since the line before."""
        done, (then, before) = self.done, self.last
        if done > before and now > then:
            self.speed, self.last = (done - before) / (now - then), (now, done)
        parts = [f"{self.description}: {done:,}/{self.total:,}" if self.total > 1 else self.description, self.note]
        if self.speed is None:
            parts.append(f"{_clock(now - self.started)} so far")
        elif done == before:
            parts.append(f"no step done for {_clock(now - then)}")
        else:
            parts.append(f"{self.speed * self.images:,.0f} images/s" if self.images else "")
            parts.append(f"{_clock((self.total - done) / self.speed)} left")
            if self.further:
                parts.append(f"{_clock((self.total - done + self.further) / self.speed)} of the training")
        return ", ".join(part for part in parts if part)


def _clock(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=round(seconds))


@contextmanager
def progress(
    description: str, total: int, completed: int = 0, hidden: bool = False, images: int = 0, further: int | None = None
) -> Iterator[Any]:
    """A bar that `advance(n=1, note="")` moves; removed when done. Nothing is drawn if hidden (another bar is there).

    Off a terminal there are no bars, but a line each minute: see `Lines`, which takes the other arguments.
    """
    if distributed.rank() == 0 and not console.is_terminal:
        with Lines(description, total, completed, images, further) as lines:
            yield lines.advance
        return
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=console, transient=True,
        disable=hidden or distributed.rank() != 0,
    )  # fmt: skip
    with bar:
        task = bar.add_task(description, total=total, completed=completed, note="")

        def advance(n: int = 1, note: str = "") -> None:
            bar.update(task, advance=n, note=note)

        yield advance


def track(items: Iterable[T], description: str, total: int, images: int = 0) -> Iterator[T]:
    """The items, with a progress bar."""
    with progress(description, total, images=images) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def stage(description: str) -> Iterator[None]:
    """Work that can't tell how far it is."""
    with progress(description, 1):
        yield


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; the first column is left-aligned, the others right."""
    if distributed.rank() != 0:
        return
    grid = Table(title=Text(title), title_justify="left", title_style="bold")  # as Text: a name may look like markup
    for number, column in enumerate(columns):
        grid.add_column(Text(column), justify="left" if number == 0 else "right")
    for row in rows:
        grid.add_row(*map(Text, row))
    console.print(grid)
