"""A detector fine-tuned on the scenes of tests/scenes.py: what it starts from, learns, writes and resumes."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.detection import faster_rcnn
from torchvision.ops import FrozenBatchNorm2d

from ifnd_fast.config import PRESETS, to_yaml
from ifnd_fast.contrast.encoder import resnet
from ifnd_fast.data.views import to_input
from ifnd_fast.evaluate.backbone import load_backbone
from ifnd_fast.evaluate.detection import coco, mask_rcnn
from ifnd_fast.evaluate.detection.fine_tuning import FineTuning
from ifnd_fast.evaluate.detection.options import DetectionOptions, learning_rate, resolve
from ifnd_fast.runtime import checkpoint, run_folder
from ifnd_fast.runtime.compute import pick_compute
from ifnd_fast.runtime.errors import CommandError, NonFiniteError, Stopped, UsageError
from tests.forked import python, run_ranks


def few_proposals() -> None:
    """torchvision's model with few proposals and a narrow box head: a step takes tenths of a second, not seconds."""
    mask_rcnn.MaskRCNN = functools.partial(
        mask_rcnn.MaskRCNN, box_batch_size_per_image=16, box_detections_per_img=8, rpn_post_nms_top_n_train=64,
        rpn_post_nms_top_n_test=16,
    )  # fmt: skip
    faster_rcnn.TwoMLPHead = lambda n_in, n_out: nn.Sequential(
        nn.Flatten(), nn.Linear(n_in, 8), nn.ReLU(), nn.Linear(8, n_out), nn.ReLU()
    )


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module, name in ((mask_rcnn, "MaskRCNN"), (faster_rcnn, "TwoMLPHead")):
        monkeypatch.setattr(module, name, getattr(module, name))
    few_proposals()


@pytest.fixture(scope="module")
def run(coco_folder, tmp_path_factory) -> Path:
    """The folder of a run whose tiny backbone has seen the images, so that its batch norm has their statistics."""
    out = tmp_path_factory.mktemp("run")
    config = copy.deepcopy(PRESETS["demo"][1])
    config.model.width, config.model.stem, config.run.out = 8, "imagenet", out
    torch.manual_seed(0)
    network, _ = resnet(config.model)
    images = coco.CocoImages(*coco.find("train", coco_folder, None, None))
    pixels = torch.stack([images.image(index) for index in range(len(images))])
    views = to_input(pixels, config.data, torch.device("cpu"))
    for _ in range(20):
        network(views)
    run_folder.create(config.run.out, to_yaml(config))
    torch.save(network.state_dict(), out / "backbone.pt")
    return out


TINY = {"iterations": 6, "batch_size": 2, "lr": 0.002, "min_size": (64,), "workers": 0, "log_every": 2,
        "checkpoint_every": 3}  # fmt: skip
FLAGS = [text for name, value in TINY.items() for text in (
    f"--{name.replace('_', '-')}", str(value[0] if isinstance(value, tuple) else value))]  # fmt: skip


def tuning(run: Path, data: Path, out: Path, **options) -> FineTuning:
    wanted = DetectionOptions(run, data=data, out=out, **{**TINY, **options})
    return FineTuning(load_backbone(run), wanted, pick_compute("cpu", wanted.amp))


COMMAND = """
from tests.evaluate.detection.test_fine_tuning import few_proposals
from ifnd_fast.cli import evaluate
few_proposals()
evaluate()
"""


KILLED = """
import os, signal
from ifnd_fast.evaluate.detection.fine_tuning import FineTuning
train_step = FineTuning._train_step
def deadly(self, *args):
    if self.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, *args)
FineTuning._train_step = deadly
"""


def task(*args: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """ifnd-fast-eval detection in a process of its own."""
    return python(before + COMMAND, "detection", *args)


@pytest.fixture(scope="module")
def whole(run, coco_folder, tmp_path_factory) -> tuple[Path, str]:
    """A fine-tuning that nobody disturbed, and what it said."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = task(run, "--data", coco_folder, "--out", out, *FLAGS, "--json-file", out / "figures.json")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def lines_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def test_it_starts_from_the_checkpoints_weights_bit_for_bit(run, coco_folder, tmp_path):
    saved = torch.load(run / "backbone.pt", weights_only=True)
    for batch_norm in ("frozen", "sync"):
        model = tuning(run, coco_folder, tmp_path, batch_norm=batch_norm).model
        body = model.backbone.body.state_dict()
        assert set(body) == {name for name in saved if batch_norm == "sync" or "num_batches" not in name}
        assert all(torch.equal(value, saved[name]) for name, value in body.items())
        assert all(parameter.requires_grad for parameter in model.parameters())
        kinds = {type(module) for module in model.modules()}
        assert (FrozenBatchNorm2d in kinds) == (batch_norm == "frozen")
        assert (nn.BatchNorm2d in {type(m) for m in model.backbone.fpn.modules()}) == (batch_norm == "sync")
    network = load_backbone(run).network  # the same function, too
    images = torch.rand(2, 3, 64, 64)
    expected = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(images)))))
    frozen = tuning(run, coco_folder, tmp_path).model.train().backbone.body(images)["0"]
    torch.testing.assert_close(frozen, expected)


def test_frozen_batch_norm_stays_and_all_else_moves(run, whole):
    saved = torch.load(run / "backbone.pt", weights_only=True)
    tuned = torch.load(whole[0] / "model.pt", weights_only=True)
    moved = {name for name, value in saved.items() if "num_batches" not in name
             and not torch.equal(tuned[f"backbone.body.{name}"], value)}  # fmt: skip
    assert moved == {name for name in saved if name.endswith("weight") and saved[name].ndim == 4}


def test_trained_batch_norm_moves(run, coco_folder, tmp_path):
    it = begun(run, coco_folder, tmp_path / "out", iterations=1, batch_norm="sync")
    before = copy.deepcopy(it.model.state_dict())
    it._train(it.model)
    after = it.model.state_dict()
    for name in ("backbone.body.bn1.running_mean", "backbone.body.bn1.weight", "backbone.fpn.inner_blocks.0.1.weight"):
        assert not torch.equal(before[name], after[name]), name
    decays = {group["weight_decay"]: len(group["params"]) for group in it.optimizer.param_groups}
    assert decays.keys() == {1e-4, 0.0}
    n_norms = sum(isinstance(module, nn.BatchNorm2d) for module in it.model.modules())
    assert decays[0.0] == 2 * n_norms


def test_the_loss_falls_and_figures_are_written(whole, coco_folder):
    out, said = whole
    lines = lines_of(out)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    parts = [name for name in lines[0] if name.startswith("loss_")]
    assert len(parts) == 5 and lines[0]["loss"] == pytest.approx(sum(lines[0][name] for name in parts))
    result = json.loads((out / "result.json").read_text())
    assert result == json.loads((out / "figures.json").read_text())
    assert result["batch_norm"] == "frozen" and result["drops"] == [4, 5] and 0 <= result["box_AP"] <= 100
    assert "5 images to train on (1 without an object left out), 4 to measure on, 3 categories" in said
    assert "iteration 6/6" in said and "AP75" in said and "mask" in said
    content = json.loads((coco_folder / "annotations" / "instances_val2017.json").read_text())
    detections = json.loads((out / "detections.json").read_text())
    assert {one["image_id"] for one in detections} <= {image["id"] for image in content["images"]}
    assert detections and {one["category_id"] for one in detections} <= {3, 7, 90}


@pytest.mark.timeout(600)  # two processes, one after the other
def test_a_killed_run_ends_with_the_same_numbers(whole, run, coco_folder, tmp_path):
    out = tmp_path / "out"
    killed = task(run, "--data", coco_folder, "--out", out, *FLAGS, before=KILLED)
    assert killed.returncode == -signal.SIGKILL and [line["step"] for line in lines_of(out)] == [2, 4]
    assert [path.name for path in checkpoint.list_checkpoints(out)] == ["step-000000003.pt"]
    it = tuning(run, coco_folder, out)
    with pytest.raises(UsageError, match="already holds a run: add --resume"), it.open():
        pass
    resumed = task(run, "--data", coco_folder, "--out", out, *FLAGS, "--resume")
    assert resumed.returncode == 0 and "after step 3" in resumed.stdout, resumed.stderr
    assert lines_of(out) == lines_of(whole[0])
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in (out, whole[0])]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    for name in ("result.json", "detections.json"):
        contents = [json.loads((folder / name).read_text()) for folder in (out, whole[0])]
        if name == "result.json":
            contents = [{key: value for key, value in one.items() if key != "seconds"} for one in contents]
        assert contents[0] == contents[1]


@pytest.mark.parametrize("moved", [False, True])
def test_data_may_move_but_not_change(moved, run, coco_folder, tmp_path):
    it = begun(run, coco_folder, tmp_path / "out")
    with it.open():
        it.step = 3
        it.save()
    shutil.copytree(coco_folder, tmp_path / "other")
    if not moved:
        (tmp_path / "other" / "val2017" / "000000000001.png").write_bytes(b"other")
    resumed = tuning(run, tmp_path / "other", tmp_path / "out", resume=True)
    if moved:
        with resumed.open():
            assert resumed.step == 3
    else:
        changed = r"val images: 1 of another size \(000000000001.png\)"
        with pytest.raises(UsageError, match=changed), resumed.open():
            pass


def begun(*args, **options) -> FineTuning:
    """A fine-tuning that has its folder."""
    it = tuning(*args, **options)
    it.out.mkdir()
    return it


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(number, run, coco_folder, tmp_path, monkeypatch):
    it = begun(run, coco_folder, tmp_path / "out", checkpoint_every=100)
    step = it._train_step

    def signalled(*args):
        if it.step == 1:
            os.kill(os.getpid(), number)
        return step(*args)

    monkeypatch.setattr(it, "_train_step", signalled)
    with pytest.raises(Stopped, match=number.name), it.session.stop:
        it.fit()
    assert checkpoint.load_latest(it.out)["step"] == 2


def test_what_a_resumed_run_may_not_change(whole, run, coco_folder):
    it = tuning(run, coco_folder, whole[0], lr=0.02, resume=True)
    with pytest.raises(UsageError, match="--lr: the run has 0.002, asked for 0.02"), it.open():
        pass
    it = tuning(run, coco_folder, whole[0], resume=True, log_every=1)
    it.session.go_on(it)
    assert it.step == 6


def test_a_loss_that_is_not_finite_stops_the_run(run, coco_folder, tmp_path):
    it = begun(run, coco_folder, tmp_path / "out")
    with torch.no_grad():
        it.model.rpn.head.cls_logits.bias.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="loss_objectness, loss not finite at iteration 1; there is no checkpoint"):
        it.fit()
    assert it.step == 0


def spoil(images, index: int) -> str:
    """The image's name is now another's, which isn't there."""
    images.coco.imgs[images.image_ids[index]]["file_name"] = "gone.png"
    return images.name(index)


def test_the_next_image_stands_in_for_one_that_cannot_be_read(run, coco_folder, tmp_path, capfd):
    it = begun(run, coco_folder, tmp_path / "out", batch_size=5, workers=2, iterations=3)
    spoiled = [spoil(it.train, it.examples.numbers[0]), spoil(it.val, 1)]
    with it.session.stop.deferred():
        it._train(it.model)
    result = it._finish(it.measure())
    assert result["unreadable"] == [{"image": name, "reason": "No such file or directory"} for name in spoiled]
    told = capfd.readouterr().err
    for name in spoiled:
        assert told.count(f"warning: unreadable image skipped: {name}: No such file or directory (1 so far)") == 1
    again = tuning(run, coco_folder, tmp_path / "out", batch_size=5, iterations=3, resume=True)
    again.session.go_on(again)
    assert list(again.unreadable[0].reasons) == [it.examples.numbers[0]]


def test_strict_stops_at_one(run, coco_folder, tmp_path):
    it = begun(run, coco_folder, tmp_path / "out", batch_size=5, strict=True)
    name = spoil(it.train, it.examples.numbers[0])
    with pytest.raises(CommandError, match=f"unreadable image \\(--strict\\): {name}: No such file"):
        it._train(it.model)
    spoil(it.val, 0)
    with pytest.raises(CommandError, match="--strict"):
        it.measure()


class Oracle(nn.Module):
    """Answers each image with its true objects, which it knows by the image's pixels."""

    def __init__(self, images):
        super().__init__()
        self.answers = {(images.image(index).float() / 255).numpy().tobytes(): images.target(index)
                        for index in range(len(images))}  # fmt: skip

    def forward(self, images):
        target = self.answers[images[0].numpy().tobytes()]
        return [{**target, "masks": target["masks"][:, None].float(), "scores": torch.ones(len(target["labels"]))}]


def test_a_perfect_detector_measures_100(run, coco_folder, tmp_path):
    it = begun(run, coco_folder, tmp_path / "out")
    it.model = Oracle(it.val)
    figures = it.measure()
    assert figures["box_AP"] == figures["mask_AP"] == figures["box_AP75"] == 100.0
    spoil(it.val, 0)  # which is left out, with its objects
    figures = it.measure()
    assert figures["box_AP"] == figures["mask_AP"] == 100.0
    for index in range(len(it.val)):
        spoil(it.val, index)
    with pytest.raises(CommandError, match=r"none of 4 images can be read: .*gone.png: No such file"):
        it.measure()


def test_two_ranks_write_one_result_of_all_images(run, coco_folder, tmp_path):
    script, out = tmp_path / "detect.py", tmp_path / "out"
    script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[3])!r}){COMMAND}")
    options = [*FLAGS, "--iterations", 2, "--batch-size", 4, "--log-every", 1]
    done = run_ranks(2, script, "detection", run, "--data", coco_folder, "--out", out, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in lines_of(out)] == [1, 2] and done.stdout.count("AP75") == 1
    alone = begun(run, coco_folder, tmp_path / "alone")
    alone.model.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    figures, result = alone.measure(), json.loads((out / "result.json").read_text())
    assert {name: result[name] for name in figures} == figures
    detections = [json.loads((folder / "detections.json").read_text()) for folder in (out, alone.out)]
    assert detections[0] == detections[1] and len({one["image_id"] for one in detections[0]}) == 4


# ---- options ----


def resolved(device: str = "cpu", **options) -> DetectionOptions:
    return resolve(DetectionOptions(Path("run"), **options), torch.device(device))


def test_schedules_are_detectrons_scaled_by_the_batch():
    one, two = resolved(), resolved(schedule="2x")
    assert (one.iterations, one.lr, one.warmup, one.drops) == (90_000, 0.02, 1000, (60_000, 80_000))
    assert (two.iterations, two.lr, two.warmup, two.drops) == (180_000, 0.02, 1000, (120_000, 160_000))
    half = resolved(batch_size=8)
    assert (half.iterations, half.lr, half.warmup, half.drops) == (180_000, 0.01, 2000, (120_000, 160_000))
    short = resolved(iterations=900, lr=0.5)
    assert (short.lr, short.warmup, short.drops) == (0.5, 90, (600, 800))
    rates = [learning_rate(step, one) for step in (0, 500, 1000, 59_999, 60_000, 79_999, 80_000, 89_999)]
    assert rates == pytest.approx([2e-5, 0.01001, 0.02, 0.02, 2e-3, 2e-3, 2e-4, 2e-4])


def test_batch_norm_is_trained_on_gpus_with_enough_images():
    assert resolved("cuda").batch_norm == "sync" and resolved("cpu").batch_norm == "frozen"
    assert resolved("cuda", batch_size=4).batch_norm == "frozen"
    assert resolved("cuda", batch_size=4, batch_norm="sync").batch_norm == "sync"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be 1 or more, got 0"),
        ({"iterations": 0}, "--iterations must be 1 or more, got 0"),
        ({"lr": float("nan")}, "--lr must be a finite number of 0 or more, got nan"),
        ({"workers": -1}, "--workers must be a finite number of 0 or more, got -1"),
        ({"min_size": ()}, "--min-size must be one or more sides"),
        ({"sgd_momentum": 1.0}, "--sgd-momentum must be from 0 to below 1, got 1.0"),
        ({"seed": -1}, "--seed must be from 0 to .*, got -1"),
        ({"rank_timeout": 0.0}, "--rank-timeout must be from 0 .excluded. to"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        resolved(**options)


def test_data_that_do_not_go_together_are_named(run, coco_folder, tmp_path):
    with pytest.raises(UsageError, match="--batch-size 6 is larger than the 5 training images with objects"):
        tuning(run, coco_folder, tmp_path, batch_size=6)
    content = json.loads((coco_folder / "annotations" / "instances_val2017.json").read_text())
    content["categories"][0]["name"] = "nought"
    (tmp_path / "val.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="category 7 is 'nought' in .*val.json, but 'zero' in .*train2017.json"):
        tuning(run, coco_folder, tmp_path, val_annotations=tmp_path / "val.json", val_images=coco_folder / "val2017")
