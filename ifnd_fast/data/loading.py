"""Views loaded by processes, in an order that a resumed run repeats."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ifnd_fast.config import DataConfig
from ifnd_fast.data.batch_views import NUMBERS
from ifnd_fast.data.images import Images
from ifnd_fast.data.views import centre_view, random_view, whole_image
from ifnd_fast.runtime.stop import ignore_stop_signals


class ViewDataset(Dataset):
    """Item (epoch, index): random views of an image, determined by seed, epoch and index alone, so that a
    resumed run sees the same views, whatever the number of workers.

    An unreadable image is replaced by the next readable one: the item ends with the index that it really
    holds (-1: no readable one in the next 100) and the index that was wanted.
    """

    def __init__(self, images: Images, view: Callable[[Image.Image], Tensor], seed: int, n_views: int = 1):
        self.images, self.view, self.seed, self.n_views = images, view, seed, n_views

    def __getitem__(self, item: tuple[int, int]) -> tuple[Any, ...]:
        epoch, wanted = item
        image, index = self._readable(wanted)
        key = hashlib.blake2b(f"{self.seed} {epoch} {wanted}".encode(), digest_size=8).digest()
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also look for GPUs, which takes longer than the augmentation
            torch.default_generator.manual_seed(int.from_bytes(key, "little") >> 1)
            return *self.views(image), index, wanted

    def views(self, image: Image.Image) -> tuple[Tensor, ...]:
        return tuple(self.view(image) for _ in range(self.n_views))

    def _readable(self, wanted: int) -> tuple[Image.Image, int]:
        for offset in range(min(len(self.images), 100)):
            index = (wanted + offset) % len(self.images)
            try:
                return self.images.image(index), index
            except OSError:
                continue
        return Image.new("RGB", (1, 1)), -1


class PairDataset(ViewDataset):
    """Item (epoch, index): two random views of an image, as `random_view` makes them; with --augment device the image
    itself, and the random numbers (2, NUMBERS) of its views."""

    def __init__(self, images: Images, config: DataConfig, seed: int):
        self.on_device = config.augment == "device"
        view = whole_image(config, images) if self.on_device else random_view(config)
        super().__init__(images, view, seed, n_views=2)

    def views(self, image: Image.Image) -> tuple[Tensor, ...]:
        return (self.view(image), torch.rand(2, NUMBERS)) if self.on_device else super().views(image)


class CentreDataset(Dataset):
    """Item index: the centre view of an image (zeros if it can't be read), the index, and whether it could."""

    def __init__(self, images: Images, config: DataConfig):
        self.images, self.view, self.size = images, centre_view(config), config.image_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool]:
        try:
            return self.view(self.images.image(index)), index, True
        except OSError:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), index, False


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index): a permutation fixed by seed and epoch, this rank's part of every batch.

    The last, smaller batch of an epoch is dropped. `start(epoch, step, end)` says where the next iteration begins, and
    the epoch before which it ends: by default it is the rest of one epoch.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.share = rank, batch_size // world_size
        self.start(0, 0)

    def start(self, epoch: int, step: int, end: int | None = None) -> None:
        self.epochs, self.first_step = range(epoch, epoch + 1 if end is None else end), step

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.n // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.first_step
        for epoch in self.epochs:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            for step in range(first, len(self)):
                begin = step * self.batch_size + self.rank * self.share
                yield [(epoch, int(index)) for index in order[begin : begin + self.share]]
            first = 0


def view_loader(dataset: ViewDataset, config: DataConfig, batches: EpochBatches) -> DataLoader:
    """Batches of (views (B, 3, S, S), as many as the dataset makes, indices (B,), wanted indices (B,))."""
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=config.workers,
        pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # of seeds that no item uses: the global one would move with every resume
    )  # fmt: skip


def pair_loader(images: Images, config: DataConfig, seed: int, batches: EpochBatches) -> DataLoader:
    """Batches of (view (B, 3, S, S), other view, indices (B,), wanted indices (B,)), or with --augment device of
    (images (B, 3, H, W), random numbers (B, 2, NUMBERS), indices, wanted indices)."""
    return view_loader(PairDataset(images, config, seed), config, batches)


@contextmanager
def running(loader: DataLoader) -> Iterator[Iterator[Any]]:
    """The loader's batches; its processes end with the context, also when an error's traceback holds the iterator:
    they wait for it, and Python's exit for them."""
    batches = iter(loader)
    try:
        yield batches
    finally:
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            batches._shutdown_workers()


def centre_loader(images: Images, config: DataConfig, batch_size: int, indices: range) -> DataLoader:
    """Batches of (centre view (B, 3, S, S), indices (B,), readable (B,)) over `indices`, in order."""
    return DataLoader(
        CentreDataset(images, config), batch_size=batch_size, sampler=indices, num_workers=config.workers,
        pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # of seeds that no item uses: the global one would move with every resume
    )  # fmt: skip
