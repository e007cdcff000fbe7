"""Images to train on and to measure with, their two random views, and the order they come in."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from ifnd_fast.runtime.errors import UsageError


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
