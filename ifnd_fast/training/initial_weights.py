"""The weights that a run's backbone starts from: of --weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ifnd_fast.config import Config
from ifnd_fast.contrast import weights
from ifnd_fast.contrast.encoder import resnet
from ifnd_fast.contrast.timm_models import is_timm, set_image_size, timm_model
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.console import say
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.training import saved_run


def initial_weights(config: Config, backbone: nn.Module | None = None) -> dict[str, Tensor] | None:
    """By the backbone's names; None: random ones, or those of the checkpoint that the run goes on from. All ranks have
    to call it.

    Args:
        backbone: the run's, where it is not that of --arch.

    Raises:
        CommandError: the file is missing or broken, or holds several encoders, or none.
        UsageError: its weights are of another network than the run's, with the options of theirs where it is known.
    """
    if not config.model.weights or (config.run.resume and saved_run.has_checkpoint(config.run.out)):
        return None
    with distributed.raise_on_all_ranks(True):
        path, _ = saved_run.backbone_file(Path(config.model.weights))
        named = weights.read(path)
        try:
            found = _found(named, path, config, backbone)
        except weights.MisfitError as error:
            raise UsageError(f"--weights {error}{_hint(named, path, config)}") from error
        if distributed.rank() == 0:
            say(f"the backbone starts from {path}: {found}")
        return found.weights


def _found(named: dict[str, Any], path: Path, config: Config, backbone: nn.Module | None) -> weights.Encoder:
    wanted, size = config.model.weights_encoder or None, config.data.image_size
    if backbone is not None:
        return weights.encoder_in(named, path, backbone, wanted)
    if not is_timm(config.model.arch):
        with torch.device("meta"):
            network, _ = resnet(config.model)
        return weights.encoder_in(named, path, network, wanted)
    try:
        return weights.encoder_in(named, path, timm_model(config.model.arch, size), wanted)
    except weights.MisfitError:  # of timm's own size of images, most often
        network = timm_model(config.model.arch)
        found = weights.encoder_in(named, path, network, wanted)
    network.load_state_dict(found.weights, strict=False)
    set_image_size(network, size, config.model.arch)
    return found._replace(weights=network.state_dict())


def _hint(named: dict[str, Any], path: Path, config: Config) -> str:
    """With which options they would fit, where they are a ResNet's."""
    try:
        found = weights.resnet_in(named, path, config.model.weights_encoder or None)
        other = weights.deduce(found.weights, path)
    except CommandError:
        return ""
    return f". They are of --arch {other.arch} --stem {other.stem} --width {other.width}"
