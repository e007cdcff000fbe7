"""Loading processes that fail, die, get stuck or find no memory: commands end at once, say why, and leave nobody."""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

import ifnd_fast
from ifnd_fast.data.processes import make_loader, running
from ifnd_fast.runtime.errors import LoadingError, Stopped
from ifnd_fast.runtime.stop import StopSignals
from tests.conftest import TINY
from tests.forked import python, start

PACKAGE = Path(ifnd_fast.__file__).parent


class Numbers(Dataset):
    """Item i: what `item(i)` returns, does or raises."""

    def __init__(self, item, n: int = 8):
        self.item, self.n = item, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int):
        return self.item(index)


def read(item, workers: int = 2, **options) -> list:
    with running(make_loader(Numbers(item), workers, **options)) as batches:
        return [batch for batch in batches]


def nobody_is_left() -> bool:
    return not multiprocessing.active_children()


def fail(error: BaseException):
    def item(index: int) -> int:
        if index == 3:
            raise error
        return index

    return item


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_nobody_is_left(workers):
    assert read(lambda index: index, workers, batch_size=None) == list(range(8)) and nobody_is_left()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error", [MemoryError("no more"), ValueError("odd"), KeyError("lost"), RuntimeError("both"), TypeError("slip")]
)
def test_any_exception_ends_the_loop_with_its_name_and_its_traceback(error, workers):
    with pytest.raises(LoadingError) as caught:
        read(fail(error), workers, batch_size=None)
    assert str(caught.value) == f"loading images failed: {type(error).__name__}: {error}"
    assert f"{Path(__file__).name}" in caught.value.details and "raise error" in caught.value.details
    assert nobody_is_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_as_they_start_is_nothing_to_them(number, monkeypatch):
    """Before they ignore it they have the handlers of their parent."""
    seed, parent = torch.manual_seed, os.getpid()

    def signalled(number_of_seed: int):  # the first thing that a loading process does
        if os.getpid() != parent:
            os.kill(os.getpid(), number)
        return seed(number_of_seed)

    monkeypatch.setattr(torch, "manual_seed", signalled)
    with StopSignals():
        assert read(lambda index: index, 2, batch_size=None) == list(range(8)) and nobody_is_left()


def die(number: int):
    def item(index: int) -> int:
        if index == 3:
            os.kill(os.getpid(), number)
        return index

    return item


@pytest.mark.parametrize(
    "item, message",
    [
        (die(signal.SIGKILL), r"a loading process died \(SIGKILL\), often because memory ran out: fewer --workers"),
        (die(signal.SIGSEGV), r"a loading process died \(SIGSEGV\)"),
        (die(signal.SIGBUS), r"died \(SIGBUS\): shared memory \(/dev/shm, .* MB free\) is too small"),
        (fail(SystemExit(0)), r"a loading process died \(exit code 0\)"),
    ],
)
def test_a_process_that_dies_ends_the_loop(item, message):
    with pytest.raises(LoadingError, match=message):
        read(item, batch_size=None)
    assert nobody_is_left()


def no_shared_memory(index: int) -> torch.Tensor:
    """As /dev/shm says when it is full, but for the number of the error."""
    import resource

    if index == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return torch.zeros(10_000)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("options", [{"batch_size": None}, {"batch_size": 2}, {"batch_size": 2, "collate_fn": list}])
def test_a_batch_that_cannot_be_handed_over_ends_the_loop(options):
    """Python's queue would drop it, and its receiver wait for good."""
    with pytest.raises(LoadingError, match=r"shared memory \(/dev/shm, .*is too small: .*--shm-size"):
        read(no_shared_memory, **options)
    assert nobody_is_left()


def test_processes_that_are_stuck_are_killed(monkeypatch):
    monkeypatch.setattr("ifnd_fast.data.processes.GRACE", 0.5)
    started = time.monotonic()

    def stuck(index: int) -> int:
        if index > 1:
            time.sleep(600)
        return index

    with pytest.raises(ZeroDivisionError), running(make_loader(Numbers(stuck), 2, batch_size=None)) as batches:
        assert next(batches) == 0
        raise ZeroDivisionError
    assert time.monotonic() - started < 30 and nobody_is_left()


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped(15), ValueError("the consumer's")])
def test_an_error_of_the_loop_passes_and_ends_the_processes(error):
    kept = []
    with pytest.raises(type(error) if isinstance(error, BaseException) else error) as caught:
        with running(make_loader(Numbers(lambda index: index), 2, batch_size=None)) as batches:
            kept.append(batches)  # as a traceback holds it
            next(batches)
            raise error
    assert not isinstance(caught.value, LoadingError) and nobody_is_left()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of torch's half-made iterator
def test_processes_that_cannot_be_started(monkeypatch):
    start, started = multiprocessing.process.BaseProcess.start, []

    def second_fails(self):
        started.append(self)
        if len(started) == 2:
            raise OSError(11, "Resource temporarily unavailable")
        start(self)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", second_fails)
    with pytest.raises(LoadingError, match=r"can't be started \(fewer --workers\?\): .*temporarily unavailable"):
        read(lambda index: index, batch_size=None)
    assert nobody_is_left() and len(started) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_nobody_handles_ends_the_processes(number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(Stopped):
            with running(make_loader(Numbers(lambda index: index), 2, batch_size=None)):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_DFL and nobody_is_left()
    finally:
        signal.signal(number, before)


def test_there_is_one_door():
    """No other module makes a DataLoader, or iterates one otherwise than by `running`."""
    makes_loaders = {"make_loader", "view_loader", "pair_loader", "centre_loader"}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "DataLoader" or path.name == "processes.py", path
            if isinstance(node, ast.For | ast.comprehension):
                names = {part.id for part in ast.walk(node.iter) if isinstance(part, ast.Name)}
                over_a_loader = names & (makes_loaders | {"loader"}) and "loaded" not in names
                assert not over_a_loader, f"{path}: {ast.unparse(node.iter)}"


# ---- the commands, in a process each kind of fault ----

RUN_ALL = """
import json, multiprocessing, sys, time
from ifnd_fast import cli
from ifnd_fast.evaluate import tasks  # what takes seconds to import is not the fault's
import ifnd_fast.training.trainer
commands = json.loads(sys.argv[1])
for name, args in commands:
    started = time.monotonic()
    sys.argv = ["command", *args]
    try:
        getattr(cli, name)()
        code = 0
    except SystemExit as end:
        code = end.code
    left = len(multiprocessing.active_children())
    print("ENDED", json.dumps([args[0], code, left, time.monotonic() - started]), file=sys.stderr)
"""
KILLED = """
import os, signal
from ifnd_fast.data import images
from ifnd_fast.evaluate.detection import coco
main = os.getpid()
def deadly(kind):
    image = kind.image
    def of_a_process(self, index):
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return image(self, index)  # training looks at some before it starts
    kind.image = of_a_process
"""
RAISED = """
from ifnd_fast.data import loading
from ifnd_fast.evaluate.detection import coco
def deadly(self, index):
    raise ZeroDivisionError("injected")
"""
FAULTS = {
    # the process dies as it opens a picture; an error that is no picture's, where both kinds of dataset attempt one
    "a loading process died (SIGKILL": KILLED + "deadly(images.FileImages), deadly(coco.CocoImages)\n",
    "loading images failed: ZeroDivisionError: injected": RAISED
    + "loading.attempt = lambda *args: deadly(*args[:2])\ncoco.TrainingExamples.__getitem__ = deadly\n",
}


@pytest.mark.parametrize("message", FAULTS)
def test_commands_end_within_seconds_with_a_message_and_nobody_left(
    message, untrained_run, class_folders, coco_folder, tmp_path
):
    small = ["--data", str(class_folders), "--workers", "2"]
    fitting = ["--epochs", "1", "--batch-size", "16"]
    run = str(untrained_run)
    commands = [
        ["train", [*small, *TINY, "--workers", "2", "--out", str(tmp_path / "train")]],
        ["train", [*small, *TINY, "--workers", "2", "--out", str(tmp_path / "device"), "--augment", "device"]],
        ["evaluate", ["knn", run, *small]],
        ["evaluate", ["linear", run, *small, "--fast"]],
        ["evaluate", ["linear", run, *small, *fitting, "--out", str(tmp_path / "linear")]],
        ["evaluate", ["semi", run, *small, *fitting, "--shares", "0.5", "--out", str(tmp_path / "semi")]],
        ["evaluate", ["svm", run, *small]],
        ["evaluate", ["clusters", run, *small, "--levels", "3", "--features", "backbone"]],
        ["evaluate", ["transfer", run, *small, "--fast"]],
        [
            "evaluate",
            [
                "detection",
                run,
                "--data",
                str(coco_folder),
                "--workers",
                "2",
                "--batch-size",
                "2",
                "--iterations",
                "2",
                "--min-size",
                "64",
                "--out",
                str(tmp_path / "detection"),
            ],
        ],
    ]
    done = python(FAULTS[message] + RUN_ALL, json.dumps(commands))
    told = done.stderr
    ends = [json.loads(line[6:]) for line in told.splitlines() if line.startswith("ENDED ")]
    assert len(ends) == len(commands) and done.returncode == 0, told
    for (_, args), (_, code, left, seconds) in zip(commands, ends, strict=True):
        assert (code, left) == (1, 0) and seconds < 90, (args, code, left, seconds, told)
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(commands) and all(line.startswith(f"error: {message}") for line in errors), told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_an_evaluation_ends_its_processes(number, untrained_run, class_folders, tmp_path):
    slow = "import time\nfrom ifnd_fast.data import images\n"
    slow += f"def sleepy(path):\n    open({str(tmp_path / 'begun')!r}, 'w').close()\n    time.sleep(100)\n"
    slow += "images.open_picture = sleepy\nfrom ifnd_fast.cli import evaluate; evaluate()"
    slow = f"import os; os.setsid()\n{slow}"
    words = ["knn", str(untrained_run), "--data", str(class_folders), "--workers", "2"]
    if number == signal.SIGTERM:
        process = start(slow, *words)
    else:  # an interpreter of its own, with its end
        process = subprocess.Popen([sys.executable, "-c", slow, *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 150
    while not (tmp_path / "begun").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, told = process.communicate(timeout=90)
    assert process.returncode == 128 + number and "Traceback" not in told, told
    with pytest.raises(ProcessLookupError):  # of the whole group nobody is left
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.05)
