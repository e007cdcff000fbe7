"""Views of an image, and how they become an encoder's input."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ifnd_fast.config import DataConfig
from ifnd_fast.data.images import ArrayImages, Images, middle, whole_of


def blur_kernel(size: int) -> int:
    """A tenth of the side, odd."""
    return 2 * (size // 20) + 1


def random_view(config: DataConfig) -> Callable[[Image.Image], Tensor]:
    """The random view of MoCo v2 (Chen et al., 2020), (3, S, S) uint8; call it twice for a pair."""
    jitter, size = config.color_jitter, config.image_size
    steps: list[torch.nn.Module] = [v2.RandomResizedCrop(size, scale=(config.crop_min, 1.0), antialias=True)]
    if config.rotation:
        steps.insert(0, v2.RandomRotation(config.rotation, interpolation=v2.InterpolationMode.BILINEAR))
    if jitter:
        steps.append(v2.RandomApply([v2.ColorJitter(jitter, jitter, jitter, jitter / 4)], p=0.8))
    if config.grayscale:
        steps.append(v2.RandomGrayscale(config.grayscale))
    if config.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(blur_kernel(size), (0.1, 2.0))], p=config.blur))
    if config.flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([*steps, v2.ToImage()])


def whole_side(config: DataConfig) -> int:
    """Side of the squares that `whole_image` makes of image files."""
    return round(1.5 * config.image_size)


def whole_image(config: DataConfig, images: Images) -> Callable[[Image.Image], Tensor]:
    """What `augment.BatchViews` makes views of, uint8: images in memory as they are, (3, H, W), for they are all of one
    size; of files the middle square, resized to half as much again as a view's side."""
    if isinstance(whole_of(images), ArrayImages):
        return v2.ToImage()
    side = whole_side(config)
    return v2.Compose([middle, v2.Resize(side, antialias=True), v2.CenterCrop(side), v2.ToImage()])


def centre_view(config: DataConfig) -> Callable[[Image.Image], Tensor]:
    """The centre crop that features are measured on, (3, S, S) uint8; photographs are first resized to 256/224 S."""
    size = config.image_size
    resized = size if size < 64 else round(size * 256 / 224)
    return v2.Compose([middle, v2.Resize(resized, antialias=True), v2.CenterCrop(size), v2.ToImage()])


def to_input(views: Tensor, config: DataConfig, device: torch.device) -> Tensor:
    """Views (B, 3, S, S), 0 to 255, as an encoder's input on the device: float32, less the mean, by the deviation.

    Here and not in the loading processes: a quarter of the bytes travel, and the device does the arithmetic.
    """
    mean, std = (_by_channel(values, device) for values in (config.pixel_mean, config.pixel_std))
    return (views.to(device, non_blocking=True) - mean) / std


@cache
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return 255 * torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
