"""The tasks of ifnd-fast-eval: what each takes on the command line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from torch import Tensor

from ifnd_fast import config as configs
from ifnd_fast import features
from ifnd_fast.config import Config
from ifnd_fast.console import table
from ifnd_fast.data import Images, open_images
from ifnd_fast.errors import CommandError, UsageError
from ifnd_fast.evaluate.detection import detection
from ifnd_fast.model import resnet


def knn(
    checkpoint: tyro.conf.Positional[Path],
    data: str | None = None,
    k: int = 20,
    temperature: float = 0.07,
    device: str = "cpu",
    json_file: Path | None = None,
) -> None:
    """Weighted k-nearest-neighbour accuracy of a run's backbone on labelled images.

    Args:
        checkpoint: a run's folder, or its backbone.pt
        data: demo, cifar10, cifar100, or a folder of labelled images (with train/ and val/: the one is
            searched, the other classified; otherwise every tenth image is); default: the run's own
        k: neighbours that vote
        temperature: of the votes' weights exp(similarity / temperature)
        device: cpu, cuda, ...
        json_file: write the figures to this file too
    """
    if k < 1:
        raise UsageError(f"--k must be 1 or more, got {k}")
    if not temperature > 0:
        raise UsageError(f"--temperature must be above 0, got {temperature}")
    config, backbone = load_backbone(checkpoint)
    if data is not None:
        config.data.data = data
    train = open_images(config.data.data, "train", config.data.data_root)
    test = open_images(config.data.data, "test", config.data.data_root)
    if train is None or train.labels is None or (test is not None and test.labels is None):
        raise UsageError(f"--data {config.data.data}: kNN needs images in one folder per class")
    probe = features.KnnProbe(train, test)
    backbone.to(device)

    def backbone_features(images: Images) -> Tensor:
        autocast = contextlib.nullcontext
        return features.extract(backbone, images, config.data, torch.device(device), autocast)[0]

    accuracy = probe.accuracy(backbone_features, k=k, temperature=temperature)
    table(f"kNN on {config.data.data}", ["k", "temperature", "top-1"],
          [[str(k), f"{temperature:g}", f"{accuracy:.2f} %"]])  # fmt: skip
    if json_file is not None:
        figures = {"data": config.data.data, "k": k, "temperature": temperature, "knn_top1": accuracy}
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def load_backbone(checkpoint: Path) -> tuple[Config, torch.nn.Module]:
    """The config of a run and its trained backbone, in eval mode on the CPU.

    Raises:
        CommandError: there is no run, or its backbone.pt can't be read or does not fit its config.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    config = configs.load(folder / "config.yaml")
    path = folder / "backbone.pt"
    backbone, _ = resnet(config.model)
    try:
        backbone.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises many kinds, one for each way a file can be broken
        raise CommandError(f"{path} can't be loaded as the run's backbone: {error}") from error
    return config, backbone.eval()


TASKS: dict[str, Callable[..., None]] = {"knn": knn, "detection": detection}
