"""Views made on the device: each operation against torchvision's, the parameters' distribution, and an image's own."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from ifnd_fast.config import DataConfig
from ifnd_fast.data.batch_views import NUMBERS, ORDERS, PARTS, BatchViews, by_name, crops, turn_hue
from ifnd_fast.data.loading import PairDataset
from ifnd_fast.data.sources import open_images
from ifnd_fast.runtime.errors import UsageError

FULL = DataConfig(image_size=40, crop_min=0.2, color_jitter=0.4, grayscale=0.2, blur=0.5, flip=True, rotation=10.0)


def numbers(n: int = 1, **parts: float | list | np.ndarray) -> torch.Tensor:
    """(n, NUMBERS) of which nothing is done to an image but by those given."""
    still = {"area": 1.0, "ratio": 0.5, "place": 0.5, "angle": 0.5, "flip": 1.0, "jitter": 1.0, "order": 0.0,
             "factor": 0.5, "gray": 1.0, "blur": 1.0, "sigma": 0.5}  # fmt: skip
    columns = [np.broadcast_to((still | parts)[name], (n, width)) for name, width in PARTS.items()]
    return torch.from_numpy(np.concatenate(columns, axis=1).copy())


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """Two real colour photographs, (2, 3, 60, 80)."""
    from sklearn.datasets import load_sample_images

    pictures = torch.stack([torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images])
    return functional.resize(pictures, [60, 80], antialias=True)


def test_crop_and_flip_are_torchvisions(photographs):
    config = DataConfig(image_size=40, crop_min=0.2, flip=True)
    given = numbers(2, area=[0.9] * 10, place=[0.3, 0.8], flip=[[0.2], [0.7]])
    top, left, h, w = (int(side[0]) for side in crops(by_name(given), 60, 80, 0.2))
    views = BatchViews(config)(photographs, given)
    expected = functional.resized_crop(photographs.float(), top, left, h, w, [40, 40], antialias=False)
    torch.testing.assert_close(views[0], functional.horizontal_flip(expected[0]), atol=0.02, rtol=0)
    inner = slice(1, -1)  # at a crop's edge one looks beyond it, the other does not
    torch.testing.assert_close(views[1][:, inner, inner], expected[1][:, inner, inner], atol=0.02, rtol=0)


def test_rotation_is_torchvisions(photographs):
    config = DataConfig(image_size=60, crop_min=1.0, rotation=20.0)
    square = photographs[:, :, :, :60]
    views = BatchViews(config)(square, numbers(2, angle=[[0.9], [0.1]]))
    for view, image, angle in zip(views, square, (16.0, -16.0), strict=True):
        expected = functional.rotate(image.float(), angle, functional.InterpolationMode.BILINEAR)
        assert (view - expected).abs().median() < 0.05
        assert view[:, 0, 0].abs().max() < 1  # black corners turned in


@pytest.mark.parametrize(
    "given, options, expected",
    [
        ({"jitter": 0.0, "factor": [0.9, 0.5, 0.5, 0.5]}, {"color_jitter": 0.4},
         lambda x: functional.adjust_brightness(x, 1.32)),
        ({"jitter": 0.0, "factor": [0.5, 0.9, 0.5, 0.5]}, {"color_jitter": 0.4},
         lambda x: functional.adjust_contrast(x, 1.32)),
        ({"jitter": 0.0, "factor": [0.5, 0.5, 0.1, 0.5]}, {"color_jitter": 0.4},
         lambda x: functional.adjust_saturation(x, 0.68)),
        ({"jitter": 0.0, "factor": [0.5, 0.5, 0.5, 0.9]}, {"color_jitter": 0.4},
         lambda x: functional.adjust_hue(x, 0.08)),
        ({"jitter": 0.0, "factor": [0.9, 0.1, 0.5, 0.2], "order": (17 + 0.5) / 24}, {"color_jitter": 0.4}, None),
        ({"gray": 0.1}, {"grayscale": 0.2}, lambda x: functional.rgb_to_grayscale(x, 3)),
        ({"blur": 0.1, "sigma": 0.4}, {"blur": 0.5}, lambda x: functional.gaussian_blur(x, [7, 7], [0.86, 0.86])),
    ],
)  # fmt: skip
def test_colours_and_blur_are_torchvisions(given, options, expected, photographs):
    square = photographs[:, :, :, :60]
    views = BatchViews(DataConfig(image_size=60, crop_min=1.0, **options))(square, numbers(2, **given)) / 255
    if expected is None:
        steps = [(functional.adjust_brightness, 1.32), (functional.adjust_contrast, 0.68),
                 (functional.adjust_saturation, 1.0), (functional.adjust_hue, -0.06)]  # fmt: skip
        images = square / 255
        for number in ORDERS[17]:
            adjust, factor = steps[number]
            images = adjust(images, factor)
    else:
        images = expected(square / 255)
    torch.testing.assert_close(views, images, atol=2e-3, rtol=0)


def test_hue_of_any_pixel():
    """Every corner and edge of the cube of colours, grey and black, turned all the way round."""
    levels = torch.linspace(0, 1, 5)
    pixels = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 25, 5)
    for turn in (-0.5, -0.1, 0.0, 0.07, 0.5):
        expected = functional.adjust_hue(pixels, turn)
        torch.testing.assert_close(turn_hue(pixels, torch.tensor([turn])), expected, atol=1e-5, rtol=0)
    grey = pixels[:, :1].repeat(1, 3, 1, 1)
    assert torch.equal(turn_hue(grey, torch.tensor([0.3])), grey)


def test_each_image_has_parameters_of_its_own(photographs):
    given = torch.rand(64, NUMBERS, generator=torch.Generator().manual_seed(0))
    images = photographs.repeat(32, 1, 1, 1)
    together = BatchViews(FULL)(images, given)
    alone = torch.cat([BatchViews(FULL)(images[i : i + 1], given[i : i + 1]) for i in range(64)])
    torch.testing.assert_close(together, alone, atol=1e-2, rtol=0)
    assert torch.unique(together[::2], dim=0).shape[0] == 32


def test_crops_have_torchvisions_distribution():
    """Area and aspect of 3,000 crops of each, of an image so wide that tries fail and the middle is taken at times."""
    given = torch.rand(3000, NUMBERS, generator=torch.Generator().manual_seed(0))
    top, left, h, w = crops(by_name(given), 60, 200, 0.4)
    assert (top + h <= 60).all() and (left + w <= 200).all() and (top >= 0).all() and (left >= 0).all()
    transform, image = v2.RandomResizedCrop(10, scale=(0.4, 1.0)), torch.zeros(3, 60, 200)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        theirs = [transform.make_params([image]) for _ in range(3000)]
    for own, name in ((top, "top"), (left, "left"), (h, "height"), (w, "width")):
        other = np.array([params[name] for params in theirs])
        spread = max(own.std(), other.std(), 1e-9) / np.sqrt(3000)
        assert abs(own.mean() - other.mean()) < 5 * spread, name
        assert np.abs(np.quantile(own, [0.1, 0.5, 0.9]) - np.quantile(other, [0.1, 0.5, 0.9])).max() < 0.08 * 200


def test_views_have_the_loaders_statistics():
    """Mean and deviation of every pixel over views of the demo's digits, within sampling error."""
    images = open_images("demo")
    options = {"crop_min": 0.85, "rotation": 15.0, "workers": 0}
    by_loader = PairDataset(images, DataConfig(**options), 0)
    on_device = PairDataset(images, DataConfig(augment="device", **options), 0)
    loaded = torch.stack([by_loader[0, i][0] for i in range(600)]).float()
    pixels, given = (torch.stack([on_device[0, i][part] for i in range(600)]) for part in (0, 1))
    made = BatchViews(DataConfig(**options))(pixels, given[:, 0])
    error = loaded.std(0) / 600**0.5
    assert ((loaded.mean(0) - made.mean(0)).abs() < 4 * error + 3).all()  # three of 255: one resampling for two
    assert abs(loaded.mean() - made.mean()) < 0.03 * loaded.mean() and abs(loaded.std() / made.std() - 1) < 0.05


def test_shares_that_change(photographs):
    """How many of 400 views are grey, flipped, jittered and blurred."""
    drawn = by_name(torch.rand(400, NUMBERS, generator=torch.Generator().manual_seed(1)))
    given = numbers(400, **{name: drawn[name] for name in ("flip", "jitter", "order", "factor", "gray", "blur")})
    images = photographs[:1, :, :, :60].expand(400, -1, -1, -1).contiguous()
    plain = BatchViews(DataConfig(image_size=60, crop_min=1.0))(images, numbers(400))
    for options, share in (({"grayscale": 0.2}, 0.2), ({"flip": True}, 0.5), ({"color_jitter": 0.4}, 0.8),
                           ({"blur": 0.5}, 0.5)):  # fmt: skip
        views = BatchViews(DataConfig(image_size=60, crop_min=1.0, **options))(images, given)
        changed = (views - plain).abs().amax(dim=(1, 2, 3)) > 1
        assert changed.float().mean() == pytest.approx(share, abs=0.08), options


def test_without_kornia_only_jitter_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    BatchViews(DataConfig(rotation=10.0, flip=True, grayscale=0.5, blur=0.5))
    with pytest.raises(UsageError, match=r"--augment device.*ifnd-fast\[augment\]"):
        BatchViews(DataConfig(color_jitter=0.5))
