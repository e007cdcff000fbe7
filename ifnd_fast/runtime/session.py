"""A training's folder while it trains: locked, begun or gone on with, saved to, and left when something stops it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ifnd_fast.runtime import checkpoint, distributed, run_folder
from ifnd_fast.runtime.console import say
from ifnd_fast.runtime.errors import Stopped, UsageError
from ifnd_fast.runtime.stop import StopSignals, with_resume_hint


class Resumable(Protocol):
    """A training in memory, as a session sees it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds.

        Raises:
            UsageError: it was written with other options.
            CommandError: it is of another model or other data.
        """

    def position(self) -> dict[str, int]:
        """How far it is, by the field's names ("epoch", "step"); metrics.jsonl counts by the first."""
        ...


class Session:
    """What every training shares that can be stopped and resumed; all ranks have to call its methods.

    Args:
        out: the training's folder.
        resume: go on with what is in it; else it must not hold a training yet.
        keep: checkpoints kept, the latest ones.

    Attributes:
        stop: the signals that ask to end.
        stopping: every rank knows that one was asked to stop.
    """

    def __init__(self, out: Path, resume: bool, keep: int = 2):
        self.out, self.resume, self.keep = out, resume, keep
        self.stop = StopSignals()
        self.stopping = False

    @contextmanager
    def open(self, training: Resumable, record: Callable[[], object]) -> Iterator[None]:
        """Make OUT, or go on from what is in it; locked against other trainings until the context ends. What ends
        the training from outside becomes a message that says how to go on.

        Args:
            record: writes into OUT what identifies the training, on rank 0, once that fits what is there.

        Raises:
            UsageError: OUT holds a training already, another process trains in it, or it was started otherwise.
            CommandError: OUT can't be written, or none of its checkpoints can be read.
            Stopped: a signal came.
        """
        with self.stop, with_resume_hint(self.out, self.stop), ExitStack() as held:
            with distributed.raise_on_all_ranks(True):
                if distributed.rank() == 0:
                    if not self.resume:
                        run_folder.refuse_a_run(self.out)
                    held.enter_context(run_folder.locked(self.out))
            with distributed.raise_on_all_ranks(True):
                if self.resume:
                    self.go_on(training)
                if distributed.rank() == 0:
                    record()
            yield

    def go_on(self, training: Resumable) -> None:
        """From the newest readable checkpoint; from the beginning where none was written yet."""
        if checkpoint.list_checkpoints(self.out):
            training.load_state_dict(checkpoint.load_latest(self.out))
            after = ", ".join(f"{name} {number}" for name, number in training.position().items())
            say(f"going on with {self.out} after {after}")
        else:
            say(f"{self.out} has no checkpoint yet: beginning anew")
        if distributed.rank() == 0:
            run_folder.truncate_metrics(self.out, *next(iter(training.position().items())))

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, from rank 0. Raises CommandError: the disk is full or not writable."""
        if distributed.rank() == 0:
            checkpoint.save(self.out, state, self.keep)
        distributed.barrier()

    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.stop.number is not None

    def stop_if_asked(self) -> None:
        """Raises Stopped: some rank was asked to stop."""
        if self.stopping:
            raise Stopped(self.stop.number or signal.SIGTERM)  # of another rank


def refuse_differences(what: str, lines: list[str]) -> None:
    """Raises UsageError: `what`, a training to go on with, was started with other options, a line each."""
    if lines:
        raise UsageError(f"{what} was started with other options:\n  " + "\n  ".join(lines))
