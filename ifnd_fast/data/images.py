"""Images to train on and to measure with, their two random views, and the order they come in."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from ifnd_fast.data import picture
from ifnd_fast.data.folders import OTHER, LeftOut, find_images
from ifnd_fast.data.identity import Listing, content_of
from ifnd_fast.data.lists import read_list, sizes_of
from ifnd_fast.data.picture import open_picture, reason_of
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.runtime.paths import canonical, shown

T = TypeVar("T")
LONGEST = 8  # sides: of an image this much longer than wide the middle is looked at
OTHER_WAYS = {
    ".tar": "wds:FOLDER (WebDataset)",
    ".parquet": "hf:FOLDER (Hugging Face)",
    ".arrow": "hf:FOLDER (Hugging Face)",
}
"""To give what is in a folder without pictures, by its files' extension."""
IN_A_ROW = 100  # images that can't be read, after which training gives up


class Named(Protocol):
    """What has a name for each number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call it in a message."""
        ...


class Images(Named, Protocol):
    """Images by number, with labels where they are known: what every source of data is (see docs/data.md).

    An image's number means the same image whenever the source is opened, and in every process: orders, labels and
    what a checkpoint holds are by number. Loading processes get the object by fork, or pickled where that is not the
    way: open files are to be opened in them.
    """

    labels: np.ndarray | None  # (N,) int64
    class_names: list[str] | None  # can be printed and encoded, whatever the folders' names are: see `folders.shown`

    def image(self, index: int) -> Image.Image:
        """The image in RGB. Whatever Exception it raises is why this image is unreadable."""
        ...

    def listing(self) -> Listing:
        """Which images these are."""
        ...


class ArrayImages:
    """Images held in memory.

    Args:
        pixels: (N, H, W) grey, (N, H, W, 3) RGB or (N, H, W, 4) RGBA, uint8.
        labels: (N,) integers from 0.
        class_names: of the labels.
    """

    labels: np.ndarray | None
    class_names: list[str] | None

    def __init__(self, pixels: np.ndarray, labels: np.ndarray | None = None, class_names: list[str] | None = None):
        self.pixels, self.labels = pixels, None if labels is None else labels.astype(np.int64)
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Image.Image:
        return picture.to_rgb(Image.fromarray(self.pixels[index]))

    def name(self, index: int) -> str:
        return f"image {index}"

    def listing(self) -> Listing:
        sizes = np.full(len(self), self.pixels[:1].nbytes, dtype=np.int64)
        return Listing([], sizes, content_of(self.pixels, *(() if self.labels is None else (self.labels,))))


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

    def listing(self) -> Listing:
        whole = self.images.listing()
        names = [whole.names[index] for index in self.indices.tolist()] if whole.names else []
        content = content_of(self.indices) + whole.content if whole.content else ""
        return Listing(names, whole.sizes[self.indices], content)


def whole_of(images: Images) -> Images:
    """What these are a subset of, or a subset of one; themselves where they are none."""
    return whole_of(images.images) if isinstance(images, Subset) else images


class FileImages:
    """Image files, with labels where they are known.

    Args:
        files: of N images.
        labels: (N,) int64.
        class_names: of the labels.
        root: the folder that the names in the listing count from; None: they are whole paths.
        sizes: (N,) int64, bytes; None: looked up when they are needed.
    """

    labels: np.ndarray | None
    class_names: list[str] | None

    def __init__(self, files: list[Path], labels: np.ndarray | None = None, class_names: list[str] | None = None,
                 root: Path | None = None, sizes: np.ndarray | None = None):  # fmt: skip
        self.files, self.labels, self.class_names = files, labels, class_names
        self.root, self.sizes = root, sizes

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        return open_picture(self.files[index])

    def name(self, index: int) -> str:
        return shown(str(self.files[index]))

    def listing(self) -> Listing:
        start = "" if self.root is None else str(self.root / "_")[:-1]
        names = [canonical(str(file).removeprefix(start)) for file in self.files]
        return Listing(names, sizes_of(self.files) if self.sizes is None else self.sizes)


class FolderImages(FileImages):
    """Image files below a folder: `folders.find_images` says which, and of which classes.

    Args:
        root: the folder.
        one_class: a single sub-folder is a class; else it takes two.
        left_out: what was left out so far.

    Attributes:
        found: what was found and left out.

    Raises:
        UsageError: it can't be read, or there are no images below it.
    """

    def __init__(self, root: Path, one_class: bool = False, left_out: LeftOut | None = None):
        self.found = find_images(root, image_extensions(), one_class, left_out)
        if not self.found.names:
            lines = "; ".join(line for line, _ in self.found.left_out.lines())
            others = set(self.found.left_out.names.get(OTHER, ()))
            raise UsageError(
                f"--data {shown(str(root))}: no images below it (looked for {', '.join(sorted(image_extensions()))})"
                + (f"; left out: {lines}" if lines else "")
                + next((f"; give them as {how}" for kind, how in OTHER_WAYS.items() if kind in others), "")
            )
        files = [root / name for name in self.found.names]
        super().__init__(files, self.found.labels, self.found.class_names, root, self.found.sizes)


class ListImages(FileImages):
    """Image files named by a list, a line "path label" each (as Places205 has it); paths are below `root`. See
    `lists.read_list`, also for the errors."""

    def __init__(self, list_file: Path, root: Path):
        listed = read_list(list_file, root)
        super().__init__([root / name for name in listed.names], listed.labels, None, root, listed.sizes)
        self.listed = listed

    def listing(self) -> Listing:
        assert self.labels is not None
        return Listing([canonical(name) for name in self.listed.names], self.listed.sizes, content_of(self.labels))


def image_extensions() -> frozenset[str]:
    """Endings of names, lower case, by which a file counts as an image: of the formats of photographs, drawings and
    scans (`picture.FORMATS`) that Pillow can open here."""
    return picture.extensions()


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
