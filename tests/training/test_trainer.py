"""The trainer on small real data: what it writes, that it resumes, and what it does with bad input."""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext

import pytest
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ifnd_fast.cli import parse_train
from ifnd_fast.config import OptimConfig, to_dict, to_yaml
from ifnd_fast.runtime import checkpoint, run_folder
from ifnd_fast.runtime.compute import Compute
from ifnd_fast.runtime.errors import CommandError, NonFiniteError, UsageError
from ifnd_fast.training.trainer import Trainer, learning_rate
from tests.conftest import TINY


def new(out, data, *options) -> Trainer:
    config = parse_train(["--out", str(out), "--data", str(data), *TINY, *map(str, options)])
    trainer = Trainer(config)
    run_folder.create(config.run.out, to_yaml(config))
    return trainer


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_learning_rate_warms_up_and_ends_at_zero():
    config = OptimConfig(epochs=10, lr=0.5, warmup_epochs=2)
    rates = [learning_rate(step, 10, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.5 / 20) and rates[19] == rates[20] == 0.5
    assert rates[60] == pytest.approx(0.25) and rates[100] == pytest.approx(0)
    assert all(a >= b for a, b in zip(rates[20:], rates[21:], strict=False))


@pytest.mark.parametrize("negatives", ["queue", "in-batch"])
@pytest.mark.parametrize("strategy", ["eliminate", "attract", "keep", "oracle"])
def test_every_mode_trains_and_writes_its_run(strategy, negatives, digit_folder, tmp_path):
    out = tmp_path / "run"
    trainer = new(out, digit_folder, "--false-negatives", strategy, "--negatives", negatives)
    before = copy.deepcopy(trainer.model.query_encoder.state_dict())
    result = trainer.fit()
    lines = metrics(out)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines)
    levels = {"eliminate": 2, "attract": 2, "keep": 2, "oracle": 1}[strategy]
    for line in lines:
        for name in ("false_negatives_per_query", "false_negative_precision", "false_negative_recall"):
            assert len(line[name]) == levels
        assert line["images_per_second"] > 0
    found = [sum(line["false_negatives_per_query"]) for line in lines]
    rates = [line["acceptance_rate"] for line in lines]
    if strategy == "keep":
        assert found == [0, 0, 0] and rates == [0, 0, 0]
    elif strategy == "oracle":
        assert rates == [1, 1, 1] and lines[-1]["false_negative_precision"] == [1.0]
        assert lines[-1]["false_negative_recall"] == [1.0]
    else:
        assert rates == [0, 1, 1]  # the demo accepts every label from a quarter on
        assert found[0] == 0 and found[1] > 0 and found[2] > 0
        assert lines[-1]["cluster_seconds"] > 0 and lines[-1]["feature_seconds"] > 0
    assert 0 <= result["knn_top1"] <= 100 and lines[-1]["knn_top1"] == result["knn_top1"]
    after = trainer.model.query_encoder.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))


@pytest.mark.parametrize(
    "options",
    [
        ["--amp", "bf16", "--channels-last"],
        ["--amp", "fp16"],
        ["--kmeans-engine", "faiss", "--spherical"],
        ["--kmeans-restarts", 2, "--acceptance-end", 0.5, "--color-jitter", 0.4, "--blur", 0.5, "--flip"],
        ["--cluster-space", "backbone", "--whiten", 0.5, "--hold-out", 0.2, "--level-combination", "any"],
    ],
)
def test_options_that_change_how_it_computes(options, digit_folder, tmp_path):
    new(tmp_path / "run", digit_folder, *options).fit()
    lines = metrics(tmp_path / "run")
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert sum(lines[-1]["false_negatives_per_query"]) > 0


def test_compiled(digit_folder, tmp_path):
    """On a network of one layer, and without the C++ that torch's compiler would write: that takes it a minute."""
    config = parse_train(["--out", str(tmp_path / "run"), "--data", str(digit_folder), *TINY, "--compile"])
    one_layer = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    trainer = Trainer(config, backbone=one_layer)
    run_folder.create(config.run.out, to_yaml(config))
    compiled = torch._dynamo.utils.counters["stats"]
    before = compiled["unique_graphs"]
    known = hasattr(torch._inductor.config, "fallback_by_default")  # torch 2.8 has it not
    with torch._inductor.config.patch(fallback_by_default=True) if known else nullcontext():
        trainer.fit()
    assert compiled["unique_graphs"] - before == 3  # queries, keys, features
    lines = metrics(tmp_path / "run")
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert sum(lines[-1]["false_negatives_per_query"]) > 0


def test_tensorboard_gets_the_same_figures(digit_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    new(out, digit_folder, "--tensorboard").fit()
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(line["epoch"], pytest.approx(line["loss"])) for line in metrics(out)]
    assert "false_negatives_per_query/level_1" in events.Tags()["scalars"]


def test_tensorboard_after_a_resume_has_each_epoch_once(digit_folder, tmp_path):
    """Killed in its third epoch, before the checkpoint that would have held the second."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    new(out, digit_folder, "--tensorboard", "--keep-checkpoints", 9).fit()
    for path in checkpoint.list_checkpoints(out)[1:]:
        path.unlink()
    first = metrics(out)
    resumed = Trainer(parse_train(["--resume", "--out", str(out)]))
    resumed.session.go_on(resumed)
    resumed.config.optim.lr = 0.01  # or the figures would be the same ones again
    resumed.fit()
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(line["epoch"], pytest.approx(line["loss"])) for line in metrics(out)]
    assert [step for step, _ in losses] == [1, 2, 3] and metrics(out)[2]["loss"] != first[2]["loss"]


@pytest.mark.parametrize("options", [[], ["--features", "bank"]])
def test_async_clustering_is_an_epoch_late(options, flat_folder, tmp_path):
    """Labels clustered before an epoch are in use after it, as many as that epoch accepts, and not earlier."""
    trainer = new(tmp_path / "run", flat_folder, "--cluster-async", "--epochs", 4, *options)
    labeller, used = trainer.labeller, []
    train_epoch = trainer._train_epoch

    def watched(*args):
        began = labeller.job.background is not None
        used.append((began, labeller.labels.acceptance_rate, labeller.labels.accepted.clone()))
        return train_epoch(*args)

    trainer._train_epoch = watched
    trainer.fit()
    assert [began for began, *_ in used] == [False, True, True, False]  # those of the last epoch would be too late
    assert [rate for _, rate, _ in used] == pytest.approx([0, 0, 1, 1])
    assert (used[1][2] == -1).all() and (used[2][2] >= 0).float().mean() > 0.75
    assert not torch.equal(used[2][2], used[3][2])
    lines = metrics(tmp_path / "run")
    assert "cluster_largest" not in lines[1] and len(lines[2]["cluster_level_seconds"]) == 2
    seen = int((used[2][2] >= 0).all(1).sum())
    assert lines[2]["cluster_level_bytes"] == [4 * 16 * clusters + 8 * seen for clusters in (3, 6)]


def test_what_fails_in_the_background_fails_the_run(flat_folder, tmp_path):
    trainer = new(tmp_path / "run", flat_folder, "--cluster-async")

    def fit(*_, **__):
        raise ValueError("too few")

    trainer.labeller.job.pseudo_labels.fit = fit
    with pytest.raises(CommandError, match="clustering failed after epoch 1: too few"):
        trainer.fit()


def test_backbone_is_torchvisions(digit_folder, tmp_path):
    trainer = new(tmp_path / "run", digit_folder, "--arch", "resnet18", "--stem", "imagenet", "--width", 64,
                  "--image-size", 32, "--epochs", 1)  # fmt: skip
    trainer.fit()
    state = torch.load(tmp_path / "run" / "backbone.pt", weights_only=True)
    network = torchvision.models.resnet18()
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
    assert torch.equal(network.conv1.weight, trainer.model.query_encoder.backbone.conv1.weight)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--features", "bank"],
        ["--negatives", "in-batch"],
        ["--false-negatives", "attract", "--workers", 1],
        ["--cluster-async", "--epochs", 4],
        ["--augment", "device", "--color-jitter", 0.4, "--flip", "--workers", 1],
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(options, digit_folder, tmp_path):
    """Stopped after its 5th step (in the second epoch, two checkpoints into it), started again in new objects."""
    options = [*options, "--checkpoint-every", 0.34]
    whole = new(tmp_path / "whole", digit_folder, *options)
    whole.fit()
    if "device" in options:
        options += ["--cache", tmp_path / "cache"]

    class Stop(Exception):
        pass

    stopped = new(tmp_path / "stopped", digit_folder, *options)
    train_step = stopped._train_step

    def step_or_stop(*args):
        if stopped.step == 5:
            raise Stop
        return train_step(*args)

    stopped._train_step = step_or_stop
    with pytest.raises(Stop):
        stopped.fit()
    assert checkpoint.load_latest(tmp_path / "stopped")["step"] == 5
    config = parse_train(["--resume", "--out", str(tmp_path / "stopped")])
    torch.manual_seed(1234)
    resumed = Trainer(config)
    resumed.session.go_on(resumed)
    resumed.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert torch.equal(whole.labeller.labels.accepted, resumed.labeller.labels.accepted)
    ignored = {"images_per_second", "seconds", "feature_seconds", "cluster_seconds", "cluster_level_seconds"}
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "stopped"), strict=True):
        assert {k: v for k, v in a.items() if k not in ignored} == {k: v for k, v in b.items() if k not in ignored}


def test_metrics_after_the_checkpoint_are_dropped_on_resume(digit_folder, tmp_path):
    out = tmp_path / "run"
    new(out, digit_folder, "--epochs", 2).fit()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "loss": 1}\n{"epoch": 4, "lo')
    resumed = Trainer(parse_train(["--resume", "--out", str(out)]))
    resumed.session.go_on(resumed)
    assert [line["epoch"] for line in metrics(out)] == [1, 2]


def test_a_checkpoint_of_another_model_or_data_is_refused(digit_folder, tmp_path):
    new(tmp_path / "a", digit_folder, "--epochs", 1).fit()
    other = new(tmp_path / "b", digit_folder, "--dim", 8)
    state = checkpoint.load_latest(tmp_path / "a")
    with pytest.raises(UsageError, match="--dim: the run has 16, asked for 8"):
        other.load_state_dict(state)
    with pytest.raises(CommandError, match="does not fit"):
        other.load_state_dict({**state, "config": to_dict(other.config)})


def test_a_run_killed_before_its_first_checkpoint_begins_anew(digit_folder, tmp_path, capsys):
    out = tmp_path / "run"
    new(out, digit_folder)
    (out / "metrics.jsonl").write_text('{"epoch": 1, "loss": 1}\n')
    resumed = Trainer(parse_train(["--resume", "--out", str(out)]))
    resumed.session.go_on(resumed)
    resumed.fit()
    assert "no checkpoint yet: beginning anew" in capsys.readouterr().out
    assert [line["epoch"] for line in metrics(out)] == [1, 2, 3] and metrics(out)[0]["loss"] != 1


def test_a_checkpoint_of_other_options_than_the_config_is_refused(digit_folder, tmp_path):
    out = tmp_path / "run"
    new(out, digit_folder).save()
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace("lr: 0.06", "lr: 0.07"))
    with pytest.raises(UsageError, match="--lr: the run has 0.06, asked for 0.07"):
        resumed = Trainer(parse_train(["--resume", "--out", str(out)]))
        resumed.session.go_on(resumed)


def test_unlabelled_images_train_without_measuring(flat_folder, tmp_path):
    out = tmp_path / "run"
    result = new(out, flat_folder).fit()
    assert "knn_top1" not in result and "false_negative_precision" not in metrics(out)[0]
    with pytest.raises(UsageError, match="oracle"):
        new(tmp_path / "other", flat_folder, "--false-negatives", "oracle")


def test_a_queue_longer_than_the_data_masks_the_images_own_keys(flat_folder, tmp_path):
    trainer = new(tmp_path / "run", flat_folder, "--queue-size", 300)
    trainer.fit()
    assert trainer.objective.queue.count == 288 and math.isfinite(metrics(tmp_path / "run")[-1]["loss"])


def test_more_clusters_than_images_are_scaled_down_or_refused(digit_folder, tmp_path, capsys):
    trainer = new(tmp_path / "run", digit_folder, "--levels", 100, 240)
    assert trainer.labeller.levels == (12, 30)
    assert "--levels 100 240 scaled to 12 30: at most one cluster for every 4 images" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--strict"):
        new(tmp_path / "other", digit_folder, "--levels", 240, "--strict")


def test_a_batch_larger_than_the_data_is_refused(digit_folder, tmp_path):
    with pytest.raises(UsageError, match="--batch-size 500 .*120 images"):
        new(tmp_path / "run", digit_folder, "--batch-size", 500)


def test_synchronised_batch_norm_is_refused_on_a_cpu(digit_folder, tmp_path):
    with pytest.raises(UsageError, match="--sync-bn.*GPUs"):
        new(tmp_path / "run", digit_folder, "--sync-bn")


def test_identical_images_say_why_they_cannot_be_clustered(digit_folder, tmp_path):
    folder = tmp_path / "same"
    folder.mkdir()
    one = next(iter(digit_folder.rglob("*.png"))).read_bytes()
    for number in range(40):
        (folder / f"{number}.png").write_bytes(one)
    with pytest.raises(CommandError, match="distinct"):
        new(tmp_path / "run", folder).fit()


@pytest.mark.parametrize("strict", [False, True])
def test_unreadable_images_are_counted_or_stop_the_run(strict, flat_folder, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for file in flat_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "007.png").write_bytes(b"broken")
    trainer = new(tmp_path / "run", folder, *(["--strict"] if strict else []))
    if strict:
        with pytest.raises(CommandError, match="007.png"):
            trainer.fit()
        return
    trainer.fit()
    error = capsys.readouterr().err
    assert error.count("007.png") == 1 and list(trainer.unreadable.reasons) == [7]
    reason = "no picture in a format that can be read here"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["unreadable"] == [{"image": str(folder / "007.png"), "reason": reason}]
    assert f"unreadable image skipped: {folder / '007.png'}: {reason} (1 so far)" in error
    again = Trainer(parse_train(["--resume", "--out", str(tmp_path / "run")]))
    again.session.go_on(again)
    assert again.unreadable.reasons == {7: reason}
    assert (trainer.labeller.labels.accepted[7] == -1).all()


def test_a_nan_stops_the_run_with_the_step(flat_folder, tmp_path):
    trainer = new(tmp_path / "run", flat_folder)
    loss = trainer.objective.loss
    trainer.objective.loss = lambda *args: loss(*args) * (math.nan if trainer.step == 3 else 1)
    with pytest.raises(NonFiniteError, match="the loss is not finite at step 4.*step-000000003.pt"):
        trainer.fit()


def test_the_first_tensor_that_is_not_finite_is_named(flat_folder, tmp_path):
    trainer = new(tmp_path / "run", flat_folder)
    update = trainer.model.update_key_encoder

    def break_weights():
        update()
        if trainer.step == 3:
            next(trainer.model.key_encoder.parameters()).data.fill_(math.nan)

    trainer.model.update_key_encoder = break_weights
    with pytest.raises(NonFiniteError, match="the keys are not finite at step 5"):
        trainer.fit()


def test_steps_that_the_scaler_skips_are_counted(flat_folder, tmp_path, capsys):
    trainer = new(tmp_path / "run", flat_folder, "--amp", "fp16")
    trainer.optimization.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)  # the default overflows at first
    scale = trainer.optimization.scaler.scale
    trainer.optimization.scaler.scale = lambda loss: scale(loss) * (math.inf if trainer.step in (1, 4, 5) else 1)
    trainer.fit()
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run")] == [1, 2, 0]
    assert capsys.readouterr().out.count("steps skipped") == 2
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())


@pytest.mark.parametrize("options", [[], ["--negatives", "in-batch"], ["--features", "bank"]])
def test_contrast_in_half_precision(options, flat_folder, tmp_path, monkeypatch):
    """What GPUs with mixed precision do, here on the CPU: queries, keys, queue and features in float16."""
    new(tmp_path / "single", flat_folder, *options).fit()
    monkeypatch.setattr(Compute, "contrast_dtype", torch.float16)
    trainer = new(tmp_path / "half", flat_folder, *options)
    trainer.fit()
    if trainer.config.contrast.negatives == "queue":
        assert trainer.objective.queue.features.dtype == torch.float16
    first, second = (metrics(tmp_path / name)[0]["loss"] for name in ("single", "half"))
    assert second == pytest.approx(first, rel=2e-3) and second != first
    assert sum(metrics(tmp_path / "half")[-1]["false_negatives_per_query"]) > 0


class CountWaits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: a number read from a tensor, a shape that depends on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")
        if any(name in str(function) for name in names):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


class CountCopies(TorchFunctionMode):
    """Adds to those the tensors of the host's numbers: torch.tensor(..., device=...) copies them and waits for it."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor):
            self.found.append(f"{function.__name__} {args}")
        return function(*args, **(kwargs or {}))


STEPS = [
    [], ["--negatives", "in-batch"], ["--false-negatives", "attract", "--features", "bank"],
    ["--augment", "device", "--color-jitter", 0.4, "--grayscale", 0.2, "--blur", 0.5, "--image-size", 20],
]  # fmt: skip


@pytest.mark.parametrize("options", STEPS)
def test_a_step_never_waits_for_the_device(options, flat_folder, tmp_path):
    trainer = new(tmp_path / "run", flat_folder, *options)
    train_step, waits = trainer._train_step, CountWaits()

    def watched(*args):
        with waits, CountCopies(waits.found):
            assert torch.tensor(1).item() and len(waits.found) == 2, waits.found  # or it would see nothing
            waits.found.clear()
            return train_step(*args)

    trainer._train_step = watched
    trainer.fit()
    assert waits.found == []
