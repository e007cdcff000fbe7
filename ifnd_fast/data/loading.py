"""Views loaded by processes, in an order that a resumed run repeats."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ifnd_fast.config import DataConfig
from ifnd_fast.data.batch_views import NUMBERS
from ifnd_fast.data.cache import prepared, to_picture
from ifnd_fast.data.images import IN_A_ROW, Images, attempt
from ifnd_fast.data.processes import make_loader
from ifnd_fast.data.views import centre_view, random_view, whole_image, whole_side
from ifnd_fast.runtime.errors import CommandError


class ViewDataset(Dataset):
    """Item (epoch, index): random views of an image, determined by seed, epoch and index alone, so that a
    resumed run sees the same views, whatever the number of workers.

    An image counts as unreadable if it can't be opened or a view of it can't be made, whatever the error: one picture
    never ends a run. (A fault of the views that is not the picture's shows in every picture, and that ends it.) The
    next readable one stands in for it: the item ends with the index that it really holds, the index that was wanted,
    and why that one is unreadable ("" if it is not).

    Raises:
        CommandError: IN_A_ROW images in a row are unreadable.
    """

    def __init__(self, images: Images, view: Callable[[Image.Image], Tensor], seed: int, n_views: int = 1):
        self.images, self.view, self.seed, self.n_views = images, view, seed, n_views

    def __getitem__(self, item: tuple[int, int]) -> tuple[Any, ...]:
        epoch, wanted = item
        key = hashlib.blake2b(f"{self.seed} {epoch} {wanted}".encode(), digest_size=8).digest()
        make = partial(self.views, seed=int.from_bytes(key, "little") >> 1)
        reason = ""
        for offset in range(min(len(self.images), IN_A_ROW)):
            index = (wanted + offset) % len(self.images)
            views, fault = attempt(self.images, index, make)
            if views is not None:
                return *views, index, wanted, reason
            reason = reason or fault
        tried = min(len(self.images), IN_A_ROW)
        raise CommandError(f"{tried} images in a row can't be read, from {self.images.name(wanted)} on: {reason}")

    def views(self, image: Image.Image, seed: int) -> tuple[Tensor, ...]:
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also look for GPUs, which takes longer than the augmentation
            torch.default_generator.manual_seed(seed)
            return tuple(self.view(image) for _ in range(self.n_views))


class PairDataset(ViewDataset):
    """Item (epoch, index): two random views of an image, as `random_view` makes them; with --augment device the image
    itself, and the random numbers (2, NUMBERS) of its views."""

    def __init__(self, images: Images, config: DataConfig, seed: int):
        self.on_device = config.augment == "device"
        if self.on_device:
            side = whole_side(config)
            images, view = prepared(images, f"whole-{side}", whole_image(config, images), side)
        else:
            (images, _), view = prepared(images, "picture", to_picture), random_view(config)
        super().__init__(images, view, seed, n_views=2)

    def views(self, image: Image.Image, seed: int) -> tuple[Tensor, ...]:
        if not self.on_device:
            return super().views(image, seed)
        generator = torch.Generator().manual_seed(seed)  # the numbers of the global one, in less time
        return self.view(image), torch.rand(2, NUMBERS, generator=generator, dtype=torch.float32, device="cpu")


class CentreDataset(Dataset):
    """Item index: the centre view of an image (zeros if it is unreadable, as in `ViewDataset`), the index, whether it
    is readable, and why not."""

    def __init__(self, images: Images, config: DataConfig):
        self.size = config.image_size
        self.images, self.view = prepared(images, f"centre-{self.size}", centre_view(config), self.size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool, str]:
        view, reason = attempt(self.images, index, self.view)
        if view is None:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8, device="cpu"), index, False, reason
        return view, index, True, ""


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


class Batch(list[Any]):
    """The columns of a batch. Between processes they travel as one shared tensor and a message: a tensor opens a
    connection of its own, answered by a thread of a process that is busy loading, which takes longer than a copy of
    what is small.

    Args:
        views: (n B, ...), of n columns one after the other.
        others: further columns (B,) of tensors, or of lists.
    """

    def __init__(self, views: Tensor, n: int, others: Sequence[Any]):
        super().__init__([*views.chunk(n), *(torch.from_numpy(o) if isinstance(o, np.ndarray) else o for o in others)])
        self.views, self.n = views, n

    def __reduce__(self) -> tuple[Any, ...]:
        others = [other.numpy() if isinstance(other, Tensor) else other for other in self[self.n :]]
        return Batch, (self.views, self.n, others)


def collate(items: Sequence[tuple[Any, ...]]) -> Batch:
    """A batch of items whose first is an image; further ones of its shape and dtype are views as well."""
    columns = [*zip(*items, strict=True)]
    kinds = [isinstance(c[0], Tensor) and (c[0].shape, c[0].dtype) for c in columns]
    n = sum(kind == kinds[0] for kind in kinds)
    views = default_collate([view for column in columns[:n] for view in column])
    return Batch(views, n, [default_collate(list(column)) for column in columns[n:]])


def view_loader(dataset: ViewDataset, config: DataConfig, batches: EpochBatches) -> DataLoader:
    """Batches of (views (B, 3, S, S), as many as the dataset makes, indices (B,), wanted indices (B,), B reasons), for
    `loading.running`."""
    return make_loader(dataset, config.workers, batch_sampler=batches, collate_fn=collate)


def pair_loader(images: Images, config: DataConfig, seed: int, batches: EpochBatches) -> DataLoader:
    """Batches of (view (B, 3, S, S), other view, indices (B,), wanted indices (B,), B reasons), or with --augment
    device of (images (B, 3, H, W), random numbers (B, 2, NUMBERS), indices, wanted indices, reasons)."""
    return view_loader(PairDataset(images, config, seed), config, batches)


def centre_loader(images: Images, config: DataConfig, batch_size: int, indices: Sequence[int]) -> DataLoader:
    """Batches of (centre view (B, 3, S, S), indices (B,), readable (B,), B reasons) over `indices`, in order, for
    `loading.running`."""
    dataset = CentreDataset(images, config)
    return make_loader(dataset, config.workers, batch_size=batch_size, sampler=indices, collate_fn=collate)
