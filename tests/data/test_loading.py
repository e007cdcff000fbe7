"""What loaders give: views by seed, epoch and index, the order of batches, and others in place of unreadable images."""

from __future__ import annotations

import pickle
import struct
import zlib
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from ifnd_fast.config import DataConfig
from ifnd_fast.data.batch_views import NUMBERS
from ifnd_fast.data.loading import (
    CentreDataset,
    EpochBatches,
    PairDataset,
    ViewDataset,
    centre_loader,
    collate,
    pair_loader,
)
from ifnd_fast.data.sources import open_images
from ifnd_fast.runtime.errors import CommandError, Stopped

SMALL = DataConfig(image_size=16, workers=0)


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

    with pytest.raises(CommandError, match=r"100 images in a row .* picture 7 on: TypeError: a slip .*test_loading.py"):
        ViewDataset(Odd({}), broken, 0)[0, 7]


def test_a_signal_while_a_picture_is_read_is_not_the_picture_s():
    images = Odd({1: Stopped(15)})
    for dataset, item in ((PairDataset(images, SMALL, 0), (0, 1)), (CentreDataset(images, SMALL), 1)):
        with pytest.raises(Stopped):
            dataset[item]


def test_a_batch_travels_as_one_shared_tensor_and_arrives_as_it_was(monkeypatch):
    """Of two views, of one with random numbers beside it, and of one alone."""
    reducers, sent = ForkingPickler._extra_reducers, []
    share = reducers[torch.UntypedStorage]
    monkeypatch.setitem(reducers, torch.UntypedStorage, lambda storage: sent.append(storage) or share(storage))
    views = torch.arange(96, dtype=torch.uint8).view(4, 2, 3, 2, 2)
    for items in (
        [(first, second, i, 9 - i, f"reason {i}") for i, (first, second) in enumerate(views)],
        [(first, second.float().flatten(1), i, 9 - i, "") for i, (first, second) in enumerate(views)],
        [(first, i, i % 2 == 0, "") for i, (first, _) in enumerate(views)],
    ):
        sent.clear()
        arrived = pickle.loads(ForkingPickler.dumps(collate(items)))
        assert len(sent) == 1 and len(arrived) == len(items[0])
        for column, expected in zip(arrived, default_collate(items), strict=True):
            if isinstance(expected, torch.Tensor):
                assert torch.equal(column, expected) and column.dtype == expected.dtype and column.is_contiguous()
            else:
                assert column == list(expected)
