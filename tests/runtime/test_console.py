"""What is told while a command runs, where output is no terminal."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from ifnd_fast.evaluate.knn import knn
from ifnd_fast.evaluate.linear import LinearOptions, linear
from ifnd_fast.evaluate.subject import Options
from ifnd_fast.evaluate.svm import SvmOptions, svm
from ifnd_fast.runtime import console
from ifnd_fast.runtime.console import Lines, progress, stage, track
from tests.conftest import TINY


def test_a_line_tells_speed_and_time_left_of_what_was_done_since_the_one_before():
    lines = Lines("epoch 2/3", 100, 10, images=32, further=100)
    begin = lines.started
    assert lines.line(begin + 60) == "epoch 2/3: 10/100, 0:01:00 so far"
    lines.advance(20, "loss 5.250")
    assert lines.line(begin + 120) == (
        "epoch 2/3: 30/100, loss 5.250, 5 images/s, 0:07:00 left, 0:17:00 of the training"  # 20 steps in 2 minutes
    )
    lines.advance(60, "loss 5.125")
    assert lines.line(begin + 180) == (
        "epoch 2/3: 90/100, loss 5.125, 32 images/s, 0:00:10 left, 0:01:50 of the training"  # the last minute's speed
    )
    assert lines.line(begin + 240) == "epoch 2/3: 90/100, loss 5.125, no step done for 0:01:00"


def test_lines_come_while_a_step_takes_its_time(capsys, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.05)
    with progress("clustering", 3) as advance:
        time.sleep(0.3)
        advance()
        time.sleep(0.3)
    with stage("report"):
        time.sleep(0.3)
    assert [None for _ in track([1, 2], "quick", 2)] == [None, None]
    told = capsys.readouterr().out
    assert "clustering: 0/3, 0:00:00 so far\n" in told and "clustering: 1/3, 0:00:0" in told and " left\n" in told
    assert "report, 0:00:00 so far\n" in told and "quick" not in told


@pytest.mark.parametrize("set_to, seconds", [("2.5", 2.5), ("often", 60.0), (None, 60.0)])
def test_the_environment_sets_how_often(set_to, seconds, monkeypatch):
    monkeypatch.delenv("IFND_FAST_LINE_SECONDS", raising=False)
    if set_to:
        monkeypatch.setenv("IFND_FAST_LINE_SECONDS", set_to)
    assert console.line_seconds() == seconds


def test_a_training_tells_of_every_stage_at_once(digit_folder, tmp_path):
    """In the log of a process that goes on; it is written as it comes, not when a buffer is full."""
    slow = (
        "import time, ifnd_fast.training.trainer as t, ifnd_fast.clustering.levels as l, ifnd_fast.data.features as f\n"
        "import ifnd_fast.training.measuring as k\n"
        "def slowly(call, seconds):\n"
        "    def slow(*args, **kwargs):\n"
        "        time.sleep(seconds)\n"
        "        return call(*args, **kwargs)\n"
        "    return slow\n"
        "t.Trainer._train_step = slowly(t.Trainer._train_step, 0.2)\n"
        "l.assign_clusters = slowly(l.assign_clusters, 0.5)\n"
        "f.to_input = slowly(f.to_input, 0.5)\n"
        "k.knn_accuracy = slowly(k.knn_accuracy, 0.5)\n"
        "from ifnd_fast.cli import train; train()"
    )
    log, args = tmp_path / "log", ["--data", digit_folder, "--out", tmp_path / "run", *TINY]
    environment = {**os.environ, "IFND_FAST_LINE_SECONDS": "0.15"}
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, "-c", slow, *map(str, args)], stdout=file, env=environment)
        deadline = time.monotonic() + 120
        while " left, " not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None  # and yet the line was there
        assert process.wait(timeout=240) == 0
    told = log.read_text()
    for words in ("kNN features, 0:00:0", "kNN, ", "epoch 1/3: 1/3, loss ", " images/s, ", "\nfeatures, ", "report, ",
                  "clustering: ", " of the training"):  # fmt: skip
        assert words in told, (words, told)
    assert "\r" not in told and "\x1b" not in told


@pytest.mark.parametrize("task", ["linear", "svm", "knn"])
def test_evaluations_tell_of_their_long_loops(task, untrained_run, class_folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("IFND_FAST_LINE_SECONDS", "0.01")
    options = Options(untrained_run, data=str(class_folders), device="cpu")
    if task == "linear":
        linear(options, LinearOptions(epochs=2, batch_size=24, lr=0.1, out=tmp_path))
        wanted = ("epoch 1/2: ", "loss ", " images/s, ", " left", " of the training", "test images")
    elif task == "svm":
        svm(options, SvmOptions(shots=(1,), samplings=1))
        wanted = ("training features", "test features", "cross-validation: ", "SVMs: ", " left")
    else:
        knn(options)
        wanted = ("features, 0:00:0",)
    told = capsys.readouterr().out
    assert all(words in told for words in wanted), told
