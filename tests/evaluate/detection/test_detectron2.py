"""The pickle for detectron2, against names and shapes of the ResNets in its model zoo."""

from __future__ import annotations

import copy
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ifnd_fast.config import PRESETS
from ifnd_fast.contrast.encoder import resnet
from ifnd_fast.evaluate.backbone import Backbone
from ifnd_fast.evaluate.detection import detectron2
from ifnd_fast.evaluate.detection.command import detection
from ifnd_fast.evaluate.detection.options import DetectionOptions
from ifnd_fast.runtime.errors import UsageError

PUBLISHED = {
    "resnet50": {  # of BottleneckBlock: three convolutions, a shortcut in each stage's first block
        "stem.conv1.weight": (64, 3, 7, 7),
        "stem.conv1.norm.weight": (64,),
        "stem.conv1.norm.running_mean": (64,),
        "res2.0.conv1.weight": (64, 64, 1, 1),
        "res2.0.conv1.norm.running_var": (64,),
        "res2.0.shortcut.weight": (256, 64, 1, 1),
        "res2.0.shortcut.norm.bias": (256,),
        "res3.3.conv2.weight": (128, 128, 3, 3),
        "res4.5.conv3.weight": (1024, 256, 1, 1),
        "res4.5.conv3.norm.weight": (1024,),
        "res5.0.shortcut.weight": (2048, 1024, 1, 1),
        "res5.2.conv3.norm.running_var": (2048,),
    },
    "resnet18": {  # of BasicBlock: two, and a shortcut where the channels change
        "stem.conv1.weight": (64, 3, 7, 7),
        "res2.0.conv1.weight": (64, 64, 3, 3),
        "res2.1.conv2.norm.bias": (64,),
        "res3.0.shortcut.weight": (128, 64, 1, 1),
        "res3.0.shortcut.norm.running_mean": (128,),
        "res5.1.conv2.weight": (512, 512, 3, 3),
    },
}
ABSENT = {"resnet50": "res2.1.shortcut.weight", "resnet18": "res2.0.shortcut.weight"}
N_CONVOLUTIONS = {"resnet50": 53, "resnet18": 20}


def backbone_of(arch: str, **model) -> Backbone:
    config = copy.deepcopy(PRESETS["imagenet"][1])
    config.model.arch = arch
    for name, value in model.items():
        setattr(config.model, name, value)
    torch.manual_seed(0)
    network, n_features = resnet(config.model)
    return Backbone(config, network.eval(), n_features)


@pytest.mark.parametrize("arch", ["resnet50", "resnet18"])
def test_every_weight_under_the_name_that_detectron2_gives_it(arch, tmp_path):
    backbone = backbone_of(arch)
    for name, value in backbone.network.state_dict().items():  # no two alike, so that none can take another's place
        if "num_batches" not in name:
            torch.nn.init.uniform_(value)
    settings = yaml.safe_load(detectron2.export(backbone, tmp_path / "backbone.pkl"))
    content = pickle.loads((tmp_path / "backbone.pkl").read_bytes(), encoding="latin1")  # as detectron2 reads it
    assert content["matching_heuristics"] is True and content["__author__"] == "ifnd_fast"
    model = content["model"]
    for name, shape in PUBLISHED[arch].items():
        assert isinstance(model[name], np.ndarray) and model[name].shape == shape, name
        assert model[name].dtype == np.float32
    assert ABSENT[arch] not in model
    convolutions = [name for name in model if name.endswith("weight") and ".norm." not in name]
    assert len(convolutions) == N_CONVOLUTIONS[arch]
    for name in convolutions:
        assert {f"{name.removesuffix('weight')}norm.{part}" for part in (
            "weight", "bias", "running_mean", "running_var")} <= set(model)  # fmt: skip

    source = backbone.network.state_dict()
    assert len(model) == len(source)
    for name, value in source.items():
        assert np.array_equal(model[detectron2.detectron2_name(name)], value.numpy()), name
    resnets = settings["MODEL"]["RESNETS"]
    assert resnets["DEPTH"] == int(arch[6:]) and resnets["STRIDE_IN_1X1"] is False
    assert (resnets["STEM_OUT_CHANNELS"], resnets["NUM_GROUPS"], resnets["WIDTH_PER_GROUP"]) == (64, 1, 64)
    assert resnets["RES2_OUT_CHANNELS"] == {"resnet50": 256, "resnet18": 64}[arch]
    assert settings["INPUT"]["FORMAT"] == "RGB"
    # the values of MoCo's own configurations for detectron2
    assert settings["MODEL"]["PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert settings["MODEL"]["PIXEL_STD"] == [58.395, 57.12, 57.375]


def test_names_of_blocks_and_norms():
    names = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_mean": "stem.conv1.norm.running_mean",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer2.3.bn3.bias": "res3.3.conv3.norm.bias",
        "layer4.0.downsample.0.weight": "res5.0.shortcut.weight",
        "layer4.0.downsample.1.running_var": "res5.0.shortcut.norm.running_var",
        "layer3.22.conv2.weight": "res4.22.conv2.weight",
    }
    assert {name: detectron2.detectron2_name(name) for name in names} == names


def test_any_numpy_can_read_it(tmp_path):
    """NumPy 2 pickles arrays by names that NumPy 1 hasn't."""
    detectron2.export(backbone_of("resnet18", width=8), tmp_path / "backbone.pkl")
    strings: list[str] = []
    found = set()
    for opcode, argument, _ in pickletools.genops((tmp_path / "backbone.pkl").read_bytes()):
        if opcode.name == "STACK_GLOBAL":
            found.add(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    assert found == {"numpy.ndarray", "builtins.bytearray"}


def test_depth_groups_and_widths_become_settings():
    def resnets(arch, **model):
        with torch.device("meta"):
            found = detectron2.settings(backbone_of(arch, **model), Path("backbone.pkl"))["MODEL"]["RESNETS"]
        return list(found.values())[:1] + list(found.values())[3:]  # without STRIDE_IN_1X1 and NORM

    assert resnets("resnext50_32x4d") == [50, 32, 4, 64, 256]  # as detectron2's configurations of ResNeXt have it
    assert resnets("wide_resnet50_2") == [50, 1, 128, 64, 256]
    assert resnets("resnet50", width=32) == [50, 1, 32, 32, 128]


def test_what_detectron2_does_not_build_is_refused(tmp_path):
    for backbone in (backbone_of("resnet-small"), backbone_of("resnet18", stem="cifar")):
        with pytest.raises(UsageError, match="18, 34, 50, 101, 152 layers with the 7x7 stem, not resnet"):
            detectron2.export(backbone, tmp_path / "backbone.pkl")
    with pytest.raises(UsageError, match="--export-detectron2 .*backbone.pth: the name must end in .pkl"):
        detectron2.export(backbone_of("resnet18"), tmp_path / "backbone.pth")


def test_the_task_needs_no_data_to_export(tmp_path, capfd):
    backbone = backbone_of("resnet18", width=8)
    torch.save({"state_dict": {f"module.{name}": v for name, v in backbone.network.state_dict().items()}},
               tmp_path / "weights.pth")  # fmt: skip
    detection(DetectionOptions(tmp_path / "weights.pth", export_detectron2=tmp_path / "out.pkl"))
    said = capfd.readouterr().out
    assert "STRIDE_IN_1X1: false" in said and "FORMAT: RGB" in said and "DEPTH: 18" in said
    model = pickle.loads((tmp_path / "out.pkl").read_bytes())["model"]
    assert np.array_equal(model["res4.1.conv2.weight"], backbone.network.layer3[1].conv2.weight.detach().numpy())
    assert {path.name for path in tmp_path.iterdir()} == {"weights.pth", "out.pkl"}
