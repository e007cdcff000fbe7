"""What ends a run from outside, in real processes: nothing is lost, and the last line says how to go on."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ifnd_fast.runtime import checkpoint
from ifnd_fast.runtime.errors import Stopped
from ifnd_fast.runtime.stop import StopSignals, with_resume_hint
from tests import forked
from tests.conftest import TINY
from tests.forked import command, run_ranks
from tests.training.test_trainer import new

PR_CAPBSET_DROP = 24  # <linux/prctl.h>
TRAIN = "from ifnd_fast.cli import train; train()"
LONG = [*TINY, "--epochs", "18", "--recluster-every", "3", "--knn-every", "0", "--checkpoint-every", "1000"]


def start(*args: object, prelude: str = "", **options) -> subprocess.Popen[str]:
    """In an interpreter of its own, with its beginning and end."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{prelude}\n{TRAIN}", *map(str, args)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def start_forked(*args: object, prelude: str = "") -> forked.Started:
    return forked.start(f"{prelude}\n{TRAIN}", *args)


def wait_for(path: Path, process: subprocess.Popen[str] | forked.Started, text: str = "") -> None:
    deadline = time.monotonic() + 240
    while not (path.exists() and text in path.read_text()):
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            pytest.fail(f"{path} does not say {text!r}: {process.communicate(timeout=60)}")
        time.sleep(0.01)


def same_run(a: Path, b: Path) -> None:
    """The same bits of everything but times."""
    states = [checkpoint.load_latest(out) for out in (a, b)]
    for name in ("model", "negatives"):
        for key, value in states[0][name].items():
            assert torch.equal(value, states[1][name][key]), (name, key)
    assert torch.equal(states[0]["accepted"], states[1]["accepted"])
    lines = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (a, b)]
    for one, other in zip(*lines, strict=True):
        assert {k: v for k, v in one.items() if "second" not in k} == {
            k: v for k, v in other.items() if "second" not in k
        }


@pytest.fixture(scope="module")
def whole(digit_folder, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = command("train", "--data", digit_folder, "--out", out, *LONG)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    "number, workers, start",
    [(signal.SIGTERM, 0, start_forked), (signal.SIGINT, 2, start), (signal.SIGUSR1, 1, start_forked)],
)
def test_a_signal_ends_the_step_writes_a_checkpoint_and_says_how_to_go_on(
    number, workers, start, whole, digit_folder, tmp_path
):
    out = tmp_path / "run"
    session = "import os; os.setsid()"
    process = start("--data", digit_folder, "--out", out, *LONG, "--workers", workers, prelude=session)
    wait_for(out / "metrics.jsonl", process, '"epoch": 4')
    os.killpg(process.pid, number)  # as a terminal does, the loading processes too
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number, told
    path = checkpoint.list_checkpoints(out)[-1]
    assert told == (
        f"error: stopped by {number.name}; the last checkpoint is {path}; to go on, add --resume to the same command\n"
    )
    assert checkpoint.load(path)["epoch"] >= 4
    done = command("train", "--resume", "--out", out)
    assert done.returncode == 0, done.stderr
    same_run(whole, out)


def at(trainer, where: str, number: int) -> None:
    """Send this process the signal once, within a step, a pass for features or a clustering."""
    owner, name = {
        "step": (trainer, "_train_step"), "features": (trainer.labeller.source, "collect"),
        "clustering": (trainer.labeller.job, "_cluster"), "kNN": (trainer.measuring.labelled, "features"),
    }[where]  # fmt: skip
    call, sent = getattr(owner, name), []

    def signalled(*args, **kwargs):
        if trainer.epoch == 2 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return call(*args, **kwargs)

    setattr(owner, name, signalled)


@pytest.mark.parametrize(
    "number, where",
    [(signal.SIGUSR1, "step"), (signal.SIGUSR2, "features"), (signal.SIGHUP, "clustering"), (signal.SIGUSR1, "kNN"),
     (signal.SIGTERM, "clustering"), (signal.SIGHUP, "step")],
)  # fmt: skip
def test_every_signal_ends_whatever_goes_on(number, where, digit_folder, tmp_path):
    out = tmp_path / "run"
    trainer = new(out, digit_folder, "--epochs", 4, "--checkpoint-every", 1000, "--knn-every", 1)
    at(trainer, where, number)
    with pytest.raises(Stopped, match=f"stopped by {number.name}; the last checkpoint is .*--resume") as stopped:
        with trainer.session.stop, with_resume_hint(out, trainer.session.stop):
            trainer.fit()
    assert stopped.value.exit_code == 128 + number
    assert checkpoint.load_latest(out)["step"] == trainer.step == 7  # of 12: a step into the third epoch


def test_under_nohup_a_hangup_is_nothing(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_before_training_is_told(digit_folder, tmp_path):
    early = "import os, signal, ifnd_fast.training.run_images as images\n"
    early += "images.open_for_run = lambda *_: os.kill(os.getpid(), signal.SIGUSR2)"
    process = start_forked("--data", digit_folder, "--out", tmp_path / "run", *TINY, prelude=early)
    _, told = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGUSR2 and told == "error: stopped by SIGUSR2\n", told


def test_a_second_ctrl_c_ends_it_at_once(digit_folder, tmp_path):
    out, began = tmp_path / "run", tmp_path / "began"
    slow = "import ifnd_fast.training.trainer as t, time, pathlib\nstep = t.Trainer._train_step\n"
    slow += (
        f"def sleepy(*args):\n    pathlib.Path({str(began)!r}).touch()\n    time.sleep(30)\n    return step(*args)\n"
    )
    slow += "t.Trainer._train_step = sleepy"
    process = start_forked("--data", digit_folder, "--out", out, *LONG, prelude=slow)
    wait_for(began, process)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=10)
    assert process.returncode == 130 and "interrupted: add --resume" in told and "Traceback" not in told


def test_a_second_run_on_one_folder_is_refused_and_a_killed_one_frees_it(digit_folder, tmp_path):
    out = tmp_path / "run"
    process = start_forked("--data", digit_folder, "--out", out, *LONG, "--checkpoint-every", 1, "--epochs", 500)
    wait_for(out / "metrics.jsonl", process, '"epoch": 2')
    second = command("train", "--resume", "--out", out)
    assert second.returncode == 2 and f"another process trains in --out {out}" in second.stderr
    process.kill()
    process.communicate()
    left = out / "checkpoints" / ".step-000000099.pt.tmp"
    left.write_bytes(b"half a checkpoint")
    third = start_forked("--resume", "--out", out)
    try:
        deadline = time.monotonic() + 60
        while left.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left.exists() and third.poll() is None
    finally:
        third.kill()
        third.communicate()


@pytest.mark.parametrize("why", ["read-only folder", "below a file"])
def test_a_folder_that_cannot_be_written(why, digit_folder, tmp_path):
    out = tmp_path / "there" / "run"
    if why == "read-only folder":
        out.parent.mkdir(mode=0o500)
    else:
        out.parent.touch()

    def mere_owner():  # root writes anywhere, by these two capabilities: the new program does without
        for dac_override_and_read_search in (1, 2):
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, dac_override_and_read_search)

    process = start("--data", digit_folder, "--out", out, *TINY, preexec_fn=mere_owner)
    _, told = process.communicate(timeout=90)
    assert process.returncode == 1 and told.startswith(f"error: --out {out} can't be written"), told
    assert len(told.splitlines()) == 1


def test_a_full_disk_keeps_the_checkpoint_before_and_says_how_much_was_needed(digit_folder, tmp_path):
    out = tmp_path / "run"
    trainer = new(out, digit_folder, "--epochs", 3)
    trainer.save()  # before the first step
    kept = checkpoint.list_checkpoints(out)
    size = kept[0].stat().st_size

    # bytes of each file written: the nearest thing to a full disk that needs no mount
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))"
    process = start_forked("--resume", "--out", out, prelude=limit)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in told, told
    assert re.search(r"could not write .*step-.*\.pt: .*needs about [\d.]+ MB, [\d,.]+ MB are free", told), told
    assert checkpoint.list_checkpoints(out) == kept and checkpoint.load(kept[0])["step"] == 0
    assert not list(out.rglob("*.tmp"))


def test_a_loading_process_that_dies_is_named(digit_folder, tmp_path):
    out = tmp_path / "run"
    process = start_forked("--data", digit_folder, "--out", out, *LONG, "--workers", 1, "--checkpoint-every", 1)
    wait_for(out / "metrics.jsonl", process, '"epoch": 3')
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1 and "fit()" not in told, told  # torch may grumble where its handler ran
    last = told.strip().splitlines()[-1]
    assert last.startswith("error: a loading process died") and "step-" in last and "--resume" in last


def test_an_error_that_nobody_expects_ends_the_run_with_its_loading_processes(digit_folder, tmp_path):
    broken = "import ifnd_fast.training.trainer as t\ndef fail(*args):\n    raise ZeroDivisionError('odd')\n"
    broken += "import ifnd_fast.training.objective as o; o.QueueObjective.loss = fail"
    process = start("--data", digit_folder, "--out", tmp_path / "run", *LONG, "--workers", 2, prelude=broken)
    _, told = process.communicate(timeout=90)  # they ignore what asks them to stop: Python's exit once waited for them
    assert process.returncode == 1 and told.strip().endswith("ZeroDivisionError: odd")


def test_an_image_that_vanishes_while_training_is_skipped(digit_folder, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    for file in digit_folder.rglob("*.png"):
        (data / file.parent.name).mkdir(parents=True, exist_ok=True)
        (data / file.parent.name / file.name).write_bytes(file.read_bytes())
    process = start_forked("--data", data, "--out", out, *LONG)
    wait_for(out / "metrics.jsonl", process, '"epoch": 2')
    (data / "digit-1" / "003.png").unlink()
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0 and told.count("003.png") == 1 and "unreadable image skipped" in told, told


def test_odd_names_locale_and_clock(digit_folder, tmp_path):
    """Paths that the locale can't say, and a clock that goes backwards."""
    data = tmp_path / "sch\u00f6ne Bilder \u2603"
    data.symlink_to(digit_folder)
    backwards = "import time, itertools; ticks = itertools.count(); time.time = lambda: 1e9 - next(ticks)"
    odd = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    args = ["--data", data, "--out", tmp_path / "Lauf \u00fc", *TINY]
    done = subprocess.run(
        [sys.executable, "-c", f"{backwards}\n{TRAIN}", *map(str, args)], capture_output=True, env={**os.environ, **odd}
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "Lauf \u00fc" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["seconds"] > 0 for line in lines)


# ---- several ranks ----


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Their process numbers, in rank order."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return sorted(map(int, children), key=lambda pid: re.findall(
        rb"\0RANK=(\d+)", b"\0" + Path(f"/proc/{pid}/environ").read_bytes()))  # fmt: skip


@pytest.fixture
def script(tmp_path) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path / "train.py"


def test_ranks_stop_together_and_go_on_to_the_same_bits(script, digit_folder, tmp_path):
    """A signal to one of torchrun's two ranks stops both at one step; resumed, they end as two undisturbed ones."""
    options = ["--data", digit_folder, *LONG, "--epochs", 12, "--bn-groups", 2]
    done = run_ranks(2, script, *options, "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "stopped"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command = [*map(str, [*torchrun, *options, "--out", out])]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(out / "metrics.jsonl", launcher, '"epoch": 4')
    os.kill(ranks_of(launcher)[1], signal.SIGTERM)
    _, told = launcher.communicate(timeout=120)
    assert launcher.returncode != 0 and told.count("error: stopped by SIGTERM; the last checkpoint is") == 1, told
    assert checkpoint.load_latest(out)["epoch"] >= 4
    done = run_ranks(2, script, "--resume", "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    same_run(tmp_path / "whole", out)


@pytest.mark.parametrize("number, rank", [(signal.SIGUSR1, 0), (signal.SIGHUP, 1)])
def test_other_signals_end_all_ranks(number, rank, script, digit_folder, tmp_path):
    out = tmp_path / "run"
    ranks = forked.start_ranks(2, script, "--data", digit_folder, "--out", out, *LONG, "--epochs", 500)
    wait_for(out / "metrics.jsonl", ranks, '"epoch": 1')
    os.kill(ranks.pids[rank], number)
    _, told = ranks.communicate(timeout=120)
    told_here = "SIGTERM" if rank else number.name  # rank 0 tells of itself, or that another was stopped
    assert ranks.returncode != 0 and f"error: stopped by {told_here}; the last checkpoint is" in told, told
    assert checkpoint.load_latest(out)["step"] > 0


def test_the_rank_that_dies_is_named(script, digit_folder, tmp_path):
    out = tmp_path / "run"
    ranks = forked.start_ranks(2, script, "--data", digit_folder, "--out", out, *LONG)
    wait_for(out / "metrics.jsonl", ranks, '"epoch": 2')
    started = time.monotonic()
    os.kill(ranks.pids[1], signal.SIGKILL)
    _, told = ranks.communicate(timeout=120)
    assert time.monotonic() - started < 60 and ranks.returncode != 0
    assert re.search(r"error: rank 0 lost contact with the others: no word from rank 1; .*--resume", told), told


def test_two_ranks_are_refused_a_folder_with_a_run(script, whole, digit_folder):
    done = run_ranks(2, script, "--data", digit_folder, "--out", whole, *TINY)
    assert done.returncode != 0 and done.stderr.count(f"error: --out {whole} already holds a run") == 1, done.stderr
