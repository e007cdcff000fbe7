"""Views of pictures of any shape, by every preset, in little memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from ifnd_fast.config import PRESETS, DataConfig
from ifnd_fast.data.images import ArrayImages, Subset, middle
from ifnd_fast.data.loading import CentreDataset, PairDataset
from ifnd_fast.data.sources import open_images
from ifnd_fast.data.views import centre_view, to_input
from ifnd_fast.report.thumbnails import thumbnail


@pytest.mark.parametrize("augment", ["loader", "device"])
@pytest.mark.parametrize("size", [(16_000, 1), (1, 16_000), (1, 1), (3, 5000)])
def test_views_of_narrow_pictures_take_little_memory(size, augment, tmp_path):
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "0.png")
    config = DataConfig(image_size=224, augment=augment, color_jitter=0.4, blur=0.5, rotation=0.0)
    images, largest = open_images(str(tmp_path)), []
    resize = Image.Image.resize

    def watched(self, size, *args, **kwargs):
        largest.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", watched)
        view = PairDataset(images, config, 0)[0, 0][0]
        centre, *_, reason = CentreDataset(images, config)[0]
        assert thumbnail(images, 0, "").source
    assert reason == "" and view.shape[0] == 3 and centre.shape == (3, 224, 224)
    assert largest and max(largest) <= 8 * 336 * 336
    assert (centre == torch.tensor([10, 20, 30])[:, None, None]).all()


def test_middles_of_narrow_pictures_are_what_the_centre_crop_sees():
    """The same pixels as of the whole picture resized, but for those of a narrower neighbour at the edge."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert middle(image).size == (160, 20) and middle(image.transpose(2)).size == (20, 160)
    assert np.array_equal(np.asarray(middle(image)), pixels[:, 120:280])
    assert middle(image.crop((0, 0, 160, 20))).size == (160, 20)
    config = DataConfig(image_size=28)
    whole = v2.Compose([v2.Resize(28), v2.CenterCrop(28), v2.ToImage()])(image)
    assert torch.equal(centre_view(config)(image), whole)


def test_images_in_memory_that_are_held_out_are_as_they_are():
    """As all of them are: with --hold-out options are chosen on the views that the training without it has."""
    images = ArrayImages(np.random.default_rng(0).integers(0, 256, (5, 12, 12), dtype=np.uint8))
    some = Subset(Subset(images, np.array([0, 2, 3, 4])), np.array([1, 3]))
    config = DataConfig(image_size=12, augment="device")
    for index, of_all in enumerate((2, 4)):
        assert torch.equal(PairDataset(some, config, 0)[0, index][0], PairDataset(images, config, 0)[0, of_all][0])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_views_of_its_size(preset, flat_folder):
    config = PRESETS[preset][1].data
    view = PairDataset(open_images(str(flat_folder)), config, 0)[0, 0][0]
    assert view.shape == (3, config.image_size, config.image_size)
    x = to_input(view[None], config, torch.device("cpu"))
    assert x.dtype == torch.float32 and x.abs().max() < 8
    expected = (view[0, 0, 0] / 255 - config.pixel_mean[0]) / config.pixel_std[0]
    torch.testing.assert_close(x[0, 0, 0, 0], expected.float())
