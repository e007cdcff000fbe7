"""The backbone to evaluate: of a run, or any ResNet whose weights have torchvision's names, whatever wraps them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ifnd_fast.config import PRESETS, Config
from ifnd_fast.contrast import weights as files
from ifnd_fast.contrast.encoder import resnet
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
    checkpoint: Path, arch: str | None = None, encoder: str | None = None, state: SavedState | None = None
) -> Backbone:
    """A trained backbone.

    Args:
        checkpoint: a run's folder, its backbone.pt, or a file of torch.save (or safetensors) that holds weights with
            the names of torchvision's ResNets, with any prefix and in any mapping: see `contrast.weights`. No code in
            it is executed.
        arch: architecture of bare weights; None: the first of torchvision's ResNets (and resnet-small) that they fit.
        encoder: which of several encoders in the file, by its prefix or a part of it.
        state: of the run whose folder `checkpoint` is: its backbone in place of backbone.pt; see
            `saved_run.chosen_state`.

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
