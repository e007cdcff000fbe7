"""Backbones of timm, by their names: ResNets of all kinds, vision transformers, ConvNeXt, ..."""

from __future__ import annotations

import difflib

from torch import nn

from ifnd_fast.runtime.errors import UsageError

PREFIX = "timm:"


def is_timm(arch: str) -> bool:
    return arch.startswith(PREFIX)


def timm_model(arch: str, image_size: int | None = None) -> nn.Module:
    """timm's model without its classifier, with random weights: (B, 3, S, S) -> (B, n_features).

    Args:
        arch: "timm:" and its name there.
        image_size: side S of the images where the model depends on it (a vision transformer's position embedding);
            None: the one that its pre-trained weights are of.

    Raises:
        UsageError: timm is not installed, or has no such model, or not for that size.
    """
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"--arch {arch}: pip install 'ifnd-fast[timm]' first ({error})") from error
    name = arch.removeprefix(PREFIX)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), cutoff=0.5)
        hint = f", but {', '.join(near)}" if near else ""
        raise UsageError(f"--arch {arch}: timm {timm.__version__} has no model {name!r}{hint}")
    try:
        if image_size is not None:
            try:
                return timm.create_model(name, pretrained=False, num_classes=0, img_size=image_size)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
        return timm.create_model(name, pretrained=False, num_classes=0)
    except Exception as error:  # models check sizes each in their own way
        raise UsageError(f"--arch {arch} can't be built for --image-size {image_size}: {error}") from error


def set_image_size(network: nn.Module, image_size: int, arch: str) -> None:
    """Fit a model to images of another size, where it depends on that: its position embedding is resampled.

    Raises:
        UsageError: it can't be.
    """
    resize = getattr(network, "set_input_size", None)
    if callable(resize):
        try:
            resize(img_size=(image_size, image_size))
        except Exception as error:
            raise UsageError(f"--arch {arch} can't take images of --image-size {image_size}: {error}") from error


Colour = tuple[float, float, float]


def pretrained_for(network: nn.Module) -> tuple[int, Colour, Colour]:
    """Side, pixel means and standard deviations of the images that timm's weights of a model are of."""
    config = getattr(network, "pretrained_cfg", {})
    return config["input_size"][-1], (*config["mean"],), (*config["std"],)
