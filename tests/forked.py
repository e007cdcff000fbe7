"""Commands and scripts in processes of their own, forked from one that has imported what they need, which takes a new
interpreter six seconds. How an interpreter begins and ends is left to the tests that start one, and so is torchrun:
test_cli, test_faults, test_packaging, one of training/test_distributed."""

from __future__ import annotations

import atexit
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
    return _run([{}], [name, *map(str, args)], timeout)


def python(code: str, *args: object, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run Python code."""
    with TemporaryDirectory() as folder:
        script = Path(folder, "code.py")
        script.write_text(code)
        return _run([{}], [str(script), *map(str, args)], timeout)


def run_ranks(number: int, script: Path, *args: object, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run a script in several ranks, as torchrun does: the first that fails ends the others, too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    each = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return _run(each, [str(script), *map(str, args)], timeout)


def _run(each: Sequence[dict[str, str]], words: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """A process for each of these environments, which are beside the one here."""
    with TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in streams:
            path.touch()
        processes = [
            PARENT.Process(target=_main, args=(words, {**os.environ, **own}, os.getcwd(), streams, METHOD))
            for own in each
        ]
        for process in processes:
            process.start()
        codes = _wait(processes, time.monotonic() + timeout)
        told = [path.read_text(errors="replace") for path in streams]
    if codes is None:
        raise subprocess.TimeoutExpired(words, timeout, *told)
    return subprocess.CompletedProcess(words, next(filter(None, codes), 0), *told)


def _wait(processes: Sequence[Any], deadline: float) -> list[int] | None:
    """Exit codes; None: time was up, and they were killed."""
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
        multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], deadline - time.monotonic())
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    for process in processes:
        process.join()
    return None if late else [process.exitcode for process in processes]


def _main(words: list[str], environment: dict[str, str], folder: str, streams: Sequence[Path], method: str) -> None:
    multiprocessing.set_start_method(method, force=True)  # which would be this process's own, for its own processes
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = words
    try:
        code = _call(words[0])
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


def _call(what: str) -> int:
    from ifnd_fast import cli

    if what.endswith(".py"):
        runpy.run_path(what, run_name="__main__")
    else:
        getattr(cli, what)()
    return 0
