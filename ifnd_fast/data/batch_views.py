"""Random views of a whole batch at once, on the device: what `data.random_view` does to one image while loading.

The host works out each view's parameters from its random numbers, (B, NUMBERS), and the device moves the pixels:
nothing waits for it, and a view depends on its own image and numbers alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from ifnd_fast.config import DataConfig
from ifnd_fast.data.views import blur_kernel, to_input
from ifnd_fast.runtime.errors import UsageError

TRIES = 10  # of v2.RandomResizedCrop to find a crop inside the image, before it takes the middle
RATIO = (3 / 4, 4 / 3)  # of a crop's sides
JITTER_SHARE = 0.8
ORDERS = np.array(list(itertools.permutations(range(4))))
PARTS = {
    "area": TRIES, "ratio": TRIES, "place": 2, "angle": 1, "flip": 1, "jitter": 1, "order": 1, "factor": 4,
    "gray": 1, "blur": 1, "sigma": 1,
}  # fmt: skip
NUMBERS = sum(PARTS.values())
"""Random numbers, uniform from 0 to 1, of one view."""


class InputViews:
    """The two views of a batch as encoders take them, of what `pair_loader` gives.

    Args:
        config: of the views, and who draws them: the loader, or with augment "device" `BatchViews`.
        device, layout: of the views.

    Raises:
        UsageError: see `BatchViews`.
    """

    def __init__(self, config: DataConfig, device: torch.device, layout: torch.memory_format):
        self.config, self.device, self.layout = config, device, layout
        self.draw = BatchViews(config) if config.augment == "device" else None

    def __call__(self, loaded: list[Tensor]) -> tuple[Tensor, ...]:
        """Two tensors (B, 3, S, S) float32."""
        if self.draw is not None:
            images, numbers = loaded
            images = images.to(self.device, non_blocking=True)
            loaded = [self.draw(images, numbers[:, view]) for view in range(2)]
        return tuple(to_input(view, self.config, self.device).contiguous(memory_format=self.layout) for view in loaded)


class BatchViews:
    """MoCo v2's random views (Chen et al., 2020), with parameters of the distribution of torchvision's v2 transforms.

    Rotation, crop and flip are one bilinear resampling, where the transforms of single images make two, shrink with
    antialiasing and round to 8 bits after each step.

    Args:
        config: of the views.

    Raises:
        UsageError: jitter without kornia, which does it with a parameter for each image.
    """

    def __init__(self, config: DataConfig):
        self.config, self.kernel = config, blur_kernel(config.image_size)
        self.adjust: list[Callable[[Tensor, Tensor], Tensor]] = []
        if config.color_jitter:
            try:
                from kornia import enhance  # takes seconds
            except ImportError as error:
                raise UsageError(
                    "--augment device with --color-jitter: pip install 'ifnd-fast[augment]' first"
                ) from error
            self.adjust = [
                enhance.adjust_brightness_accumulative,
                enhance.adjust_contrast_with_mean_subtraction,
                enhance.adjust_saturation_with_gray_subtraction,
                turn_hue,
            ]

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """A view (B, 3, S, S) float32, 0 to 255, of each image (B, 3, H, W) uint8; numbers (B, NUMBERS) on the CPU."""
        config, device, drawn = self.config, images.device, by_name(numbers)
        theta = torch.from_numpy(affine(drawn, images.shape[2], images.shape[3], config)).float()
        theta = theta.to(device, non_blocking=True)
        grid = F.affine_grid(theta, [len(images), 3, config.image_size, config.image_size], align_corners=False)
        # as the transforms do: a rotation turns black corners in, a crop alone goes on as the image's edge
        outside = "zeros" if config.rotation else "border"
        views = F.grid_sample(images.float() / 255, grid, "bilinear", outside, align_corners=False)
        if config.color_jitter:
            self._jitter(views, drawn)
        _change(views, drawn["gray"][:, 0] < config.grayscale, lambda some, _: rgb_to_grayscale(some, 3))
        if self.kernel > 1:
            sigma = 0.1 + 1.9 * drawn["sigma"]
            _change(views, drawn["blur"][:, 0] < config.blur, self._blur, sigma)
        return 255 * views

    def _jitter(self, views: Tensor, drawn: dict[str, np.ndarray]) -> None:
        """Brightness, contrast, saturation and hue, in each image's own order."""
        strength, order = self.config.color_jitter, ORDERS[(len(ORDERS) * drawn["order"][:, 0]).astype(int)]
        factors = 1 - strength + 2 * strength * drawn["factor"]
        factors[:, 3] = (factors[:, 3] - 1) / 4
        applied = drawn["jitter"][:, 0] < JITTER_SHARE
        for place in range(4):
            for number, adjust in enumerate(self.adjust):
                _change(views, applied & (order[:, place] == number), adjust, factors[:, number])

    def _blur(self, views: Tensor, sigma: Tensor) -> Tensor:
        """Each image by its own sigma (n, 1), pixels: kornia's reads a number from the device."""
        half, channels = self.kernel // 2, views.shape[:2].numel()
        offsets = torch.arange(-half, half + 1, device=views.device)
        weights = (-0.5 * (offsets / sigma) ** 2).softmax(dim=1).repeat_interleave(3, dim=0)[:, None]
        padded = F.pad(views, [half] * 4, mode="reflect").flatten(0, 1)[None]
        blurred = F.conv2d(padded, weights[..., None], groups=channels)
        return F.conv2d(blurred, weights[:, :, None], groups=channels).view_as(views)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Images (B, 3, H, W) in RGB, 0 to 1, with their hue in HSV turned on by `turns` (B,), parts of a whole turn.

    Back to RGB by a channel's place k on the circle: v - c max(0, min(k, 4 - k, 1)), of value v and chroma c. kornia's,
    which writes HSV out, takes three times as long on a CPU.
    """
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    each = 1 / chroma.clamp_min(torch.finfo(images.dtype).tiny)  # of a grey pixel, whose hue has no effect
    of_green, of_blue = 2 + (blue - red) * each, 4 + (red - green) * each
    hue = torch.where(value == red, (green - blue) * each, torch.where(value == green, of_green, of_blue))
    channels = torch.arange(5.0, 0.0, -2.0, device=images.device)[:, None, None]
    place = ((hue + 6 * turns[:, None, None])[:, None] + channels).remainder_(6)
    return value[:, None] - chroma[:, None] * torch.minimum(place, 4 - place).clamp_(0, 1)


def by_name(numbers: Tensor) -> dict[str, np.ndarray]:
    """The numbers (B, NUMBERS) by what they are for, (B, n) each."""
    parts = np.split(numbers.double().numpy(), np.cumsum([*PARTS.values()])[:-1], axis=1)
    return dict(zip(PARTS, parts, strict=True))


def _change(
    views: Tensor,
    chosen: np.ndarray,
    change: Callable[[Tensor, Tensor], Tensor],
    parameters: np.ndarray | None = None,
) -> None:
    """views[chosen] = change(views[chosen], parameters[chosen]), in place."""
    rows = np.flatnonzero(chosen)
    if len(rows):
        own = torch.from_numpy(rows if parameters is None else parameters[rows]).float()
        index = torch.from_numpy(rows).to(views.device, non_blocking=True)
        views[index] = change(views[index], own.to(views.device, non_blocking=True))


def affine(drawn: dict[str, np.ndarray], height: int, width: int, config: DataConfig) -> np.ndarray:
    """(B, 2, 3): from a view's coordinates, -1 to 1, to its image's: the crop, mirrored or not, turned."""
    top, left, h, w = crops(drawn, height, width, config.crop_min)
    centre = np.stack([left + (w - width) / 2, top + (h - height) / 2], axis=1)  # from the image's, pixels
    mirrored = np.where(config.flip & (drawn["flip"][:, 0] < 0.5), -1, 1)
    sides = np.stack([mirrored * w / 2, h / 2], axis=1)
    angle = np.deg2rad(config.rotation * (2 * drawn["angle"][:, 0] - 1))
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=1).reshape(-1, 2, 2)
    pixels = np.concatenate([turn * sides[:, None, :], turn @ centre[:, :, None]], axis=2)
    return pixels / np.array([[width / 2], [height / 2]])


def crops(drawn: dict[str, np.ndarray], height: int, width: int, crop_min: float) -> tuple[np.ndarray, ...]:
    """Top, left, height and width (B,) of v2.RandomResizedCrop: the first try that lies inside the image."""
    area = height * width * (crop_min + (1 - crop_min) * drawn["area"])
    low, high = np.log(RATIO)
    ratio = np.exp(low + (high - low) * drawn["ratio"])
    whole = np.clip(width / height, *RATIO)  # what it takes when none does: the middle, as large as fits
    last = np.array([min(height, width / whole), min(width, height * whole)])
    h, w = (
        np.concatenate([np.rint(np.sqrt(tries)), np.full((len(area), 1), max(1, np.rint(side)))], axis=1)
        for tries, side in zip((area / ratio, area * ratio), last, strict=True)
    )
    first = ((h > 0) & (h <= height) & (w > 0) & (w <= width)).argmax(axis=1)
    h, w = (sides[np.arange(len(sides)), first] for sides in (h, w))
    place = np.where(first[:, None] == TRIES, 0.5, drawn["place"])
    return np.floor(place[:, 0] * (height - h + 1)), np.floor(place[:, 1] * (width - w + 1)), h, w
