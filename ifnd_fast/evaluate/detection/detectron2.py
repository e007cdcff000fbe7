"""A backbone for detectron2: its pickle of weights, and the configuration that it needs beside them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from torchvision.models import ResNet

from ifnd_fast.evaluate.backbone import Backbone
from ifnd_fast.runtime import checkpoint
from ifnd_fast.runtime.errors import UsageError

DEPTHS = (18, 34, 50, 101, 152)
"""of the ResNets that detectron2 builds"""


def detectron2_name(name: str) -> str:
    """detectron2's name of a parameter or buffer of torchvision's ResNet.

    layer1.0.conv1.weight -> res2.0.conv1.weight, layer1.0.bn1.weight -> res2.0.conv1.norm.weight,
    layer1.0.downsample.0.weight -> res2.0.shortcut.weight, bn1.weight -> stem.conv1.norm.weight
    """
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return name if name.startswith("res") else f"stem.{name}"


def export(backbone: Backbone, path: Path) -> str:
    """Write the backbone's weights for detectron2; what to set in its configuration, as YAML.

    Args:
        path: of the file, NAME.pkl (detectron2 goes by the ending).

    Raises:
        UsageError: detectron2 has no such ResNet, or the name doesn't end in .pkl.
        CommandError: the file can't be written.
    """
    if path.suffix != ".pkl":
        raise UsageError(f"--export-detectron2 {path}: the name must end in .pkl, by which detectron2 knows the format")
    text = yaml.safe_dump(settings(backbone, path), sort_keys=False)
    weights = {detectron2_name(name): value.numpy() for name, value in backbone.network.state_dict().items()}
    content = {"model": weights, "__author__": "ifnd_fast", "matching_heuristics": True}
    checkpoint.write_atomically(path, lambda file: _Pickler(file).dump(content))
    return text


def settings(backbone: Backbone, path: Path) -> dict[str, Any]:
    """What detectron2's configuration has to say for the weights in `path`.

    Raises:
        UsageError: detectron2 has no such ResNet.
    """
    config, network = backbone.config, cast(ResNet, backbone.network)
    digits = re.search(r"\d+", config.model.arch)
    depth = int(digits[0]) if digits else 0
    if depth not in DEPTHS or config.model.stem != "imagenet":
        raise UsageError(
            f"--export-detectron2: detectron2 builds ResNets of {', '.join(map(str, DEPTHS))} layers with the 7x7 stem,"
            f" not {config.model.arch} with the stem {config.model.stem!r}"
        )
    groups, first = network.groups, network.layer1
    last = first[-1].conv3 if hasattr(first[-1], "conv3") else first[-1].conv2
    return {
        "MODEL": {
            "WEIGHTS": str(path),
            "PIXEL_MEAN": [round(255 * value, 3) for value in config.data.pixel_mean],
            "PIXEL_STD": [round(255 * value, 3) for value in config.data.pixel_std],
            "BACKBONE": {"FREEZE_AT": 0},
            "RESNETS": {
                "DEPTH": depth,
                "STRIDE_IN_1X1": False,
                "NORM": "SyncBN",
                "NUM_GROUPS": groups,
                "WIDTH_PER_GROUP": first[0].conv1.out_channels // groups,
                "STEM_OUT_CHANNELS": network.conv1.out_channels,
                "RES2_OUT_CHANNELS": last.out_channels,
            },
            "FPN": {"NORM": "SyncBN"},
        },
        "INPUT": {"FORMAT": "RGB"},
    }


def _rebuilt(array: np.ndarray) -> tuple[Any, ...]:
    return np.ndarray, (array.shape, array.dtype.str, bytearray(array.tobytes()))


class _Pickler(pickle.Pickler):
    """Pickles arrays by names that every NumPy has: what version 2 writes by itself, version 1 can't read, and that
    is what detectron2 is often installed with."""

    dispatch_table = {np.ndarray: _rebuilt}
