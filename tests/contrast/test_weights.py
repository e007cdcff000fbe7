"""Encoders found in files as other packages and training scripts write them."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime

import numpy
import pytest
import torch
import torchvision
from torch import nn

from ifnd_fast.config import ModelConfig
from ifnd_fast.contrast import weights
from ifnd_fast.contrast.encoder import resnet
from ifnd_fast.evaluate.backbone import load_backbone
from ifnd_fast.runtime import checkpoint
from ifnd_fast.runtime.errors import CommandError

torch.manual_seed(0)
OWN = resnet(ModelConfig(width=8, stem="imagenet"))[0].state_dict()
OTHER = {name: value + 1 for name, value in OWN.items()}  # of an encoder that is not to be taken
OPTIONS = argparse.Namespace(arch="resnet50", lr=0.03, milestones=[120, 160])
HEAD = {"fc.0.weight": torch.ones(3, 3), "fc.0.bias": torch.ones(3)}


def under(prefix: str, values: dict) -> dict:
    return {prefix + name: value for name, value in values.items()}


def shortcuts(values: dict) -> dict:
    return {name.replace("downsample", "shortcut"): value for name, value in values.items()}


SHAPES = {
    "plain": (OWN, "."),
    "MoCo": ({"state_dict": under("module.encoder_q.", OWN | HEAD) | under("module.encoder_k.", OTHER | HEAD)
              | {"module.queue": torch.ones(2, 4)}, "epoch": 200}, "state_dict.module.encoder_q"),
    "MoCo v3": ({"state_dict": under("module.base_encoder.", OWN) | under("module.momentum_encoder.", OTHER)},
                "state_dict.module.base_encoder"),
    "DINO": ({"student": under("module.backbone.", OTHER), "teacher": under("backbone.", OWN), "args": OPTIONS},
             "teacher.backbone"),
    "timm's training": ({"arch": "resnet50", "state_dict": OTHER, "state_dict_ema": OWN, "args": OPTIONS},
                        "state_dict_ema"),
    "CIFAR's usual": ({"net": under("module.", shortcuts(OWN)), "acc": 93.1, "epoch": 3}, "net.module"),
    "SupContrast": ({"opt": OPTIONS, "model": under("encoder.module.", shortcuts(OWN)), "epoch": 3},
                    "model.encoder.module"),
    "PyTorch's tutorial": ({"model_state_dict": OWN | HEAD, "optimizer_state_dict": {
        "state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}}, "model_state_dict"),
    "VISSL": ({"phase_idx": 9, "classy_state_dict": {"base_model": {"meta": {}, "model": {
        "trunk": under("_feature_blocks.", OWN), "heads": {"0.clf.0.weight": torch.ones(2, 2)}}}}},
        "classy_state_dict.base_model.model.trunk._feature_blocks"),
    "mmpretrain": ({"meta": {"epoch": 200}, "state_dict": under("backbone.", OWN) | under("encoder_k.module.0.", OTHER)
                    | {"neck.mlp.0.weight": torch.ones(2, 2)}}, "state_dict.backbone"),
    "solo-learn": ({"epoch": 1, "pytorch-lightning_version": "2.1", "hyper_parameters": {"lr": 0.1}, "state_dict":
                    under("backbone.", OWN) | under("momentum_backbone.", OTHER) | under("projector.", HEAD)},
                   "state_dict.backbone"),
    "BYOL": ({"online_network_state_dict": under("encoder.", OWN), "target_network_state_dict":
              under("encoder.", OTHER)}, "online_network_state_dict.encoder"),
    "nn.Sequential of children": ({"state_dict": under("f.", {
        name.replace("conv1.", "0.", 1) if name.startswith("conv1.") else
        name.replace("bn1.", "1.", 1) if name.startswith("bn1.") else f"{int(name[5]) + 2}{name[6:]}": value
        for name, value in OWN.items()})}, "state_dict.f"),
}  # fmt: skip
"""What is in the file, and what the encoder in it is called."""


@pytest.mark.parametrize("shape", SHAPES)
def test_the_encoder_is_found_in_every_public_shape(shape, tmp_path):
    content, prefix = SHAPES[shape]
    path = tmp_path / "w.pt"
    torch.save(content, path)
    named, network = weights.read(path), resnet(ModelConfig(width=8, stem="imagenet"))[0]
    for found in (weights.resnet_in(named, path), weights.encoder_in(named, path, network)):
        assert found.prefix == prefix and set(found.weights) == set(OWN)
        assert all(torch.equal(value, OWN[name]) for name, value in found.weights.items())
        assert len(found.weights) + len(found.left_out) == len(named)


def test_several_encoders_are_told_and_one_is_chosen_by_a_part_of_its_name(tmp_path):
    path = tmp_path / "two.pt"
    torch.save({"a": under("module.x.", OWN), "b": under("module.y.", OTHER)}, path)
    with pytest.raises(CommandError, match="two.pt holds several encoders: choose one of a.module.x, b.module.y by"):
        load_backbone(path)
    with pytest.raises(CommandError, match="holds no encoder 'z': choose one of a.module.x, b.module.y"):
        load_backbone(path, encoder="z")
    with pytest.raises(CommandError, match="holds several encoders"):
        load_backbone(path, encoder="module")
    for name in ("y", "b", "b.module.y", "module.y"):
        assert torch.equal(load_backbone(path, encoder=name).network.conv1.weight, OTHER["conv1.weight"])
    torch.save(OWN | under("ema.", OTHER), path)
    assert torch.equal(load_backbone(path, encoder=".").network.conv1.weight, OWN["conv1.weight"])


def test_lightlys_checkpoint(tmp_path, capsys):
    """Of its MoCo example: the backbone is a numbered nn.Sequential, beside a copy for the keys and two heads."""
    heads = pytest.importorskip("lightly.models.modules.heads")
    backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
    model = nn.Module()
    model.backbone, model.projection_head = backbone, heads.MoCoProjectionHead(512, 64, 16)
    model.backbone_momentum = copy.deepcopy(backbone)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "last.ckpt")
    loaded = load_backbone(tmp_path / "last.ckpt")
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded.network(images), backbone.eval()(images).flatten(1))
    assert loaded.config.model.arch == "resnet18"
    assert "120 tensors of state_dict.backbone; left out: 12" in capsys.readouterr().out


@pytest.mark.parametrize("save", ["torch", "safetensors"])
def test_timms_resnet(save, tmp_path):
    network = pytest.importorskip("timm").create_model("resnet18", num_classes=10)
    path = tmp_path / {"torch": "model.pth", "safetensors": "model.safetensors"}[save]
    if save == "torch":
        torch.save(network.state_dict(), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(network.state_dict(), path)
    images = torch.rand(2, 3, 32, 32)
    wanted = network.eval().forward_features(images).mean((2, 3))
    torch.testing.assert_close(load_backbone(path).network(images), wanted)


def test_a_broken_safetensors_file_is_named(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"hello")
    with pytest.raises(CommandError, match="w.safetensors can't be read"):
        weights.read(tmp_path / "w.safetensors")


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_what_is_no_plain_value_is_passed_over_and_runs_no_code(tmp_path):
    canary, meters = tmp_path / "ran", collections.defaultdict(list, loss=[1.0])
    evil = {
        "args": argparse.Namespace(x=Malice(str(canary))),
        "best": numpy.float64(93),
        "when": datetime.date(2026, 1, 1),
    }
    torch.save({"state_dict": OWN, "meters": meters, **evil}, tmp_path / "others.pt")
    named = weights.read(tmp_path / "others.pt")
    assert named.keys() >= {"args", "best", "when", "meters.loss"} and not canary.exists()
    with pytest.raises(CommandError, match=r"others.pt can't be read: it holds Python objects \(\S+\)"):
        checkpoint.read(tmp_path / "others.pt")
    torch.save({"state_dict": OWN, **evil}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CommandError, match=r"old.pt can't be read: it holds Python objects \(\S+\)"):
        weights.read(tmp_path / "old.pt")
    assert not canary.exists()


def test_what_is_no_weight_by_name_is_named(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CommandError, match="module.pt holds a torch.nn.modules.linear.Linear, not a state_dict"):
        weights.read(tmp_path / "module.pt")
    torch.save({name: value.numpy() for name, value in OWN.items()}, tmp_path / "arrays.pt")
    with pytest.raises(CommandError, match="conv1.weight is a numpy.*, not a tensor"):
        weights.resnet_in(weights.read(tmp_path / "arrays.pt"), tmp_path / "arrays.pt")


def test_a_deeper_network_does_not_fit_a_shallower_one(tmp_path):
    """All that the shallow one needs is in it, but it is another network."""
    network = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))})
    deeper = {f"blocks.{n}.{kind}": torch.ones(3, 3) if kind == "weight" else torch.ones(3)
              for n in range(3) for kind in ("weight", "bias")}  # fmt: skip
    with pytest.raises(weights.MisfitError, match="2 unexpected: blocks.2.weight, blocks.2.bias"):
        weights.encoder_in(deeper, tmp_path / "w.pt", network)
    del deeper["blocks.2.weight"], deeper["blocks.2.bias"]
    found = weights.encoder_in(deeper | {"head.weight": torch.ones(1)}, tmp_path / "w.pt", network)
    assert found.left_out == ["head.weight"]
