"""A run that trains, or was stopped, is measured at a checkpoint, and its backbone exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ifnd_fast.evaluate.backbone import load_backbone
from ifnd_fast.evaluate.classifier import TrainingOptions
from ifnd_fast.evaluate.cluster_images import ClusterOptions
from ifnd_fast.evaluate.export import export
from ifnd_fast.evaluate.false_negatives import false_negatives
from ifnd_fast.evaluate.knn import knn
from ifnd_fast.evaluate.subject import Options, Subject
from ifnd_fast.runtime import checkpoint
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.training.saved_run import load_encoder
from tests.forked import command
from tests.training.test_trainer import metrics, new


@pytest.fixture(scope="module")
def ended(digit_folder, tmp_path_factory) -> Path:
    """A run of 3 epochs, 3 steps each, with all its checkpoints."""
    out = tmp_path_factory.mktemp("ended") / "run"
    new(out, digit_folder, "--keep-checkpoints", 9, "--knn-every", 1).fit()
    return out


@pytest.fixture
def stopped(ended, tmp_path) -> Path:
    """The same, stopped after its second epoch."""
    out = tmp_path / "run"
    shutil.copytree(ended, out)
    for name in ("backbone.pt", "result.json", "checkpoints/step-000000009.pt"):
        (out / name).unlink()
    return out


@pytest.mark.parametrize("step, epoch", [(None, 2), ("latest", 2), (3, 1)])
def test_a_stopped_run_is_measured_at_a_checkpoint(step, epoch, stopped, tmp_path, capsys):
    knn(Options(stopped, step=step, json_file=tmp_path / "knn.json"))
    figures = json.loads((tmp_path / "knn.json").read_text())
    assert (figures["step"], figures["epoch"]) == (3 * epoch, epoch)
    assert figures["knn_top1"] == metrics(stopped)[epoch - 1]["knn_top1"]  # as training measured it then
    said = capsys.readouterr().out
    assert (
        f"measuring {stopped} at step {3 * epoch} (after epoch {epoch})" in said
        and said.count(f"step {3 * epoch}") == 2
    )


def test_the_last_checkpoint_is_the_final_backbone(ended, tmp_path):
    export(ended, out=tmp_path / "last.pt")
    final, last = (torch.load(path, weights_only=True) for path in (ended / "backbone.pt", tmp_path / "last.pt"))
    assert list(final) == list(last) and all(torch.equal(final[name], last[name]) for name in final)
    knn(Options(ended, json_file=tmp_path / "knn.json"))
    assert "step" not in json.loads((tmp_path / "knn.json").read_text())


def test_figures_and_folders_of_other_checkpoints_stay(ended, stopped, tmp_path):
    file, clustering = tmp_path / "figures.json", ClusterOptions()
    false_negatives(Options(ended, step=6, json_file=file), clustering)
    first = file.read_text()
    assert json.loads(first)["source"] == "the run's own labels of epoch 2" and json.loads(first)["step"] == 6
    for step, words in ((9, "holds figures of step 6"), (None, "holds figures of step 6")):
        with pytest.raises(UsageError, match=words):
            false_negatives(Options(ended, step=step, json_file=file), clustering)
        with pytest.raises(UsageError, match=words):
            knn(Options(ended, step=step, json_file=file))
    assert file.read_text() == first
    false_negatives(Options(ended, step=6, json_file=file), clustering)  # the same again
    folders = {
        step: TrainingOptions().folder(Subject(Options(out, step=step)), "linear").name
        for out, step in ((stopped, None), (stopped, 3), (ended, 9))
    }
    name = Path(Subject(Options(ended)).data.data).name
    assert TrainingOptions().folder(Subject(Options(ended)), "linear").name == f"linear-{name}"
    assert folders == {step: f"linear-{name}-step-{step or 6}" for step in folders}


def test_clusters_are_of_that_checkpoints_encoder(ended):
    subject = Subject(Options(ended, step=3))
    encoder = load_encoder(ended, subject.config, subject.state)
    weights = checkpoint.load(checkpoint.path_of(ended, 3))["model"]
    assert all(torch.equal(value, weights[f"key_encoder.{name}"]) for name, value in encoder.state_dict().items())


def test_an_exported_backbone_is_the_runs(stopped, capsys):
    export(stopped, step=3)
    path = stopped / "backbone-step-000000003.pt"
    assert f"{path}: the backbone of {stopped} at step 3 (after epoch 1)" in capsys.readouterr().out
    with pytest.raises(UsageError, match="is there already"):
        export(stopped, step=3)
    config, network, _ = load_backbone(path)
    assert config.data.image_size == 16  # the run's, not that of bare weights
    weights = checkpoint.load(checkpoint.path_of(stopped, 3))["model"]
    assert torch.equal(network.layer1[0].conv1.weight, weights["query_encoder.backbone.layer1.0.conv1.weight"])


def test_a_checkpoint_that_is_not_there_is_named(ended, stopped, tmp_path):
    with pytest.raises(CommandError, match="no checkpoint of step 4, but of 3, 6: .* --keep-checkpoints"):
        knn(Options(stopped, step=4))
    with pytest.raises(UsageError, match="--checkpoint 3 chooses among those of a run: .*backbone.pt"):
        knn(Options(ended / "backbone.pt", step=3))
    shutil.rmtree(stopped / "checkpoints")
    for step in (None, "latest", 3):
        with pytest.raises(CommandError, match="has no checkpoint yet: the first is written after --checkpoint-every"):
            knn(Options(stopped, step=step))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CommandError, match="empty/config.yaml is not the config of a run"):
        knn(Options(tmp_path / "empty", step=3))


def test_the_commands(stopped, tmp_path):
    done = command("evaluate", "knn", stopped, "--checkpoint", 3, "--json-file", tmp_path / "knn.json")
    assert done.returncode == 0 and "step 3 (after epoch 1)" in done.stdout, done.stderr
    done = command("export", stopped, "--checkpoint", 5)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "but of 3, 6" in done.stderr
    done = command("export", stopped)
    assert done.returncode == 0 and (stopped / "backbone-step-000000006.pt").exists(), done.stderr
