"""Labelled images to evaluate with: a training part and a test part that number their classes alike."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ifnd_fast.config import DataConfig
from ifnd_fast.data import identity
from ifnd_fast.data.found import listings, tell_found
from ifnd_fast.data.identity import Identity
from ifnd_fast.data.images import Images, Subset
from ifnd_fast.data.lists import read_lines
from ifnd_fast.data.sources import number_as, open_for_run, rank_in_class
from ifnd_fast.runtime.console import warn
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.runtime.paths import shown


@dataclass
class RunData(DataConfig):
    """The data options of a run whose own data are measured on."""

    run: Path = Path()
    """its folder"""
    identity: Identity = field(default_factory=dict)
    """of the data when it was trained"""


def open_labelled(data: DataConfig) -> tuple[Images, Images]:
    """Training and test images with labels; without a test part, every tenth image is one. A warning says how a run's
    own data have changed since.

    Raises:
        UsageError: no such data, or no labels, or one class, or a class of the test part that training lacks; or the
            held-out images are no longer those that the run held out.
        CommandError: a download failed.
    """
    name = f"--data {data.data}"
    train, test = open_for_run(data)
    assert train is not None
    tell_found(data, train, test)
    if isinstance(data, RunData) and (text := identity.changes(data.run, data.identity, listings(train, test))):
        if data.hold_out:
            raise UsageError(f"{name}: what the run held out is mixed with what it trained on by now: {text}")
        warn(f"{name} is not what the run in {shown(str(data.run))} was trained on: {text}")
    if train.labels is None or (test is not None and test.labels is None):
        which = "training images" if train.labels is None else "test images"
        raise UsageError(
            f"{name}: an evaluation needs labels, that is images in one folder per class, two or more; without such "
            f"folders the {which} count as of one class"
        )
    if test is None:
        held_out = np.arange(len(train)) % 10 == 9
        if not held_out.any():
            raise UsageError(f"{name}: no test images, and {len(train)} images are too few to hold out every tenth")
        train, test = Subset(train, np.flatnonzero(~held_out)), Subset(train, np.flatnonzero(held_out))
    return train, matched(name, train, test)


def matched(name: str, train: Images, test: Images) -> Images:
    """The test images with their classes numbered as training does, by name; `name` is what to call them in messages.

    Raises:
        UsageError: training has one class only, or lacks one of the test part's.
    """
    assert train.labels is not None and test.labels is not None
    if len(np.unique(train.labels)) < 2:
        raise UsageError(f"{name}: all training images are of one class; a classifier needs two or more")
    if train.class_names is None or test.class_names is None:
        lacking = [str(label) for label in np.setdiff1d(test.labels, train.labels)]
    else:
        lacking = sorted(set(test.class_names) - set(train.class_names))
    if lacking:
        raise UsageError(f"{name}: training lacks {len(lacking)} classes of the test part: {_shortened(lacking)}")
    number_as(train, test)
    return test


def number_of_classes(images: Images) -> int:
    """Of labelled images: as many as have names, or one more than the largest label."""
    assert images.labels is not None
    return int(images.labels.max()) + 1 if images.class_names is None else len(images.class_names)


def balanced_share(labels: np.ndarray, share: float) -> np.ndarray:
    """Indices of a share of the images, as many of each class (at least one; all of a smaller class), always the same.

    A smaller share is part of a larger one.
    """
    each = max(1, round(share * len(labels) / len(np.unique(labels))))
    return np.flatnonzero(rank_in_class(labels, seed=0) < each)


def image_ids(images: Images) -> list[str]:
    """A name for each image: its file's; if two files have the same, the path below the folder that all are in."""
    paths = [images.name(index) for index in range(len(images))]
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) == len(names):
        return names
    root = os.path.commonpath(paths)
    return [os.path.relpath(path, root) for path in paths]


def read_ids(file: Path, images: Images) -> np.ndarray:
    """Indices, ascending, of the images that a file names, one a line, by their `image_ids`.

    Raises:
        UsageError: the file can't be read, is empty, or names images that are not there.
    """
    wanted = {line for _, line in read_lines(file, "--ids")}
    ids = image_ids(images)
    known = set(ids)
    wanted = {line if line in known or shown(line) not in known else shown(line) for line in wanted}
    unknown = sorted(line for line in wanted if line not in known and not line.startswith("#"))
    if unknown:
        raise UsageError(
            f"--ids {shown(str(file))}: {len(unknown)} of {len(wanted)} names are not among the {len(ids)} training "
            f"images, which have names like {ids[0]}: {_shortened([shown(name) for name in unknown])}"
        )
    wanted &= known  # without comments
    if not wanted:
        raise UsageError(f"--ids {shown(str(file))} names no images")
    return np.array([index for index, name in enumerate(ids) if name in wanted])


def warn_of_lacking(labels: np.ndarray, n_classes: int, what: str) -> None:
    """A warning if some of the classes have no image among the labels."""
    lacking = n_classes - len(np.unique(labels))
    if lacking:
        warn(f"{lacking} of {n_classes} classes have no {what}: none of their images can be recognised")


def _shortened(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
