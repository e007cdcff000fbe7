"""What ends a run from outside: signals, after which it ends its step and writes a checkpoint, and lost processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType

from ifnd_fast.runtime import checkpoint, distributed
from ifnd_fast.runtime.errors import CommandError, LoadingError, Stopped

# What asks to end, apart from Ctrl-C: a scheduler's warnings (Slurm's --signal=USR1@120, say), a terminal that closes.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
NUMBERS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows lacks some
_HANGUP = getattr(signal, "SIGHUP", None)


class StopSignals:
    """The signals of NUMBERS, as a context manager: what they do until it ends. SIGHUP stays ignored under nohup.

    Within `deferred` the first one only sets `number`, for the loop to see; elsewhere it raises `Stopped` where the run
    is. A second SIGINT raises KeyboardInterrupt at once.

    Attributes:
        number: of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferring = False

    def __enter__(self) -> StopSignals:
        wanted = [n for n in NUMBERS if n != _HANGUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._ask) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _ask(self, number: int, _: FrameType | None) -> None:
        again, self.number = self.number is not None, number
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._deferring:
            raise Stopped(number)


@contextmanager
def with_resume_hint(out: Path, stop: StopSignals) -> Iterator[None]:
    """What ends a run from outside becomes a message that says how to go on with the run in `out`."""
    how = "to go on, add --resume to the same command"
    try:
        yield
    except (Stopped, LoadingError) as error:
        error.args = (f"{error}; {checkpoint.where(out)}; {how}",)
        raise
    except RuntimeError as error:
        with stop.deferred():  # torchrun tells all ranks to stop once one is gone
            reason = distributed.lost_contact(error)
        if reason is None:
            raise
        raise CommandError(f"{reason}; {checkpoint.where(out)}; {how}") from error


def ignore_stop_signals(_: int = 0) -> None:
    """For processes that load data: Ctrl-C reaches the whole group, and their parent decides when they end."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)


@contextmanager
def stop_signals_later() -> Iterator[None]:
    """Stop signals wait until this ends, and in the processes that are started meanwhile until they ignore them: those
    begin with the handlers of this one, and would raise Stopped."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # unblocks SIGINT and SIGTERM once it has started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
