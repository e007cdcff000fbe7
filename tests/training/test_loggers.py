"""A run's figures in TensorBoard, Weights & Biases and MLflow, by the packages themselves, offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from ifnd_fast.cli import parse_train
from ifnd_fast.runtime import checkpoint, distributed
from ifnd_fast.runtime.errors import Stopped, UsageError
from ifnd_fast.training import loggers
from ifnd_fast.training.trainer import Trainer
from tests.training.test_trainer import metrics, new


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """MLflow's folder; nothing is sent."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    return tmp_path / "mlruns"


def of_wandb(out: Path) -> Iterator:
    """The records of all files that wandb wrote, which are logs of LevelDB's format."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted(out.glob("wandb/offline-run-*/run-*.wandb")):
        content, at, part = file.read_bytes(), 7, b""
        while at + 7 <= len(content):
            if 32768 - at % 32768 < 7:  # what is left of a block is too short for a header
                at += 32768 - at % 32768
                continue
            length, kind = struct.unpack_from("<HB", content, at + 4)
            part += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record = wandb_internal_pb2.Record()
                record.ParseFromString(part)
                yield record
                part = b""


def wandb_history(out: Path) -> list[dict]:
    histories = [record.history for record in of_wandb(out) if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in h.item} for h in histories]


def test_a_run_and_its_resumption_are_one_run_with_each_tracker(digit_folder, tmp_path, offline):
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    out, client = tmp_path / "run", MlflowClient()
    trainer = new(out, digit_folder, "--wandb", "cats", "--mlflow", "dogs", "--keep-checkpoints", 9)
    train_step = trainer._train_step

    def stop_in_the_third_epoch(*args):
        if trainer.step == 7:
            raise Stopped(15)
        return train_step(*args)

    trainer._train_step = stop_in_the_third_epoch
    with pytest.raises(Stopped):
        trainer.fit()
    experiment = client.get_experiment_by_name("dogs")
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.status == "KILLED" and found.info.run_name == "run"
    assert found.data.params["optim.lr"] == "0.06" and found.data.params["cluster.levels"] == "3, 6"

    resumed = Trainer(parse_train(["--resume", "--out", str(out)]))
    resumed.session.go_on(resumed)
    resumed.fit()
    lines = metrics(out)
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    for name in ("loss", "feature_rank", "false_negatives_per_query/level_1"):
        values = [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]
        assert values == [(line["epoch"], loggers.scalars(line)[name]) for line in lines], name

    history = wandb_history(out)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert [row["loss"] for row in history] == [line["loss"] for line in lines]
    assert history[2]["cluster_inertia/level_0"] == lines[2]["cluster_inertia"][0][-1]
    records = list(of_wandb(out))
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1 and {(run.project, run.display_name) for run in runs} == {
        ("cats", "run")
    }
    assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [1, 0]


def test_figures_are_numbers_by_name():
    line = {"epoch": 1, "step": 9, "loss": 2.0, "a": [1, None], "b": [[3, 2], []], "c": []}
    assert loggers.scalars(line) == {"loss": 2.0, "a/level_0": 1, "b/level_0": 2}


class Broken:
    def __init__(self, config):
        self.closed = False

    def log(self, epoch, figures):
        if epoch == 2:
            raise ConnectionError("no route")

    def close(self, end):
        raise AssertionError("it is given up")


def test_a_tracker_that_fails_is_told_and_training_goes_on(digit_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "MLflow", Broken)
    new(tmp_path / "run", digit_folder, "--mlflow", "dogs").fit()
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    said = capsys.readouterr().err
    assert said.count("warning: --mlflow failed, training goes on without it: ConnectionError: no route") == 1


def test_one_that_can_not_begin_ends_the_run_before_it_trains(digit_folder, tmp_path, monkeypatch):
    def refuse(config):
        raise ConnectionError("no route")

    monkeypatch.setattr(loggers, "WeightsAndBiases", refuse)
    trainer = new(tmp_path / "run", digit_folder, "--wandb", "cats")
    with pytest.raises(UsageError, match="--wandb cats: ConnectionError: no route; .*WANDB_MODE=offline"):
        trainer.fit()
    assert not checkpoint.list_checkpoints(tmp_path / "run")


def test_other_ranks_log_nothing(digit_folder, tmp_path, monkeypatch):
    trainer = new(tmp_path / "run", digit_folder, "--tensorboard")
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with trainer.loggers:
        assert not trainer.loggers.open
