"""Images, views and their order."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from ifnd_fast.config import PRESETS, DataConfig
from ifnd_fast.data.batch_views import NUMBERS
from ifnd_fast.data.images import middle
from ifnd_fast.data.loading import CentreDataset, EpochBatches, PairDataset, ViewDataset, centre_loader, pair_loader
from ifnd_fast.data.sources import open_for_run, open_images
from ifnd_fast.data.unreadable import Unreadable
from ifnd_fast.data.views import centre_view, to_input
from ifnd_fast.report.thumbnails import thumbnail
from ifnd_fast.runtime.errors import CommandError, Stopped, UsageError

SMALL = DataConfig(image_size=16, workers=0)


def test_demo_data_is_4000_and_1000_digits_without_overlap():
    train, test = open_images("demo"), open_images("demo", "test")
    assert (len(train), len(test)) == (4000, 1000)
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10
    seen = {train.pixels[i].tobytes() for i in range(len(train))}
    assert sum(test.pixels[i].tobytes() in seen for i in range(len(test))) == 0


def test_folder_of_classes(digit_folder):
    images = open_images(str(digit_folder))
    assert len(images) == 120
    assert images.class_names == [f"digit-{label}" for label in range(5)]
    assert np.bincount(images.labels).tolist() == [24] * 5
    assert images.image(0).mode == "RGB" and images.image(0).size == (16, 16)
    assert open_images(str(digit_folder), "test") is None


def test_flat_folder_has_no_labels(flat_folder):
    images = open_images(str(flat_folder))
    assert len(images) == 120 and images.labels is None and images.class_names is None


def test_train_and_val_folders(digit_folder, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(digit_folder)
    assert len(open_images(str(tmp_path))) == len(open_images(str(tmp_path), "test")) == 120


def test_held_out_images_are_a_share_of_each_class_always_the_same(digit_folder):
    config = DataConfig(data=str(digit_folder), hold_out=0.25)
    train, held = open_for_run(config)
    assert np.bincount(train.labels).tolist() == [18] * 5 and np.bincount(held.labels).tolist() == [6] * 5
    names = [{images.name(i) for i in range(len(images))} for images in (train, held)]
    assert len(names[0] | names[1]) == 120 and not names[0] & names[1]
    assert all(f"digit-{held.labels[i]}" in held.name(i) for i in range(len(held)))
    assert np.array_equal(open_for_run(config)[1].indices, held.indices)
    assert np.asarray(held.image(0)).shape == (16, 16, 3)


def test_held_out_images_without_labels(flat_folder):
    train, held = open_for_run(DataConfig(data=str(flat_folder), hold_out=0.1))
    assert (len(train), len(held), held.labels) == (108, 12, None)


def test_holding_out_nothing_or_all_is_refused(digit_folder):
    with pytest.raises(UsageError, match="--hold-out"):
        open_for_run(DataConfig(data=str(digit_folder), hold_out=1.0))
    assert open_for_run(DataConfig(data=str(digit_folder)))[1] is None


def test_classes_are_the_same_in_train_and_val_though_folders_are_missing(digit_folder, tmp_path):
    for split, labels in (("train", (0, 1, 3, 4)), ("val", (1, 2, 4))):
        (tmp_path / split).mkdir()
        for label in labels:
            (tmp_path / split / f"digit-{label}").symlink_to(digit_folder / f"digit-{label}")
    train, val = open_for_run(DataConfig(data=str(tmp_path)))
    assert train.class_names == ["digit-0", "digit-1", "digit-3", "digit-4"]
    assert val.class_names == [*train.class_names, "digit-2"]
    for images in (train, val):
        assert all(images.class_names[images.labels[i]] in images.name(i) for i in range(len(images)))


@pytest.mark.parametrize("make", [lambda root: root / "absent", lambda root: root])
def test_missing_and_empty_folders_are_refused_by_name(make, tmp_path):
    with pytest.raises(UsageError, match=str(tmp_path)):
        open_images(str(make(tmp_path)))


def test_views_depend_on_seed_epoch_and_index_alone(flat_folder):
    images = open_images(str(flat_folder))
    dataset = PairDataset(images, SMALL, seed=1)
    view, other, index, wanted, reason = dataset[3, 7]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again, other_again, *_ = dataset[3, 7]
    assert torch.equal(before, torch.get_rng_state()), "the global generator moved"
    assert torch.equal(view, again) and torch.equal(other, other_again)
    assert (index, wanted, reason) == (7, 7, "") and view.shape == (3, 16, 16) and view.dtype == torch.uint8
    assert not torch.equal(view, other)
    assert not torch.equal(view, dataset[4, 7][0])
    assert not torch.equal(view, PairDataset(images, SMALL, seed=2)[3, 7][0])


@pytest.mark.parametrize("augment", ["loader", "device"])
def test_any_number_of_workers_gives_the_same_batches(augment, flat_folder):
    images = open_images(str(flat_folder))

    def batches(workers: int, start: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
        config = DataConfig(image_size=16, workers=workers, augment=augment)
        order = EpochBatches(len(images), 50, seed=0)
        order.start(epoch=start, step=0, end=3)
        return [(first, second) for first, second, *_ in pair_loader(images, config, 0, order)]

    alone, helped, later = batches(0), batches(2), batches(0, start=2)
    assert len(alone) == len(helped) == 4 and len(later) == 2
    for some in (alone, alone[:2] + later):
        for a, b in zip(some, helped, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_images_for_views_on_the_device(flat_folder):
    files, digits = open_images(str(flat_folder)), open_images("demo")
    config = DataConfig(image_size=16, augment="device")
    image, numbers, index, wanted, _ = PairDataset(files, config, seed=1)[3, 7]
    again = PairDataset(files, config, seed=1)[3, 7]
    assert image.shape == (3, 24, 24) and image.dtype == torch.uint8 and (index, wanted) == (7, 7)
    assert numbers.shape == (2, NUMBERS) and torch.equal(numbers, again[1])
    assert not torch.equal(numbers[0], numbers[1])
    for item, seed in (((4, 7), 1), ((3, 8), 1), ((3, 7), 2)):
        assert not torch.equal(numbers, PairDataset(files, config, seed)[item][1])
    assert torch.equal(PairDataset(digits, config, 0)[0, 5][0][0], torch.from_numpy(digits.pixels[5]))


def test_order_resumes_within_an_epoch_and_ranks_share_batches():
    whole = EpochBatches(103, 20, seed=5)
    whole.start(4, 0)
    batches = list(whole)
    assert len(batches) == len(whole) == 5
    indices = [index for batch in batches for _, index in batch]
    assert len(set(indices)) == 100 and all(epoch == 4 for batch in batches for epoch, _ in batch)
    whole.start(4, 3)
    assert list(whole) == batches[3:]
    ranks = [EpochBatches(103, 20, seed=5, rank=rank, world_size=4) for rank in range(4)]
    for rank in ranks:
        rank.start(4, 0)
    for batch, *parts in zip(batches, *ranks, strict=True):
        assert batch == [item for part in parts for item in part]
    whole.start(5, 0)
    next_batches = list(whole)
    assert next_batches != batches
    whole.start(4, 3, end=6)
    assert list(whole) == batches[3:] + next_batches


def test_unreadable_images_are_replaced_and_named(flat_folder, tmp_path):
    for file in sorted(flat_folder.iterdir())[:4]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "001.png").write_bytes(b"not a picture")
    images = open_images(str(tmp_path))
    _, _, index, wanted, reason = PairDataset(images, SMALL, 0)[0, 1]
    assert (index, wanted) == (2, 1) and images.name(1).endswith("001.png")
    assert reason == "no picture in a format that can be read here"
    views, indices, readable, reasons = next(iter(centre_loader(images, SMALL, 4, range(4))))
    assert list(reasons) == ["", reason, "", ""]
    assert readable.tolist() == [True, False, True, True] and indices.tolist() == [0, 1, 2, 3]
    assert not views[1].any() and views[0].any()


def test_nothing_readable_is_said_so(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(CommandError, match=r"3 images in a row can't be read, from .*1.jpg on: the file is empty"):
        PairDataset(open_images(str(tmp_path)), SMALL, 0)[0, 1]


class Odd:
    """Grey images, of which some can't be opened, and some make the view fail."""

    labels = class_names = None

    def __init__(self, faults: dict[int, Exception]):
        self.faults = faults

    def __len__(self) -> int:
        return 300

    def name(self, index: int) -> str:
        return f"picture {index}"

    def image(self, index: int) -> Image.Image:
        if index in self.faults and index % 2:
            raise self.faults[index]
        return Image.new("RGB", (20 + (index in self.faults), 20), "grey")


FAULTS = {
    number: error for number, error in enumerate(
        [SyntaxError("broken"), ValueError("odd"), struct.error("short"), zlib.error("Error -3"), EOFError(),
         OverflowError("large"), MemoryError(), ZeroDivisionError("0"), OSError("gone"), KeyError("x")], 10)
}  # fmt: skip


@pytest.mark.parametrize("number", FAULTS)
def test_whatever_one_picture_raises_it_alone_is_unreadable(number, monkeypatch):
    """On opening (odd numbers) and on making the view."""
    images, error = Odd(FAULTS), FAULTS[number]

    def view(image: Image.Image) -> torch.Tensor:
        if image.width > 20:
            raise error
        return torch.zeros(3, 16, 16, dtype=torch.uint8)

    for dataset, item in ((ViewDataset(images, view, 0), (0, number)), (CentreDataset(images, SMALL), number)):
        dataset.view = view
        *_, reason = dataset[item]
        assert ("" if type(error) is OSError else type(error).__name__) in reason and str(error) in reason
        assert ("on making its view" in reason) == (number % 2 == 0)
        assert dataset[(0, 50) if isinstance(item, tuple) else 50][-1] == ""
    assert ViewDataset(images, view, 0)[0, number][1:3] == (20, number)


def test_a_view_that_fails_on_every_picture_is_no_picture_s_fault():
    def broken(image: Image.Image) -> torch.Tensor:
        raise TypeError("a slip")

    with pytest.raises(CommandError, match=r"100 images in a row .* picture 7 on: TypeError: a slip .*test_data.py"):
        ViewDataset(Odd({}), broken, 0)[0, 7]


def test_a_signal_while_a_picture_is_read_is_not_the_picture_s():
    images = Odd({1: Stopped(15)})
    for dataset, item in ((PairDataset(images, SMALL, 0), (0, 1)), (CentreDataset(images, SMALL), 1)):
        with pytest.raises(Stopped):
            dataset[item]


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


def test_unreadable_images_are_named_once_with_the_reason(flat_folder, capfd):
    images = open_images(str(flat_folder))
    unreadable = Unreadable(images, strict=False)
    unreadable.note(torch.tensor([3, 5, 5]), torch.tensor([3, 4, 5]), ["", "it is broken", ""])
    unreadable.note(torch.tensor([5]), torch.tensor([4]), ["it is broken"])
    unreadable.add(9, "empty")
    assert capfd.readouterr().err.splitlines() == [
        f"warning: unreadable image skipped: {images.name(4)}: it is broken (1 so far)",
        f"warning: unreadable image skipped: {images.name(9)}: empty (2 so far)",
    ]
    assert unreadable.listed() == [{"image": images.name(4), "reason": "it is broken"},
                                   {"image": images.name(9), "reason": "empty"}]  # fmt: skip
    again = Unreadable(images, strict=True)
    again.load_state(unreadable.state())
    assert again.listed() == unreadable.listed()
    again.load_state([4])  # as checkpoints once had them
    again.add(4, "it is broken")
    with pytest.raises(CommandError, match=r"unreadable image \(--strict\): .*008.png: torn"):
        again.add(8, "torn")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_views_of_its_size(preset, flat_folder):
    config = PRESETS[preset][1].data
    view = PairDataset(open_images(str(flat_folder)), config, 0)[0, 0][0]
    assert view.shape == (3, config.image_size, config.image_size)
    x = to_input(view[None], config, torch.device("cpu"))
    assert x.dtype == torch.float32 and x.abs().max() < 8
    expected = (view[0, 0, 0] / 255 - config.pixel_mean[0]) / config.pixel_std[0]
    torch.testing.assert_close(x[0, 0, 0, 0], expected.float())
