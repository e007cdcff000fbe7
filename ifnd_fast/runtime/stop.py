"""What ends a run from outside: signals, after which it ends its step and writes a checkpoint, and lost processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ifnd_fast.runtime import checkpoint, distributed
from ifnd_fast.runtime.errors import CommandError, Stopped


class StopSignals:
    """SIGINT and SIGTERM, as a context manager: what they do until it ends.

    Within `deferred` the first one only sets `number`, for the loop to see; elsewhere it raises `Stopped` where the run
    is. A second SIGINT raises KeyboardInterrupt at once.

    Attributes:
        number: of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferring = False

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
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
def explained(out: Path, stop: StopSignals) -> Iterator[None]:
    """What ends a run from outside becomes a message that says how to go on with the run in `out`."""
    how = "to go on, add --resume to the same command"
    try:
        yield
    except Stopped as error:
        error.args = (f"{error}; {checkpoint.where(out)}; {how}",)
        raise
    except RuntimeError as error:
        with stop.deferred():  # torchrun tells all ranks to stop once one is gone
            reason = distributed.lost_contact(error)
        if "DataLoader worker" in str(error):
            reason = f"a loading process died, often because memory ran out (fewer --workers?): {str(error).strip()}"
        if reason is None:
            raise
        raise CommandError(f"{reason}; {checkpoint.where(out)}; {how}") from error


def ignore_stop_signals(_: int = 0) -> None:
    """For processes that load data: Ctrl-C reaches the whole group, and their parent decides when they end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
