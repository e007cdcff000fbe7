"""Classifiers on a backbone: what is trained, at which rate, and going on after a stop."""

from __future__ import annotations

import copy
import json
import os
import signal
import time

import pytest
import torch

from ifnd_fast.evaluate import classifier
from ifnd_fast.evaluate.classifier import ClassifierTraining, TrainingOptions, top_accuracies
from ifnd_fast.evaluate.labelled import open_labelled
from ifnd_fast.evaluate.subject import Options, Subject
from ifnd_fast.runtime import checkpoint
from ifnd_fast.runtime.errors import NonFiniteError, Stopped, UsageError
from tests.forked import command, start


@pytest.fixture
def new(untrained_run, class_folders, tmp_path):
    """A function that makes trainings of the 240 digits of class_folders, 4 epochs of 5 steps by default."""

    def make(name: str = "out", lr: float = 1.0, backbone_lr: float | None = None, **options) -> ClassifierTraining:
        subject = Subject(Options(untrained_run, data=str(class_folders), device="cpu"))
        train, _ = open_labelled(subject.data)
        options = TrainingOptions(**{"epochs": 4, "batch_size": 48, "out": tmp_path / name} | options)
        return ClassifierTraining(subject, train, 6, options, lr, backbone_lr, tmp_path / name)

    return make


def weights(training: ClassifierTraining) -> dict[str, torch.Tensor]:
    return copy.deepcopy(training.model.state_dict())


def test_a_frozen_backbone_stays_as_it_is_with_its_batch_norm(new):
    training = new()
    before = weights(training)
    training.fit()
    for name, value in weights(training).items():
        assert torch.equal(value, before[name]) == name.startswith("backbone"), name


def test_fine_tuning_moves_all_but_the_subject(new):
    training = new(backbone_lr=0.1)
    before = weights(training)
    training.fit()
    after = weights(training)
    assert all(not torch.equal(after[name], before[name]) for name in after)
    kept = training.subject.network.state_dict()
    assert all(torch.equal(value, before[f"backbone.{name}"]) for name, value in kept.items())


def test_it_learns_digits(new, class_folders):
    training = new(lr=0.3, epochs=20, crop_min=0.85)
    _, test = open_labelled(training.subject.data)
    untrained = training.test(test)
    training.fit()
    trained = training.test(test)
    assert trained["top1"] > max(50, untrained["top1"] + 25) and trained["top5"] > 90  # logistic regression: 65


def test_the_rates_drop_where_asked(new):
    training = new(lr=8.0, backbone_lr=0.5, drops=(0.5, 0.75), drop_factor=0.25)
    rates, step = [], training._train_step

    def watched(*args):
        loss = step(*args)
        rates.append([group["lr"] for group in training.optimizer.param_groups])
        return loss

    training._train_step = watched
    training.fit()
    assert rates == 10 * [[8.0, 0.5]] + 5 * [[2.0, 0.125]] + 5 * [[0.5, 0.03125]]


@pytest.mark.parametrize("backbone_lr, number", [(None, signal.SIGTERM), (0.05, signal.SIGUSR2), (None, signal.SIGHUP)])
def test_stopped_within_an_epoch_it_goes_on_to_the_same_weights(backbone_lr, number, new, tmp_path):
    whole = new("whole", backbone_lr=backbone_lr)
    whole.fit()
    stopped = new("stopped", backbone_lr=backbone_lr)
    step = stopped._train_step

    def step_and_signal(*args):
        if stopped.step == 7:
            os.kill(os.getpid(), number)
        return step(*args)

    stopped._train_step = step_and_signal
    with pytest.raises(Stopped, match=f"{number.name}; .*step-000000008.pt; to go on, add --resume") as error:
        stopped.fit()
    assert error.value.exit_code == 128 + number
    resumed = new("stopped", backbone_lr=backbone_lr, resume=True)
    torch.manual_seed(1234)
    resumed.fit()
    assert resumed.step == 20
    expected, got = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_an_interrupted_long_epoch_has_checkpoints(new, monkeypatch, tmp_path):
    monkeypatch.setattr(classifier, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    written = []
    monkeypatch.setattr(checkpoint, "save", lambda out, state, keep: written.append(state["step"]))
    new(epochs=1).fit()
    assert written == [1, 2, 3, 4, 5]


def test_what_is_there_is_neither_overwritten_nor_mixed(new):
    new(epochs=1).fit()
    with pytest.raises(UsageError, match="already holds a run: add --resume"):
        new(epochs=1).fit()
    with pytest.raises(UsageError, match="other options:\n  epochs: the run has 1, asked for 2\n  lr of the"):
        new(epochs=2, lr=2.0, resume=True).fit()
    done = new(epochs=1, resume=True)
    done.fit()
    assert done.step == 5


def test_a_loss_that_is_not_finite_is_named(new):
    with pytest.raises(NonFiniteError, match="epoch 1; there is no checkpoint yet; a lower --lr than 1e"):
        new(lr=1e38).fit()


def test_a_loss_above_that_of_guessing_is_said_when_it_begins_and_when_training_ends_so(new, capsys):
    new(lr=1e4, drops=()).fit()
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("is above log(6 classes) = 1.792, which guessing has") == 2
    assert "the loss of epoch 1, " in told and "epoch 4" in told
    assert told.count("the figures may tell of its training more than of the features") == 1
    new("tame", lr=0.001).fit()
    assert "guessing" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        ({"epochs": 0}, "--epochs must be 1 or more, got 0"),
        ({"batch_size": 1}, "--batch-size must be 2 or more"),
        ({"drops": (0.5, 60)}, r"--drops must be shares of the epochs, from 0 to 1, got \(0.5, 60\)"),
        ({"crop_min": 0.0}, "--crop-min"),
        ({"weight_decay": -1.0}, "--weight-decay"),
    ],
)
def test_options_out_of_range(change, words):
    with pytest.raises(UsageError, match=words):
        TrainingOptions(**change).check()


def test_top_accuracies():
    logits = torch.eye(8)[[0, 1, 2, 3]] + torch.linspace(0, 0.7, 8)  # runners-up: 7, 6, 5, ...
    assert top_accuracies(logits, torch.tensor([0, 7, 4, 3])) == {"top1": 50.0, "top5": 100.0}
    assert top_accuracies(logits, torch.tensor([1, 2, 3, 4])) == {"top1": 0.0, "top5": 25.0}
    assert top_accuracies(logits[:, :3], torch.tensor([0, 1, 2, 2])) == {"top1": 100.0}


def test_a_killed_evaluation_goes_on_to_the_same_figures(untrained_run, class_folders, tmp_path):
    """Of real processes, whatever the number of loading processes."""
    args = ["linear", untrained_run, "--data", class_folders, "--epochs", "12", "--batch-size", "48", "--lr", "0.3"]
    whole = command("evaluate", *args, "--out", tmp_path / "whole", "--json-file", tmp_path / "whole.json")
    assert whole.returncode == 0, whole.stderr
    assert "epoch 12/12" in whole.stdout and "top-1" in whole.stdout and "lr 0.003" in whole.stdout

    out = tmp_path / "killed"
    code = "from ifnd_fast.cli import evaluate; evaluate()"
    process = start(code, *args, "--out", out)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert list(out.glob("checkpoints/step-*.pt")) and not (out / "result.json").exists()
    done = command("evaluate", *args, "--out", out, "--resume", "--workers", 1, "--json-file", tmp_path / "killed.json")
    assert done.returncode == 0, done.stderr
    assert "going on with" in done.stdout
    expected, got = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "killed"))
    assert got == expected and expected["top1"] > 40
    heads = [checkpoint.load_latest(tmp_path / name)["model"]["weight"] for name in ("whole", "killed")]
    assert torch.equal(*heads)
