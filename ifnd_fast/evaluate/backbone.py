"""The backbone to evaluate: of a run, or any ResNet whose weights have torchvision's names."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from ifnd_fast.config import PRESETS, Config, ModelConfig
from ifnd_fast.contrast.encoder import resnet
from ifnd_fast.runtime import checkpoint as checkpoints
from ifnd_fast.runtime.console import warn
from ifnd_fast.runtime.errors import CommandError
from ifnd_fast.training import saved_run

WRAPPERS = ("state_dict", "model")  # keys under which training scripts keep the weights beside other things
QUERY_ENCODERS = ("encoder_q.", "query_encoder.")  # of the two encoders in a MoCo checkpoint, the one to measure
LAYERS = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")  # all but these is a head
FIRST = "layer1.0.conv1.weight"


class Backbone(NamedTuple):
    config: Config
    """the run's; of bare weights the `imagenet` preset's, with the model that the weights are of"""
    network: nn.Module
    """(B, 3, H, W) -> (B, n_features): fc is the identity; in eval mode, on the CPU"""
    n_features: int


def load_backbone(checkpoint: Path, arch: str | None = None) -> Backbone:
    """A trained backbone.

    Args:
        checkpoint: a run's folder, its backbone.pt, or a file of torch.save that holds weights with the names of
            torchvision's ResNets, also within {"state_dict": ...} or {"model": ...}, with any prefix before all names
            (`module.`, `encoder_q.`, ...), with or without a head. No code in it is executed.
        arch: architecture of bare weights; None: the first of torchvision's ResNets (and resnet-small) that they fit.

    Raises:
        CommandError: the file is missing, broken or something else, or its weights fit no such network.
        UsageError: `arch` is not the name of a ResNet.
    """
    path = checkpoint / saved_run.BACKBONE if checkpoint.is_dir() else checkpoint
    of_a_run = checkpoint.is_dir() or (path.name == saved_run.BACKBONE and saved_run.is_run(path.parent))
    config = saved_run.config_of(path.parent) if of_a_run else copy.deepcopy(PRESETS["imagenet"][1])
    if not path.is_file():
        wait = f": the run in {checkpoint} has not ended yet" if checkpoint.is_dir() else ""
        raise CommandError(f"{path} is missing{wait}")
    weights = _backbone_weights(checkpoints.read(path), path)
    if of_a_run:
        if arch is not None and arch != config.model.arch:
            raise CommandError(f"--arch {arch}: {checkpoint} is a run of {config.model.arch}")
        if reason := _misfit(weights, config.model):
            raise CommandError(f"{path} does not fit the run's config.yaml: {reason}")
    else:
        config.model = _deduce(weights, path, arch)
    network, n_features = resnet(config.model)
    network.load_state_dict(weights, strict=False)  # what may lack are counters of batch norm: see _misfit
    return Backbone(config, network.eval(), n_features)


def _backbone_weights(content: Any, path: Path) -> dict[str, Tensor]:
    """The weights below the backbone's layers, by torchvision's names.

    Raises:
        CommandError: there are none, or it can't be told which, or they are not finite.
    """
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CommandError(f"{path} holds a {type(content).__name__}, not a state_dict (weights by name)")
    names = [name for name in content if isinstance(name, str)]
    prefixes = sorted({name.removesuffix(FIRST) for name in names if name.endswith(FIRST)})
    if not prefixes:
        raise CommandError(
            f"{path} holds no ResNet with torchvision's names: no ...{FIRST} in it, but {_shortened(names)}"
        )
    if len(prefixes) > 1:
        prefixes = [prefix for prefix in prefixes if any(query in prefix for query in QUERY_ENCODERS)] or prefixes
    if len(prefixes) > 1:
        raise CommandError(f"{path} holds several ResNets: keep one of {_shortened(prefixes)}")
    (prefix,) = prefixes
    own = {name[len(prefix) :]: content[name] for name in names if name.startswith(prefix)}
    weights = {name: value for name, value in own.items() if name.startswith(LAYERS)}
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise CommandError(f"{path}: {prefix}{name} is a {type(value).__name__}, not a tensor")
        if not value.isfinite().all():
            raise CommandError(f"{path}: {prefix}{name} is not finite: the training that wrote it diverged")
    return weights


def _deduce(weights: dict[str, Tensor], path: Path, arch: str | None) -> ModelConfig:
    """The network that weights are of, by their names and shapes.

    Raises:
        CommandError: they fit none, with what is missing or too much in the network that is nearest.
    """
    first = weights.get("conv1.weight")
    if first is None or first.ndim != 4 or first.shape[1:] not in ((3, 7, 7), (3, 3, 3)):
        got = "is missing" if first is None else f"has shape {tuple(first.shape)}"
        raise CommandError(f"{path}: conv1.weight {got}; it should have shape (width, 3, 7, 7) or (width, 3, 3, 3)")
    small = first.shape[-1] == 3
    listed = torchvision.models.list_models(include=["resnet*", "resnext*", "wide_resnet*"])
    candidates = [arch] if arch else sorted(["resnet-small", *listed], key=lambda name: name not in COMMON)
    misfits = []
    for candidate in candidates:
        model = ModelConfig(arch=candidate, stem="cifar" if small else "imagenet", width=len(first), dim=128)
        reason = _misfit(weights, model)
        if not reason:
            if small:
                warn(f"{path}: conv1 is 3x3, taken with stride 1 (the CIFAR stem); weights don't tell the stride")
            return model
        misfits.append((len(reason.names), f"{candidate}: {reason}"))
    wanted = "" if arch else "no ResNet of torchvision; the nearest is "
    raise CommandError(f"{path} does not fit {wanted}{min(misfits)[1]}")


COMMON = ("resnet50", "resnet18")  # tried first


class _Misfit(NamedTuple):
    names: list[str]
    text: str

    def __str__(self) -> str:
        return self.text

    def __bool__(self) -> bool:
        return bool(self.names)


def _misfit(weights: dict[str, Tensor], model: ModelConfig) -> _Misfit:
    """How weights differ from the network's in names and shapes; false: they fit."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element")  # a candidate that can't be so narrow
        network, _ = resnet(model)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    # torch's first releases had no such counters, and evaluation needs none
    missing = [name for name in shapes if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in shapes]
    other = [f"{n} {tuple(w.shape)} instead of {shapes[n]}" for n, w in weights.items() if n in shapes
             and tuple(w.shape) != shapes[n]]  # fmt: skip
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    text = "; ".join(f"{len(names)} {kind}: {_shortened(names)}" for kind, names in kinds.items() if names)
    return _Misfit([*missing, *unexpected, *other], text)


def _shortened(names: list[str], most: int = 4) -> str:
    more = f", ... ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
