"""Runs with other backbones, optimizers and batches in parts than the recipes have."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

import ifnd_fast
from ifnd_fast.cli import parse_train
from ifnd_fast.config import ModelConfig, load
from ifnd_fast.contrast.encoder import build_backbone
from ifnd_fast.contrast.timm_models import timm_model
from ifnd_fast.data.images import ArrayImages
from ifnd_fast.data.sources import open_images
from ifnd_fast.evaluate.backbone import load_backbone
from ifnd_fast.evaluate.detection.command import detection
from ifnd_fast.evaluate.detection.options import DetectionOptions
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.training import objective
from ifnd_fast.training.trainer import Trainer
from tests.conftest import TINY

VIT = "timm:test_vit"  # 0.4 million weights, patches of 16 pixels, made for 160


def network() -> nn.Module:
    """Without norms: what a part of a batch gives is what it gives in the whole."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.GELU(), nn.Flatten(), nn.Linear(64, 8))


def start(out, data, *options, **given) -> Trainer:
    config = parse_train(["--out", str(out), "--data", str(data), *TINY, *map(str, options)])
    return Trainer(config, **given)


def gradients(out, data, accumulate: int, monkeypatch) -> tuple[list[torch.Tensor], Trainer]:
    """Of the first step; its update is left out."""
    trainer = start(out, data, "--accumulate", accumulate, backbone=network())
    monkeypatch.setattr(trainer.optimization, "step", lambda lr: False)
    with contextlib.closing(iter(trainer.batches)) as batches:
        indices = torch.tensor([index for _, index in next(batches)])
    views = torch.randint(256, (2, 32, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    trainer.objective.queue.enqueue(
        nn.functional.normalize(torch.randn(64, 16, generator=torch.Generator().manual_seed(1)), dim=1),
        torch.full((64, 2), -1, dtype=torch.int32), torch.arange(64),
    )  # fmt: skip
    loss, _ = trainer._train_step(trainer.model, [*views], indices)
    assert loss.isfinite()
    return [weight.grad for weight in trainer.encoder.parameters()], trainer


def test_a_batch_in_parts_has_the_gradient_of_the_whole_and_all_keys_are_queued(digit_folder, tmp_path, monkeypatch):
    wanted, whole = gradients(tmp_path / "whole", digit_folder, 1, monkeypatch)
    for parts in (2, 5):
        got, trainer = gradients(tmp_path / f"{parts}", digit_folder, parts, monkeypatch)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
        for one, other in zip(trainer.objective.queue.negatives(), whole.objective.queue.negatives(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert sum(weight.abs().sum() for weight in wanted) > 0.01


def test_gradients_are_exchanged_after_the_last_part_alone(digit_folder, tmp_path, monkeypatch):
    trainer, exchanged = start(tmp_path / "run", digit_folder, "--accumulate", 4, "--epochs", 1), []

    def noted(model, gradients):
        exchanged.append(gradients)
        return contextlib.nullcontext()

    monkeypatch.setattr("ifnd_fast.training.trainer.exchanging", noted)
    with trainer.open():
        trainer.fit()
    assert exchanged == [False, False, False, True] * 3 and trainer.step == 3  # 120 images in batches of 32
    assert objective.exchanging(trainer.model, False).__class__ is contextlib.nullcontext


@pytest.mark.parametrize(
    "options, words",
    [
        (["--accumulate", 2, "--negatives", "in-batch"], "--accumulate: .* another loss: take --negatives queue"),
        (["--accumulate", 17], "--accumulate: 32 images of a rank in 17 parts would be less than two in each"),
        (["--accumulate", 0], "--accumulate must be 1 or more"),
        (["--arch", "timm:vit_smal_patch16"], "timm .* has no model 'vit_smal_patch16', but vit_"),
    ],
)
def test_what_can_not_be_done_is_refused(options, words, digit_folder, tmp_path):
    with pytest.raises(UsageError, match=words):
        start(tmp_path / "run", digit_folder, *options)


@pytest.fixture(scope="module")
def vit_run(digit_folder, tmp_path_factory):
    """A vision transformer of timm, trained with LARS in parts; stopped after an epoch and gone on with."""
    pytest.importorskip("timm")
    out = tmp_path_factory.mktemp("vit") / "run"
    options = ["--arch", VIT, "--image-size", 32, "--optimizer", "lars", "--accumulate", 2, "--epochs", 2]
    trainer = start(out, digit_folder, *options)
    with trainer.open():
        next(trainer.epochs())
    trainer = Trainer(parse_train(["--resume", "--out", str(out)]))
    with trainer.open():
        trainer.fit()
    return out, trainer


def test_a_vision_transformer_trains_resumes_and_is_measured(vit_run):
    out, trainer = vit_run
    images = torch.rand(2, 3, 32, 32)
    loaded = load_backbone(out)
    wanted = trainer.encoder.backbone.eval()(images)
    torch.testing.assert_close(loaded.network(images), wanted)
    assert loaded.n_features == 64 and loaded.config.model.arch == VIT
    larger = load_backbone(out, image_size=48)  # its position embedding is resampled
    assert larger.network(torch.rand(2, 3, 48, 48)).shape == (2, 64)
    with pytest.raises(UsageError, match="torchvision's ResNets, not timm:test_vit"):
        detection(DetectionOptions(out, device="cpu"))


def test_timms_weights_are_measured_and_started_from(digit_folder, tmp_path):
    """At their own size; a run of another has their position embedding resampled."""
    torch.manual_seed(0)
    wanted = timm_model(VIT)
    torch.save({"model": wanted.state_dict() | {"head.weight": torch.ones(2, 64)}}, tmp_path / "vit.pth")
    loaded = load_backbone(tmp_path / "vit.pth", VIT)
    images = torch.rand(1, 3, 160, 160)
    torch.testing.assert_close(loaded.network(images), wanted.eval()(images))
    assert loaded.config.data.image_size == 160 and loaded.config.data.pixel_mean == (0.5, 0.5, 0.5)
    options = ["--arch", VIT, "--image-size", 32, "--weights", tmp_path / "vit.pth"]
    backbone = start(tmp_path / "run", digit_folder, *options).encoder.backbone
    assert torch.equal(backbone.blocks[0].attn.qkv.weight, wanted.blocks[0].attn.qkv.weight)
    assert backbone.pos_embed.shape[1] < wanted.pos_embed.shape[1]


def test_a_convolutional_network_of_timm_has_no_size():
    backbone, n_features = build_backbone(ModelConfig(arch="timm:test_resnet"), 40)
    assert backbone(torch.rand(2, 3, 64, 64)).shape == (2, n_features)


def test_python_gives_network_and_images(digits, tmp_path):
    pixels, labels = digits[0][:96].repeat(2, axis=1).repeat(2, axis=2), digits[1][:96]
    images, options = ArrayImages(pixels, labels), {"epochs": 2, "batch_size": 32, "levels": (3, 6), "image_size": 16,
                                                    "workers": 0, "amp": "off", "out": tmp_path / "run"}  # fmt: skip
    mine = network()
    before = mine[0].weight.detach().clone()
    result = ifnd_fast.pretrain(backbone=mine, images=images, optimizer="adamw", lr=1e-3, flip=True, **options)
    assert 0 <= result["knn_top1"] <= 100 and not torch.equal(mine[0].weight, before)
    saved = torch.load(tmp_path / "run/backbone.pt")
    network().load_state_dict(saved)
    assert torch.equal(saved["3.weight"], mine[3].weight)
    words = "run of python:torch.nn.modules.container.Sequential, a network of Python's: load .*backbone.pt into it"
    with pytest.raises(CommandError, match=words):
        load_backbone(tmp_path / "run")
    with pytest.raises(UsageError, match="--arch python:.*Sequential: a program gave this network"):
        build_backbone(load(tmp_path / "run/config.yaml").model)
    with pytest.raises(UsageError, match="--data python:.*ArrayImages: a program gave these images"):
        open_images("python:ifnd_fast.data.images.ArrayImages")
    with pytest.raises(UsageError, match="does not hold the images that"):
        others = ArrayImages(np.roll(pixels, 1, axis=0), labels)
        ifnd_fast.pretrain(backbone=mine, images=others, out=tmp_path / "run", resume=True)


def test_what_python_gives_must_fit(tmp_path):
    images = ArrayImages(np.zeros((8, 16, 16), dtype=np.uint8))
    with pytest.raises(TypeError, match="no option epoch, but epochs"):
        ifnd_fast.pretrain(epoch=3)
    with pytest.raises(UsageError, match="of another kind"):
        ifnd_fast.pretrain(epochs="many", out=tmp_path / "run")
    images.pixels[1:] += np.arange(7, dtype=np.uint8)[:, None, None]
    for backbone, words in ((nn.Conv2d(3, 4, 3), "must give features .* got shape"), (nn.Linear(3, 4), "fails on an")):
        with pytest.raises(UsageError, match=words):
            ifnd_fast.pretrain(backbone=backbone, images=images, out=tmp_path / "run", image_size=16, batch_size=4,
                               levels=(2,), workers=0, false_negatives="keep")  # fmt: skip
