"""What --amp auto comes to on a CPU: measured once, kept with the run, the same on all ranks, and without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ifnd_fast.cli import parse_train
from ifnd_fast.config import Config, load
from ifnd_fast.evaluate.subject import Options, Subject
from ifnd_fast.ops import backends
from ifnd_fast.runtime.compute import pick_compute
from ifnd_fast.training import precision
from ifnd_fast.training.trainer import Trainer
from tests.conftest import TINY
from tests.forked import run_ranks

ON_CPU = pick_compute("cpu", "auto")


@pytest.fixture(autouse=True)
def a_cpu_with_bfloat16(monkeypatch):
    monkeypatch.setattr(backends, "cpu_has_bfloat16", lambda: True)


def refuse(*_):
    raise AssertionError("nothing should be measured")


@pytest.mark.parametrize(
    "off, bf16, chosen", [(2.0, 1.0, "bf16"), (1.0, 2.0, "off"), (1.0, 1.0, "off"), (1, 0.99, "off")]
)
def test_bfloat16_has_to_be_faster(off, bf16, chosen):
    assert precision.choose({"off": off, "bf16": bf16}) == chosen


@pytest.mark.parametrize("rows, image_seconds, n, rounds", [(128, 1e-4, 128, 9), (128, 0.01, 50, 3), (3, 10.0, 3, 3)])
def test_precisions_take_turns_within_some_seconds_and_medians_count(rows, image_seconds, n, rounds):
    """`image_seconds` of float32, of which bfloat16 takes the same; the third pass of all images is disturbed."""
    passes: list[tuple[str, int]] = []

    def run(amp: str, n: int) -> float:
        passes.append((amp, n))
        return image_seconds * n * (50 if len(passes) in (9, 10) else 1)

    seconds, found = precision.measure(run, rows)
    assert found == n and [amp for amp, _ in passes] == ["off", "bf16"] * (len(passes) // 2)
    assert [size for _, size in passes[6:]] == [n] * (2 * rounds)
    assert seconds == pytest.approx({"off": image_seconds * n, "bf16": image_seconds * n})


def test_only_auto_on_a_cpu_that_may_gain_is_measured(monkeypatch):
    monkeypatch.setattr(precision, "measure", refuse)
    on_gpu = ON_CPU.__class__(torch.device("cuda"), torch.bfloat16)
    config = Config()
    assert precision.settle(config, on_gpu) is on_gpu
    for amp in ("off", "bf16", "fp16"):
        config.run.amp = amp
        assert precision.settle(config, pick_compute("cpu", amp)) == pick_compute("cpu", amp)
    assert config.amp_on_cpu == ""
    config.run.amp = "auto"
    monkeypatch.setattr(backends, "cpu_has_bfloat16", lambda: False)
    assert precision.settle(config, ON_CPU).amp is None and config.amp_on_cpu == "off"


class Dropping(nn.Module):
    """Features (B, 8), with batch statistics and chance."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    def forward(self, images):
        return self.layers(images)


@pytest.mark.parametrize("negatives", ["queue", "in-batch"])
def test_measuring_leaves_no_trace(negatives, flat_folder, tmp_path, monkeypatch, capsys):
    """A run ends with the same bits as one that names the precision."""
    monkeypatch.setattr(precision, "choose", lambda seconds: "bf16")
    ended = []
    for amp in ("auto", "bf16"):
        torch.manual_seed(0)
        config = parse_train(["--out", str(tmp_path / amp), "--data", str(flat_folder), *TINY, "--epochs", "1",
                              "--knn-every", "0", "--negatives", negatives, "--amp", amp])  # fmt: skip
        trainer = Trainer(config, backbone=Dropping())
        assert trainer.compute.amp == torch.bfloat16 and trainer.encoder.backbone.layers[2].num_batches_tracked == 0
        with trainer.open():
            trainer.fit()
        ended.append([*trainer.model.state_dict().values(), trainer.state_dict()["rng"]["cpu"]])
    assert len(ended[0]) == len(ended[1]) and all(map(torch.equal, *ended))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--amp")]
    assert (
        len(said) == 1 and said[0].startswith("--amp auto: bf16 on this CPU, where") and said[0].count(" ms in ") == 2
    )


@pytest.mark.parametrize("chosen", ["off", "bf16"])
def test_a_run_keeps_what_was_chosen(chosen, flat_folder, tmp_path, monkeypatch):
    """Also where this CPU would choose otherwise, or lacks bfloat16, and for who measures the run."""
    out = tmp_path / "run"
    monkeypatch.setattr(precision, "measure", lambda run, rows: ({"off": 1.0, "bf16": 1.0}, rows))
    monkeypatch.setattr(precision, "choose", lambda seconds: chosen)
    trainer = Trainer(parse_train(["--out", str(out), "--data", str(flat_folder), *TINY, "--amp", "auto"]))
    with trainer.open():
        next(trainer.epochs())
    monkeypatch.setattr(precision, "measure", refuse)
    monkeypatch.setattr(backends, "cpu_has_bfloat16", lambda: chosen == "off")
    expected = {"off": None, "bf16": torch.bfloat16}[chosen]
    for options in ([], ["--amp", "auto"]):
        resumed = Trainer(parse_train(["--resume", "--out", str(out), *options]))
        with resumed.open():
            assert resumed.compute.amp == expected and resumed.epoch == 1
    assert load(out / "config.yaml").amp_on_cpu == chosen
    assert (
        Subject(Options(out)).compute.amp == expected and Subject(Options(out, amp="fp16")).compute.amp == torch.float16
    )


def test_runs_of_earlier_versions_go_on_as_they_were(monkeypatch):
    """They took bfloat16 where the CPU multiplies it."""
    monkeypatch.setattr(precision, "measure", refuse)
    config = Config()
    config.run.resume = True
    assert precision.settle(config, ON_CPU).amp == torch.bfloat16 and config.amp_on_cpu == ""


RANKS = """
import torch
from ifnd_fast.config import Config
from ifnd_fast.ops import backends
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.compute import pick_compute
from ifnd_fast.training import precision
distributed.start(torch.device("cpu"))
backends.cpu_has_bfloat16 = lambda: True
precision.measure = lambda run, rows: ({"off": 1.0, "bf16": 0.5 if distributed.rank() else 2.0}, rows)
config = Config()
assert precision.settle(config, pick_compute("cpu", "auto")).amp is None and config.amp_on_cpu == "off"
distributed.stop()
"""


def test_all_ranks_take_what_the_first_chose(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = run_ranks(2, script)
    assert done.returncode == 0, done.stderr[-3000:]
