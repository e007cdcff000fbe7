"""The commands as processes: what they write, say and exit with."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import TINY
from tests.forked import command, start


@pytest.fixture(scope="module")
def run(digit_folder, tmp_path_factory):
    """A finished run, and what the command printed."""
    out = tmp_path_factory.mktemp("cli") / "run"
    return out, command("train", "--data", digit_folder, "--out", out, *TINY)


def test_train_writes_the_whole_run(run):
    out, done = run
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} - {".lock"} == {
        "config.yaml", "metrics.jsonl", "result.json", "checkpoints", "backbone.pt", "report.html",
    }  # fmt: skip
    assert "epoch 3/3" in done.stdout and "trained encoder" in done.stdout and "raw pixels" in done.stdout
    assert str(out / "report.html") in done.stdout
    result = json.loads((out / "result.json").read_text())
    kinds = ("_raw_pixels", "_untrained", "")
    names = {f"{name}{kind}" for name in ("knn_top1", "few_shot_top1") for kind in kinds}
    assert set(result) == names | {"seconds", "unreadable"}
    for kind in kinds:
        assert {n: len(draws["values"]) for n, draws in result[f"few_shot_top1{kind}"].items()} == {
            "1": 5, "5": 5, "10": 5,
        }  # fmt: skip
    assert "10 a class" in done.stdout and "all, by kNN" in done.stdout
    shown = " ".join(done.stdout.split())
    assert f"with 10 labels a class: trained encoder {result['few_shot_top1']['10']['mean']:.1f} %, untrained" in shown
    assert "50 a class left out: no class has more than" in " ".join(done.stdout.split())
    assert 'src="http' not in (out / "report.html").read_text()


def test_few_shot_measures_what_training_measured(run, tmp_path):
    out, _ = run
    done = command("evaluate", "few-shot", out, "--shots", 1, 10, "--json-file", tmp_path / "few.json")
    assert done.returncode == 0, done.stderr
    trained, found = (json.loads(path.read_text()) for path in (out / "result.json", tmp_path / "few.json"))
    for kind in ("", "_raw_pixels", "_untrained"):
        expected = {n: trained[f"few_shot_top1{kind}"][n]["values"] for n in ("1", "10")}
        assert {n: draws["values"] for n, draws in found[f"few_shot_top1{kind}"].items()} == expected
    assert found["train_images"] == 108
    assert "1 a class" in done.stdout and "± is the standard deviation over 5 draws" in done.stdout


def test_eval_measures_what_training_measured(run, tmp_path):
    out, _ = run
    done = command("evaluate", "knn", out, "--json-file", tmp_path / "knn.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "knn.json").read_text())
    assert figures["knn_top1"] == json.loads((out / "result.json").read_text())["knn_top1"]
    assert f"{figures['knn_top1']:.2f} %" in done.stdout


def test_report_is_written_again(run):
    out, _ = run
    before = (out / "report.html").stat().st_mtime_ns
    done = command("report", out)
    assert done.returncode == 0, done.stderr
    assert (out / "report.html").stat().st_mtime_ns > before


def test_a_folder_with_a_run_is_refused_and_untouched(run, digit_folder):
    out, _ = run
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in out.rglob("*")}
    done = command("train", "--data", digit_folder, "--out", out, *TINY)
    assert done.returncode == 2 and "--resume" in done.stderr and "Traceback" not in done.stderr
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in out.rglob("*")}


def test_resume_refuses_other_options_and_lists_them(run):
    out, _ = run
    done = command("train", "--resume", "--out", out, "--lr", "0.5", "--temperature", "0.3")
    assert done.returncode == 2
    assert "--lr: the run has 0.06, asked for 0.5" in done.stderr and "--temperature" in done.stderr


def test_a_killed_run_goes_on_to_the_same_backbone(run, digit_folder, tmp_path):
    whole, _ = run
    out = tmp_path / "killed"
    args = ["--data", digit_folder, "--out", out, *TINY, "--checkpoint-every", "0.34"]
    code = "from ifnd_fast.cli import train; train()"
    process = start(code, *args)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert list(out.glob("checkpoints/step-*.pt")) and not (out / "result.json").exists()
    done = command("train", "--resume", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "going on with" in done.stdout
    expected, got = (torch.load(path / "backbone.pt", weights_only=True) for path in (whole, out))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize(
    "args, exit_code, words",
    [
        (["unknown"], 2, "unknown preset 'unknown'"),
        (["--epochs", "many"], 2, "epochs"),
        (["--epochs", "0"], 2, "--epochs must be 1 or more, got 0"),
        (["--data", "/nowhere"], 2, "/nowhere"),
        (["--device", "cuda:99"], 2, "--device cuda:99"),
        (["--resume", "--out", "/nowhere"], 1, "/nowhere/config.yaml"),
        (["--out", "/dev/null/run"], 1, "/dev/null/run"),
    ],
)
def test_bad_input_is_a_line_and_an_exit_code(args, exit_code, words, tmp_path):
    done = command("train", *(args if "--out" in args else [*args, "--out", tmp_path / "run"]))
    assert done.returncode == exit_code and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    done = command("train", "--data", tmp_path / "empty", "--out", tmp_path / "run")
    assert done.returncode == 2 and "no images below it" in done.stderr


def test_help_names_presets_options_and_units():
    done = command("train", "--help")
    assert done.returncode == 0
    for word in ("imagenet", "--queue-size", "--false-negatives", "degrees", "pixels", "--resume", "--amp"):
        assert word in done.stdout, word


@pytest.mark.parametrize("name", ["evaluate", "report"])
def test_a_missing_run_is_named(name, tmp_path):
    args = ["knn", tmp_path] if name == "evaluate" else [tmp_path]
    done = command(name, *args)
    assert done.returncode == 1 and str(tmp_path) in done.stderr and "Traceback" not in done.stderr


OUTPUTS = """
import os, sys
from ifnd_fast import cli
from ifnd_fast.evaluate import tasks  # takes seconds, once

for name, kinds in (("train", ("reader gone", "closed", "full")), ("evaluate", ("closed",)), ("report", ("full",))):
    for kind in kinds:
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(tell, 2)
            if kind == "closed":
                os.close(1)
                sys.stdout = None
            elif kind == "full":
                os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
            else:
                reader, writer = os.pipe()
                os.dup2(writer, 1)
                os.close(reader)
            sys.argv = [name, "--help"]
            getattr(cli, name)()
            sys.exit(0)
        os.close(tell)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(name, kind, code, open(told).read().strip(), sep=", ")
"""


def test_help_for_a_reader_that_is_gone_a_closed_output_and_a_full_disk():
    done = subprocess.run([sys.executable, "-c", OUTPUTS], capture_output=True, text=True, timeout=120)
    full = "error: standard output could not be written: [Errno 28] No space left on device"
    assert done.stdout.splitlines() == [
        "train, reader gone, 141, ", "train, closed, 0, ", f"train, full, 1, {full}", "evaluate, closed, 0, ",
        f"report, full, 1, {full}",
    ], (done.stdout, done.stderr)  # fmt: skip


def test_figures_that_can_not_be_printed_are_written_all_the_same(run, tmp_path):
    out, _ = run
    code = "from ifnd_fast.cli import evaluate; evaluate()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "knn", out, "--json-file", tmp_path / "knn.json"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 1 and done.stderr.strip().endswith("No space left on device"), done.stderr
    assert "Traceback" not in done.stderr and 0 <= json.loads((tmp_path / "knn.json").read_text())["knn_top1"] <= 100


def test_info_says_which_backend_and_why_not():
    done = subprocess.run([sys.executable, "-m", "ifnd_fast.info"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"torch {torch.__version__.split('+')[0]}" in done.stdout
    assert "info_nce in float32 on cpu: cpu" in done.stdout and "not cuda:" in done.stdout
