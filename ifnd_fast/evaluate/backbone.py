"""The backbone to evaluate: of a run, or any ResNet whose weights have torchvision's names, whatever wraps them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ifnd_fast.config import FROM_PYTHON, PRESETS, Config, ModelConfig
from ifnd_fast.contrast import weights as files
from ifnd_fast.contrast.encoder import build_backbone, n_features_of, resnet
from ifnd_fast.contrast.timm_models import is_timm, pretrained_for, set_image_size
from ifnd_fast.runtime import checkpoint as checkpoints
from ifnd_fast.runtime.console import say, warn
from ifnd_fast.runtime.errors import CommandError
from ifnd_fast.training import saved_run
from ifnd_fast.training.saved_state import SavedState


class Backbone(NamedTuple):
    config: Config
    """the run's; of bare weights the `imagenet` preset's, with the model that the weights are of"""
    network: nn.Module
    """(B, 3, H, W) -> (B, n_features): fc is the identity; in eval mode, on the CPU"""
    n_features: int


def load_backbone(
    checkpoint: Path,
    arch: str | None = None,
    encoder: str | None = None,
    state: SavedState | None = None,
    image_size: int | None = None,
) -> Backbone:
    """A trained backbone.

    Args:
        checkpoint: a run's folder, its backbone.pt, or a file of torch.save (or safetensors) that holds weights with
            the names of torchvision's ResNets, with any prefix and in any mapping: see `contrast.weights`. No code in
            it is executed.
        arch: architecture of bare weights; None: the first of torchvision's ResNets (and resnet-small) that they fit;
            "timm:" and a name: that model of timm.
        encoder: which of several encoders in the file, by its prefix or a part of it.
        state: of the run whose folder `checkpoint` is: its backbone in place of backbone.pt; see
            `saved_run.chosen_state`.
        image_size: of the images to come, where it is another than the run's (of timm's weights: than theirs).

    Raises:
        CommandError: the file is missing, broken or something else, or its weights fit no such network, or it holds
            several encoders.
        UsageError: `arch` is not the name of a ResNet.
    """
    if state is None:
        path, run = saved_run.backbone_file(checkpoint)
        named = files.read(path)
    else:
        path, run = checkpoints.path_of(checkpoint, state.step), checkpoint
        named = files.flattened(state.model, path)
    config = saved_run.config_of(run) if run else copy.deepcopy(PRESETS["imagenet"][1])
    if run and arch is not None and arch != config.model.arch:
        raise CommandError(f"--arch {arch}: {checkpoint} is a run of {config.model.arch}")
    if is_timm(arch or (config.model.arch if run else "")):
        return _of_timm(named, path, config if run else None, arch, encoder, image_size)
    if run and config.model.arch.startswith(FROM_PYTHON):
        raise CommandError(f"{checkpoint} is a run of {config.model.arch}, a network of Python's: load {path} into it")
    found = files.resnet_in(named, path, encoder)
    if not run:
        config.model = files.deduce(found.weights, path, arch)
        say(f"{path}: {found}")
        if config.model.stem == "cifar":
            warn(f"{path}: conv1 is 3x3, taken with stride 1 (the CIFAR stem); weights don't tell the stride")
    network, n_features = resnet(config.model)
    if reason := files.misfit(found.weights, files.shapes_of(network)):
        raise CommandError(f"{path} does not fit the run's config.yaml: {reason}")
    network.load_state_dict(found.weights, strict=False)  # what may lack are counters of batch norm: see `misfit`
    return Backbone(config, network.eval(), n_features)


def _of_timm(
    named: dict[str, Any],
    path: Path,
    config: Config | None,
    arch: str | None,
    encoder: str | None,
    image_size: int | None,
) -> Backbone:
    """Of a run, or (no config) of bare weights: those are for the images that timm says."""
    if config is not None:
        network, n_features = build_backbone(config.model, config.data.image_size)
    else:
        config = copy.deepcopy(PRESETS["imagenet"][1])
        config.model = ModelConfig(arch=arch or "")
        network, n_features = build_backbone(config.model)
        data = config.data
        data.image_size, data.pixel_mean, data.pixel_std = pretrained_for(network)
    found = files.encoder_in(named, path, network, encoder)
    say(f"{path}: {found}")
    network.load_state_dict(found.weights, strict=False)
    if image_size not in (None, config.data.image_size):
        set_image_size(network, image_size, config.model.arch)
        n_features = n_features_of(network, image_size)
    return Backbone(config, network.eval(), n_features)
