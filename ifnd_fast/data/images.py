"""Images to train on and to measure with, their two random views, and the order they come in."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from ifnd_fast.data import picture
from ifnd_fast.data.picture import open_picture, reason_of
from ifnd_fast.runtime.errors import CommandError, UsageError

T = TypeVar("T")
LONGEST = 8  # sides: of an image this much longer than wide the middle is looked at
IN_A_ROW = 100  # images that can't be read, after which training gives up


class Named(Protocol):
    """What has a name for each number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call it in a message."""
        ...


class Images(Named, Protocol):
    """Images by number, with labels where they are known."""

    labels: np.ndarray | None  # (N,) int64
    class_names: list[str] | None

    def image(self, index: int) -> Image.Image:
        """The image in RGB. Whatever Exception it raises is why this image is unreadable."""
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
        return open_picture(self.files[index])

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
            raise UsageError(f"--data {root}: no images below it (looked for {', '.join(sorted(image_extensions()))})")


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


def image_extensions() -> frozenset[str]:
    """Endings of names, lower case, by which a file counts as an image: of the formats of photographs, drawings and
    scans (`picture.FORMATS`) that Pillow can open here."""
    return picture.extensions()


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in image_extensions() and path.is_file())


def middle(image: Image.Image) -> Image.Image:
    """The middle of an image that is longer than LONGEST times its other side; any other as it is. Resized by its short
    side, one of 16,000 x 1 pixels would take gigabytes, of which the centre crop leaves the middle."""
    width, height = image.size
    kept = LONGEST * min(image.size)
    if max(image.size) <= kept:
        return image
    left, top = max(0, (width - kept) // 2), max(0, (height - kept) // 2)
    return image.crop((left, top, left + min(width, kept), top + min(height, kept)))


def attempt(images: Images, index: int, make: Callable[[Image.Image], T]) -> tuple[T | None, str]:
    """make(image), and ""; or None, and why this image is unreadable."""
    try:
        image = images.image(index)
    except CommandError:  # a signal that asks the command to stop
        raise
    except Exception as error:
        return None, reason_of(error)
    try:
        return make(image), ""
    except CommandError:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return None, f"{reason_of(error)} (on making its view, {where.filename}:{where.lineno})"


def refuse_none(images: Named, reasons: Mapping[int, str]) -> None:
    """Raises CommandError: all of the images are unreadable, for these reasons by index."""
    if reasons and len(reasons) == len(images):
        first = min(reasons)
        raise CommandError(f"none of {len(images)} images can be read: {images.name(first)}: {reasons[first]}")
