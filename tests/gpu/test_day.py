"""The first day on a GPU is ready: its commands parse, its steps go on where they stopped, and say what they lack."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro

from ifnd_fast.cli import parse_train

ROOT = Path(__file__).parents[2]
OPERATORS = (ROOT / "tests" / "gpu" / "test_operators.py").read_text()


@pytest.fixture(scope="module")
def bench():
    """The modules of bench/ by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        yield importlib.import_module


@pytest.fixture
def day(bench, monkeypatch, tmp_path):
    day = bench("gpu_day")
    monkeypatch.setattr(day, "STATE", tmp_path)
    return day


def test_commands_parse(day, bench, tmp_path):
    (tmp_path / "some.whl").touch()
    options = day.Options(wheels=tmp_path, seeds=(0, 1))
    for step in day.NAMES:
        commands = day.commands(step, options)
        assert len({command.name for command in commands}) == len(commands) > 0
        for command in commands:
            program, *arguments = command.argv
            if program == "compute-sanitizer":
                arguments = arguments[arguments.index(sys.executable) + 1 :]
            if arguments[0] == "-c":
                compile(arguments[1], command.name, "exec")
                if "train()" in arguments[1]:
                    assert parse_train(arguments[2:]).contrast.false_negatives in command.name
            elif arguments[:2] == ["-m", "pytest"]:
                files = [argument for argument in arguments if argument.endswith(".py")]
                assert files and all((ROOT / file).exists() for file in files)
                words = arguments[arguments.index("-k") + 1].split(" or ") if "-k" in arguments else []
                assert all(word in OPERATORS or word in ("cuda", "triton") for word in words)
            elif arguments[0] == "bench/gpu_speed.py":
                tyro.cli(bench("gpu_speed").Options, args=arguments[1:])
            elif arguments[0] == "bench/gpu_day.py":
                day.parser().parse_args(arguments[1:])
            else:
                assert arguments[0] in ("setup.py", "-m")


def python(code):
    return (sys.executable, "-c", code)


def test_steps_go_on_where_they_stopped(day, monkeypatch, tmp_path, capsys):
    marks = tmp_path / "marks"
    steps = [
        day.Command("first", python(f"open({str(marks)!r}, 'a').write('x')"), needs=()),
        day.Command("card", python("raise SystemExit(1)"), needs=("no-such-program",)),
        day.Command("slow", python("import time; time.sleep(60)"), needs=()),
        day.Command("last", python("print('done')"), needs=()),
    ]
    monkeypatch.setattr(day, "commands", lambda step, o: steps)
    options, out = day.Options(), tmp_path / "out"
    out.mkdir()
    assert day.run_step(2, options, out, time.monotonic() + 1) == day.UNFINISHED
    steps[2] = day.Command("slow", python("print('quick')"), needs=())
    assert day.run_step(2, options, out, time.monotonic() + 20) == day.PASS
    assert marks.read_text() == "x"  # what passed is not run again
    text = (out / "2-tests.md").read_text()
    assert (
        "no-such-program is not on the PATH" in text
        and "quick" in text
        and text.startswith("# 2 tests: PASS, 1 of 4 skipped")
    )
    steps[2] = day.Command("wrong", python("raise SystemExit('because')"), needs=())
    assert day.run_step(2, options, out, time.monotonic() + 20) == day.FAIL
    assert "because" in (out / "2-tests.md").read_text()


def test_what_the_machine_lacks(day, monkeypatch):
    assert "nanobind" in day.required() and "faiss-gpu" not in day.required()
    command = day.fetch()
    assert "tyro==" in command and "typeguard==" in command and " torch==" not in command
    monkeypatch.setattr(day, "required", lambda: ["torch", "no-such-package"])
    assert day.missing() == ["no-such-package"]


@pytest.mark.parametrize("what", ["queue", "in-batch", "assign"])
def test_speed_measures(bench, monkeypatch, capsys, what):
    speed = bench("gpu_speed")
    monkeypatch.setattr(speed, "compiled", lambda function: function)
    with pytest.raises(SystemExit) as ended:
        speed.main(speed.Options(what=what, dtype="float32", device="cpu", small=True))
    assert ended.value.code == 0
    assert "| fused |" in (printed := capsys.readouterr().out) and "times as fast" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_the_card_is_skipped(day, tmp_path):
    assert day.run_step(3, day.Options(), tmp_path, time.monotonic() + 20) == day.SKIPPED
    assert "no GPU that torch can use" in (tmp_path / "3-sanitizers.md").read_text()
