"""Commands and scripts in processes of their own, forked from one that has imported what they need, which takes a new
interpreter six seconds. How an interpreter begins and ends is left to the tests that start one, and so is torchrun:
test_cli, test_faults, test_packaging, one of training/test_distributed."""

from __future__ import annotations

import atexit
import math
import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

METHOD = multiprocessing.get_start_method()
PARENT: Any = multiprocessing.get_context("forkserver")
PARENT.set_forkserver_preload(
    ["pytest", "torch.distributed", "faiss", "sklearn.neighbors", "ifnd_fast.cli", "ifnd_fast.training.trainer",
     "ifnd_fast.evaluate.tasks", "ifnd_fast.report.page", __name__]
)  # fmt: skip


def command(name: str, *args: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run ifnd-fast-NAME as its console script does."""
    return _run(Started([name, *args]), timeout)


def python(code: str, *args: object, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run Python code."""
    return _run(start(code, *args), timeout)


def run_ranks(number: int, script: Path, *args: object, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run a script in several ranks, as torchrun does: the first that fails ends the others, too."""
    return _run(start_ranks(number, script, *args), timeout)


def start(code: str, *args: object) -> Started:
    """Begin to run Python code."""
    return Started(args, code=code)


def start_ranks(number: int, script: Path, *args: object) -> Started:
    """Begin to run a script in several ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    each = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return Started([script, *args], each)


class Started:
    """A process, or one for each of these environments, which are beside the one here. What a test does with it has the
    names of subprocess.Popen."""

    def __init__(self, words: Sequence[object], each: Sequence[dict[str, str]] = ({},), code: str | None = None):
        """Of a command's name or a script's path, and what it is given; with code, of what that is given."""
        self._folder = TemporaryDirectory()
        self._streams = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for path in self._streams:
            path.touch()
        if code is not None:
            words = [Path(self._folder.name, "code.py"), *words]
            words[0].write_text(code)
        self.args = [str(word) for word in words]
        self._processes = [
            PARENT.Process(target=_main, args=(self.args, {**os.environ, **own}, os.getcwd(), self._streams, METHOD))
            for own in each
        ]
        for process in self._processes:
            process.start()
        self.pids = [process.pid for process in self._processes]
        self.pid = self.pids[0]
        weakref.finalize(self, _kill, self._processes)  # whatever becomes of the test

    def poll(self) -> int | None:
        """The exit code, of several the first that is not 0; None: one still runs."""
        codes = [process.exitcode for process in self._processes]
        return None if None in codes else next(filter(None, codes), 0)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote, after its end."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while alive := [process for process in self._processes if process.is_alive()]:
            if any(process.exitcode for process in self._processes):
                self.terminate()
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout, *self._told())
            multiprocessing.connection.wait([p.sentinel for p in alive], None if math.isinf(left) else left)
        return self._told()

    def _told(self) -> tuple[str, str]:
        stdout, stderr = (path.read_text(errors="replace") for path in self._streams)
        return stdout, stderr

    def terminate(self) -> None:
        for process in self._processes:
            process.terminate()

    def kill(self) -> None:
        _kill(self._processes)


def _run(started: Started, timeout: float) -> subprocess.CompletedProcess[str]:
    try:
        told = started.communicate(timeout)
    except subprocess.TimeoutExpired:
        started.kill()
        raise
    return subprocess.CompletedProcess(started.args, started.returncode, *told)


def _kill(processes: Sequence[Any]) -> None:
    for process in processes:
        process.kill()
        process.join()


def _main(words: list[str], environment: dict[str, str], folder: str, streams: Sequence[Path], method: str) -> None:
    multiprocessing.set_start_method(method, force=True)  # which would be this process's own, for its own processes
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = words
    try:
        _call(words[0])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # an interpreter's end, of which multiprocessing's own lacks some
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _call(what: str) -> None:
    from ifnd_fast import cli

    if what.endswith(".py"):
        runpy.run_path(what, run_name="__main__")
    else:
        getattr(cli, what)()
