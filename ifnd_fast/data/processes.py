"""Loading processes: the one place where they are started, and where they end, whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from types import FrameType
from typing import Any

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from ifnd_fast.runtime.errors import CommandError, LoadingError, Stopped
from ifnd_fast.runtime.stop import ignore_stop_signals, stop_signals_later

GRACE = 3.0  # seconds that loading processes have for the pictures in hand, before they are killed
CAUGHT = "Caught "  # how torch begins what it tells of an exception in a loading process
OF_A_PROCESS = "DataLoader worker"  # how torch's message of a dead process begins
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def make_loader(dataset: Dataset, workers: int, pin_memory: bool | None = None, **options: Any) -> DataLoader:
    """A DataLoader, to be iterated by `running` alone."""
    return DataLoader(
        dataset, num_workers=workers, worker_init_fn=_begin,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        generator=torch.Generator(),  # of seeds that no item uses: the global one would move with every resume
        **options,
    )  # fmt: skip


@contextmanager
def running(loader: DataLoader) -> Iterator[Iterator[Any]]:
    """The loader's batches. Its processes end with the context: also with an error or a signal, and though they are
    stuck. (They wait for the iterator, which an error's traceback holds, and Python's exit waits for them.)

    Raises:
        LoadingError: a loading process failed or died.
        Stopped: SIGTERM or SIGHUP came, where nobody else handles it.
    """
    with _stoppable():
        batches = _started(loader)
        try:
            yield _explained(batches)
        except RuntimeError as error:  # torch raises it wherever the main thread is when a process dies
            if not str(error).startswith(OF_A_PROCESS):
                raise
            raise _loading_error(error, batches) from error
        finally:
            if isinstance(batches, _MultiProcessingDataLoaderIter):
                _end(batches)


def _started(loader: DataLoader) -> _BaseDataLoaderIter:
    before = set(multiprocessing.active_children())
    try:
        with stop_signals_later():
            return iter(loader)
    except BaseException as error:  # no memory for a second process, say
        _kill(set(multiprocessing.active_children()) - before)
        if isinstance(error, OSError):
            raise LoadingError(f"the loading processes can't be started (fewer --workers?): {error}") from error
        raise


def _explained(batches: _BaseDataLoaderIter) -> Iterator[Any]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            if isinstance(error, CommandError) and not str(error).startswith(CAUGHT):  # of this process
                raise
            raise _loading_error(error, batches) from error
        yield batch


def _loading_error(error: Exception, batches: _BaseDataLoaderIter) -> LoadingError:
    """What a person is told of an error that came with a batch, or instead of one."""
    text = str(error).strip()
    if text.startswith(OF_A_PROCESS):
        codes = [worker.exitcode for worker in getattr(batches, "_workers", ()) if worker.exitcode is not None]
        how = ", ".join(signal.Signals(-code).name if code < 0 else f"exit code {code}" for code in codes)
        if -signal.SIGBUS in codes:
            return LoadingError(f"a loading process died ({how}): {_of_shared_memory()}")
        return LoadingError(f"a loading process died ({how}), often because memory ran out: fewer --workers need less")
    details = text if text.startswith(CAUGHT) else "".join(traceback.format_exception(error)).strip()
    last = details.splitlines()[-1]
    if isinstance(error, CommandError):  # of a loading process: it says all
        return LoadingError(last.partition("Error: ")[2])
    if "shared memory" in details or "</torch_" in details:
        last = f"{_of_shared_memory()} ({last})"
    elif "Too many open files" in details or "ancdata" in details:
        last = f"too many open files: raise the limit (ulimit -n), or take fewer --workers ({last})"
    return LoadingError(f"loading images failed: {last}", details)


def _of_shared_memory() -> str:
    try:
        usage = shutil.disk_usage("/dev/shm")
        space = f", {usage.free / 1e6:,.0f} of {usage.total / 1e6:,.0f} MB free"
    except OSError:
        space = ""
    return f"shared memory (/dev/shm{space}) is too small: enlarge it (docker run --shm-size), or take --workers 0"


def _begin(_: int) -> None:
    """In a loading process, before it loads anything."""
    ignore_stop_signals()
    # A batch that can't be handed over (no shared memory, no free file descriptor) would be missing without a word, and
    # its receiver wait for good.
    Queue._on_queue_feeder_error = _hand_over_the_error  # type: ignore[attr-defined]


def _hand_over_the_error(queue: Queue, error: Exception, item: Any) -> None:
    if not isinstance(item, tuple):
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(1)
    queue.put((item[0], ExceptionWrapper(where="in a loading process that hands over a batch")))


def _end(batches: _MultiProcessingDataLoaderIter) -> None:
    workers = list(batches._workers)
    late = threading.Timer(GRACE, _kill, [workers, False])
    late.daemon = True
    late.start()
    try:
        batches._shutdown_workers()
    except RuntimeError as error:  # that one was killed just now
        if not str(error).startswith(OF_A_PROCESS):
            raise
    finally:
        late.cancel()
        _kill(workers)


def _kill(workers: Collection[BaseProcess], wait: bool = True) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers if wait else ():
        worker.join()


@contextmanager
def _stoppable() -> Iterator[None]:
    """A signal that would end this process at once, without its loading processes, raises Stopped meanwhile."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
