"""Weights from elsewhere: which tensors of a file are an encoder's, whatever a training script wrapped them in.

What is in a file is flattened to names with dots, {"teacher": {"backbone.conv1.weight": w}} to
"teacher.backbone.conv1.weight"; an encoder is a prefix below which a network's names are. ResNets by other names get
torchvision's: those of a numbered nn.Sequential of a ResNet's children (lightly, SimCLR) and "shortcut" for
"downsample" (the usual CIFAR ResNet, SupContrast).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from ifnd_fast.config import ModelConfig
from ifnd_fast.contrast.encoder import resnet
from ifnd_fast.runtime import checkpoint
from ifnd_fast.runtime.errors import CommandError

FIRST = "layer1.0.conv1.weight"  # where it is, a ResNet is
HEADS = {"fc", "head", "head_dist", "classifier", "linear", "last_linear", "projection_head", "prediction_head"}
"""Parts of a name that belong to no backbone."""
SECOND = re.compile(r"(^|[._])(encoder_k|key_encoder|momentum|target|student)([._]|$)")
"""In the name of an encoder that stands beside the one to take: MoCo's keys, moving averages, DINO's student."""
AVERAGED = re.compile(r"(^|[._])ema([._]|$)")  # timm evaluates these in place of the plain ones
COMMON = ("resnet50", "resnet18")  # tried first


class MisfitError(CommandError):
    """Weights are of another network."""


class Encoder(NamedTuple):
    """One encoder's tensors in a file."""

    prefix: str
    """of their names in the file, without the last dot"""
    weights: dict[str, Tensor]
    """of the backbone, by the network's names"""
    left_out: list[str]
    """names in the file that are no part of it: heads, queues, other encoders"""

    def __str__(self) -> str:
        left = f"; left out: {len(self.left_out)} others ({shortened(self.left_out)})" if self.left_out else ""
        return f"{len(self.weights)} tensors{f' of {self.prefix}' if self.prefix != '.' else ''}{left}"


def read(path: Path) -> dict[str, Any]:
    """What a file of torch.save or safetensors holds, by names with dots; no code in it is executed, and objects that
    would need some are passed over.

    Raises:
        CommandError: it can't be read, or holds nothing by name.
    """
    return flattened(
        _read_safetensors(path) if path.suffix == ".safetensors" else checkpoint.read(path, skip_objects=True), path
    )


def flattened(content: Any, path: Path) -> dict[str, Any]:
    """What the file `path` holds, by names with dots. Raises CommandError: it holds nothing by name."""
    if not isinstance(content, Mapping):
        raise CommandError(f"{path} holds a {type(content).__name__}, not a state_dict (weights by name)")
    return _torchvision_names(dict(_leaves(content)))


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CommandError(f"{path}: pip install 'ifnd-fast[timm]' first ({error})") from error
    try:
        return load_file(path)
    except Exception as error:  # its own class, and those of the system
        raise CommandError(f"{path} can't be read: {error}") from error


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(name, str):
            if isinstance(value, Mapping):
                yield from _leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value


def _torchvision_names(named: dict[str, Any]) -> dict[str, Any]:
    stages: dict[str, list[int]] = {}
    for name in named:
        if match := re.fullmatch(r"((?:.*\.)?)(\d+)\.0\.conv1\.weight", name):
            stages.setdefault(match[1], []).append(int(match[2]))
    renamed: dict[str, str] = {}
    for prefix, numbers in stages.items():
        if len(numbers) == 4 and {f"{prefix}0.weight", f"{prefix}1.weight"} <= named.keys():
            renamed |= {f"{prefix}0": f"{prefix}conv1", f"{prefix}1": f"{prefix}bn1"}
            renamed |= {
                f"{prefix}{number}": f"{prefix}layer{place + 1}" for place, number in enumerate(sorted(numbers))
            }

    def rename(name: str) -> str:
        for prefix in stages:
            if name.startswith(prefix):
                number, dot, rest = name[len(prefix) :].partition(".")
                name = renamed.get(prefix + number, prefix + number) + dot + rest
        return name.replace(".shortcut.", ".downsample.")

    return {rename(name): value for name, value in named.items()}


def resnet_in(named: Mapping[str, Any], path: Path, wanted: str | None = None) -> Encoder:
    """The ResNet in a file. See `encoder_in` for `wanted` and the errors."""
    return _own(named, path, _choose(named, path, [FIRST], wanted), lambda name: name.startswith(RESNET))


RESNET = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")  # all but these is a head


def encoder_in(named: Mapping[str, Any], path: Path, network: nn.Module, wanted: str | None = None) -> Encoder:
    """The tensors that are a network's.

    Args:
        named: what `read` gave of the file `path`.
        network: any; a head of it that the file has beside is left out.
        wanted: which encoder, by its prefix or a part of it; None: the one there is, or of a pair the one that is
            measured: queries' rather than keys', a network rather than its moving average, DINO's teacher, timm's EMA.

    Raises:
        MisfitError: it is another network's.
        CommandError: there is none, or it can't be told which, or it is not finite.
    """
    shapes = shapes_of(network)
    tops = {name.partition(".")[0] for name in shapes}
    found = _own(
        named, path, _choose(named, path, shapes, wanted),
        lambda name: name in shapes or (name.partition(".")[0] in tops and HEADS.isdisjoint(name.split("."))),
    )  # fmt: skip
    if reason := misfit(found.weights, shapes):
        raise MisfitError(f"{path} does not fit the network: {reason}")
    return found


def _choose(named: Mapping[str, Any], path: Path, names: Collection[str], wanted: str | None) -> str:
    """The prefix, with its dot, of the one encoder that has most of a network's names."""
    deepest = max(names, key=lambda name: (name.count("."), len(name)))  # the least likely by accident
    prefixes = sorted({name.removesuffix(deepest) for name in named if name.endswith(deepest)})
    if not prefixes:
        what = "ResNet with torchvision's names" if deepest == FIRST else "such network"
        raise MisfitError(f"{path} holds no {what}: no ...{deepest} in it, but {shortened([*named])}")
    counts = [sum(prefix + name in named for name in names) for prefix in prefixes]
    chosen = prefixes = [prefix for prefix, count in zip(prefixes, counts, strict=True) if count == max(counts)]
    if wanted is not None:
        chosen = [prefix for prefix in prefixes if _called(prefix) == wanted]
        chosen = chosen or [prefix for prefix in prefixes if f".{wanted.strip('.')}." in f".{prefix}"]
    else:
        for is_better in (lambda prefix: not SECOND.search(prefix), AVERAGED.search):
            chosen = [prefix for prefix in chosen if is_better(prefix)] or chosen
    if len(chosen) != 1:
        problem = "several encoders" if chosen else f"no encoder {wanted!r}"
        told = shortened([*map(_called, prefixes)], 8)
        raise CommandError(
            f"{path} holds {problem}: choose one of {told} by --encoder (of --weights: --weights-encoder)"
        )
    return chosen[0]


def _called(prefix: str) -> str:
    return prefix.removesuffix(".") or "."


def _own(named: Mapping[str, Any], path: Path, prefix: str, is_backbone: Any) -> Encoder:
    weights, left_out = {}, []
    for name, value in named.items():
        own = name.removeprefix(prefix)
        if not name.startswith(prefix) or not is_backbone(own):
            left_out.append(name)
        elif not isinstance(value, Tensor):
            raise CommandError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
        elif not value.isfinite().all():
            raise CommandError(f"{path}: {name} is not finite: the training that wrote it diverged")
        else:
            weights[own] = value
    return Encoder(_called(prefix), weights, left_out)


# ---- whether they fit ----


class Misfit(NamedTuple):
    """How weights differ from a network's in names and shapes; false: they fit."""

    names: list[str]
    text: str

    def __str__(self) -> str:
        return self.text

    def __bool__(self) -> bool:
        return bool(self.names)


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def misfit(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Misfit:
    # torch's first releases had no such counters, and they matter to no evaluation
    missing = [name for name in shapes if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in shapes]
    other = [f"{n} {tuple(w.shape)} instead of {shapes[n]}" for n, w in weights.items() if n in shapes
             and tuple(w.shape) != shapes[n]]  # fmt: skip
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    text = "; ".join(f"{len(names)} {kind}: {shortened(names)}" for kind, names in kinds.items() if names)
    return Misfit([*missing, *unexpected, *other], text)


def deduce(weights: Mapping[str, Tensor], path: Path, arch: str | None = None) -> ModelConfig:
    """The ResNet that weights are of, by their names and shapes. Of a 3x3 stem they don't tell the stride: it is taken
    as 1.

    Args:
        weights: by torchvision's names.
        arch: its name; None: the first of torchvision's (and resnet-small) that they fit.

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
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element")  # a candidate that can't be so narrow
            reason = misfit(weights, shapes_of(resnet(model)[0]))
        if not reason:
            return model
        misfits.append((len(reason.names), f"{candidate}: {reason}"))
    wanted = "" if arch else "no ResNet of torchvision; the nearest is "
    raise CommandError(f"{path} does not fit {wanted}{min(misfits)[1]}")


def shortened(names: Collection[str], most: int = 4) -> str:
    more = f", ... ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join([*names][:most]) + more
