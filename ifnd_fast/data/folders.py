"""Finding the images below a folder: which count, which class each is of, and what is left out for which reason."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.runtime.paths import shown

TRAIN = ("train", "training")
TEST = ("val", "valid", "validation", "test", "testing")
"""Names of the sub-folders that are parts of a data set, in any case; of several test parts the first one measures."""
SYSTEM = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
          "desktop.ini"}  # fmt: skip
"""What systems leave in folders, in any case; names that start with a dot are left out beside these."""
RUN_FILES = {"config.yaml", "metrics.jsonl", "checkpoints", "backbone.pt", "result.json", ".lock"}
"""A folder with two of these holds a training: pictures in it are of the data, and none of them."""
FOLDER = -1  # in place of a size

HIDDEN = "hidden or of the system"
OTHER = "not images by their extension"
LOOSE = "images beside the class folders, so of no class"
OUTSIDE = "images beside the folders of the parts"
UNUSED = "test parts beside the one in use"
ASIDE = "folders of images beside those of the parts"
EMPTY = "folders without images"
RUN = "folders of a training"
AGAIN = "linked folders that lead back, or were followed before"
BROKEN = "broken links"
SPECIAL = "not regular files"
UNREADABLE = "folders that can't be read"
SERIOUS = (LOOSE, OUTSIDE, ASIDE, BROKEN, SPECIAL, UNREADABLE)
"""Reasons that are worth a warning: they may be mistakes."""
EXAMPLES = 3


class LeftOut:
    """What was left out: for each reason how much, and a few names, with `prefix` before them."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.counts: Counter[str] = Counter()
        self.names: dict[str, Counter[str]] = {}

    def note(self, reason: str, name: str, count: int = 1) -> None:
        """`name` is one of EXAMPLES that are told; of OTHER it is an extension, and all of them are counted."""
        self.counts[reason] += count
        names = self.names.setdefault(reason, Counter())
        if reason == OTHER:
            names[shown(name)] += count
        elif len(names) < EXAMPLES:
            names[shown(self.prefix + name)] += count

    def reasons_for_none(self) -> int:
        """How much was left out that explains why a folder gave no images: not what is in every folder."""
        return self.counts.total() - self.counts[OTHER] - self.counts[HIDDEN]

    def lines(self) -> list[tuple[str, bool]]:
        """A clause for each reason, such as "2 folders without images (a, b)", and whether it is worth a warning."""
        return [(f"{count:,} {reason} ({self._examples(reason)})", reason in SERIOUS)
                for reason, count in sorted(self.counts.items())]  # fmt: skip

    def _examples(self, reason: str) -> str:
        names = self.names[reason].most_common()
        if reason == OTHER:
            told, all_told = [f"{name} {count:,}" for name, count in names[:8]], len(names) <= 8
        else:
            told, all_told = [name for name, _ in names], self.counts[reason] <= len(names)
        return ", ".join(told) + ("" if all_told else ", ...")


@dataclass
class Found:
    """The images below a folder, in order of their names' bytes, folder by folder: the same on every file system and
    in every locale."""

    root: Path
    names: list[str]
    """of N images, relative to `root`"""
    sizes: np.ndarray
    """(N,) int64, bytes"""
    labels: np.ndarray | None
    """(N,) int64, the sub-folder of `root` that each is in; None: there are not two with images"""
    class_names: list[str] | None
    """the sub-folders, as `shown`"""
    left_out: LeftOut = field(default_factory=LeftOut)
    hint: str = ""
    """of a folder with a single sub-folder of images: that it is no class, and what else may be meant"""


class Parts(NamedTuple):
    """The folders of a data set's parts, and what is left out beside them, for those who look into them to add to."""

    train: Path
    train_left_out: LeftOut
    test: Path | None = None
    test_left_out: LeftOut | None = None


def find_parts(root: Path, extensions: Collection[str]) -> Parts:
    """The folder with the training images and the one with the test images.

    A sub-folder named as one of TRAIN is the training part if one named as in TEST is beside it, or if no other
    sub-folder holds images; beside other folders of images it is a class. Without such a part all is for training.

    Raises:
        UsageError: the folder can't be read, or several sub-folders are the training part.
    """
    left_out = LeftOut()
    finder = _Finder(root, extensions, left_out)
    quiet = _Finder(root, extensions, LeftOut())  # what a part holds is told when it is opened
    content = list(finder.scan(""))
    folders = [name for name, size in content if size == FOLDER]
    named = [name for name in folders if name.lower() in TRAIN]
    if not named:
        return Parts(root, LeftOut())
    filled = {name: next(quiet.below(name), None) is not None for name in folders}
    tests = sorted((name for name in folders if name.lower() in TEST and filled[name]),
                   key=lambda name: TEST.index(name.lower()))  # fmt: skip
    others = [name for name in folders if name.lower() not in TRAIN + TEST and filled[name]]
    if others and not tests:
        return Parts(root, LeftOut())
    trains = [name for name in named if filled[name]] or named[:1]
    if len(trains) > 1:
        raise UsageError(f"--data {root}: which of {', '.join(map(shown, trains))} is the training part? Name it")
    for name in tests[1:]:
        left_out.note(UNUSED, name)
    for name in others:
        left_out.note(ASIDE, name)
    for name in folders:
        if not filled[name] and name not in trains:
            left_out.note(EMPTY, name)
    for name, size in content:
        if size != FOLDER:
            left_out.note(OUTSIDE, name)
    left_out.prefix = f"{trains[0]}/"
    if not tests:
        return Parts(root / trains[0], left_out)
    return Parts(root / trains[0], left_out, root / tests[0], LeftOut(f"{tests[0]}/"))


def find_images(
    root: Path, extensions: Collection[str], one_class: bool = False, left_out: LeftOut | None = None
) -> Found:
    """The images below a folder; what is left out is added to `left_out`.

    Where two sub-folders or more hold images, at any depth, they are the classes. Else there are no classes and all
    images count, those in the folder itself too; or with `one_class` a single sub-folder is a class too: for test
    images, which may be of one of the training images' classes.

    Linked folders and files are followed; a link that leads back to a folder it is in ends there.

    Raises:
        UsageError: the folder can't be read.
    """
    left_out = left_out or LeftOut()
    finder = _Finder(root, extensions, left_out)
    names: list[str] = []
    sizes: list[int] = []
    runs: list[tuple[int, int]] = []  # of images in order: class or -1, and how many
    classes: list[str] = []
    for name, size in finder.scan(""):
        if size != FOLDER:
            names.append(name)
            sizes.append(size)
            runs.append((-1, 1))
            continue
        before, explained = len(names), left_out.reasons_for_none()
        for below, below_size in finder.below(name):
            names.append(below)
            sizes.append(below_size)
        if len(names) > before:
            runs.append((len(classes), len(names) - before))
            classes.append(name)
        elif left_out.reasons_for_none() == explained:
            left_out.note(EMPTY, name)
    of = np.repeat(np.array([label for label, _ in runs], dtype=np.int64), [count for _, count in runs])
    found = Found(root, names, np.array(sizes, dtype=np.int64), None, None, left_out)
    if len(classes) < (1 if one_class else 2):
        found.hint = _hint(root, names, classes)
    else:
        kept = of >= 0
        for index in np.flatnonzero(~kept).tolist():
            left_out.note(LOOSE, names[index])
        found.names = [name for name, keep in zip(names, kept.tolist(), strict=True) if keep]
        found.sizes, found.labels = found.sizes[kept], of[kept]
        found.class_names = [shown(name) for name in classes]
    return found


def _hint(root: Path, names: list[str], classes: list[str]) -> str:
    """Of a single sub-folder: that it is no class, and what to give if its own sub-folders are the classes or parts."""
    if len(classes) != 1:
        return ""
    parts = [name.split("/", 2) for name in names]
    alone = all(len(part) > 1 for part in parts)
    text = f"{'all' if alone else 'some'} images are in its one sub-folder {shown(classes[0])}: one class is none"
    inner = sorted({part[1] for part in parts if len(part) > 2})
    if len(inner) > 1:
        told = ", ".join(map(shown, inner[:EXAMPLES])) + (", ..." if len(inner) > EXAMPLES else "")
        text += f"; give --data {shown(str(root / classes[0]))} if {told} in it are the classes or parts"
    return text


class _Finder:
    """Looks into folders below `root`, by names relative to it, and notes what it leaves out."""

    def __init__(self, root: Path, extensions: Collection[str], left_out: LeftOut):
        self.root, self.extensions, self.left_out = os.fspath(root), extensions, left_out

    def scan(self, folder: str) -> Iterator[tuple[str, int]]:
        """The images and folders in a folder, in order: their names and sizes, FOLDER of folders.

        Raises:
            UsageError: the root can't be read; of other folders that is noted.
        """
        try:
            with os.scandir(os.path.join(self.root, folder)) as entries:
                listed = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            if not folder:
                raise UsageError(f"--data {self.root} can't be read: {error.strerror}") from error
            self.left_out.note(UNREADABLE, folder)
            return
        if folder and len(RUN_FILES.intersection(entry.name for entry in listed)) >= 2:
            self.left_out.note(RUN, folder)
            return
        for entry in listed:
            name = f"{folder}/{entry.name}" if folder else entry.name
            size = self._size(entry, name)
            if size is not None:
                yield name, size

    def _size(self, entry: os.DirEntry[str], name: str) -> int | None:
        if entry.name.startswith(".") or entry.name.lower() in SYSTEM:
            self.left_out.note(HIDDEN, name)
            return None
        try:
            if entry.is_dir():
                return FOLDER
            extension = os.path.splitext(entry.name)[1].lower()
            if extension not in self.extensions:
                self.left_out.note(OTHER, extension or "without one")
                return None
            status = entry.stat()
        except OSError:
            self.left_out.note(BROKEN, name)
            return None
        if not stat.S_ISREG(status.st_mode):
            self.left_out.note(SPECIAL, name)
            return None
        return status.st_size

    def below(self, folder: str) -> Iterator[tuple[str, int]]:
        """Names and sizes of the images at any depth below a folder of the root, in order.

        A link is followed once, and not to a folder that it is in: however links go in circles, this ends.
        """
        levels: list[Iterator[tuple[str, int]]] = [iter([(folder, FOLDER)])]
        opened = [_number(self.root)]  # the folders that lead to where it is
        followed = set()
        while levels:
            for name, size in levels[-1]:
                if size != FOLDER:
                    yield name, size
                    continue
                path = os.path.join(self.root, name)
                number, link = _number(path), (opened[-1], os.path.basename(name))
                if number in opened or link in followed:
                    self.left_out.note(AGAIN, name)
                    continue
                if os.path.islink(path):
                    followed.add(link)
                opened.append(number)
                levels.append(self.scan(name))
                break
            else:
                levels.pop()
                opened.pop()


def _number(path: str) -> tuple[int, int]:
    """Of the folder that a path leads to, whatever links are on the way; (-1, -1): there is none now."""
    try:
        status = os.stat(path)
        return status.st_dev, status.st_ino
    except OSError:
        return -1, -1
