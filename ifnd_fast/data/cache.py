"""Images decoded once: what views are made of, as a memory map that every process on the machine reads.

A cache is two files in a folder, FOLDER/KIND-DIGEST.pixels (the images' uint8 pixels one after the other) and
KIND-DIGEST.npz (their sizes, and why some are unreadable), which is written last: a cache is whole or not there. The
digest is of the images' names, sizes and times of change and of what was done to them, so that changed data or options
have another cache. What is read is held by the system's page cache: once for all processes, as far as memory reaches.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import filelock
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from ifnd_fast.config import DataConfig
from ifnd_fast.data.identity import Listing, content_of, identity_of
from ifnd_fast.data.images import ArrayImages, FileImages, Images, attempt, refuse_none, whole_of
from ifnd_fast.data.picture import UnreadablePictureError
from ifnd_fast.data.processes import make_loader, running
from ifnd_fast.runtime.checkpoint import remove_temporaries, write_atomically
from ifnd_fast.runtime.console import say, track
from ifnd_fast.runtime.errors import CommandError
from ifnd_fast.runtime.paths import shown

FORMAT = 1
A_BATCH = 16  # images that a loading process hands over together
LOCK_SECONDS = 1.0  # between looks at whether another process has made the cache


class CachedImages:
    """Images, and the folder where what is made of them is kept; see `prepared`.

    Args:
        images: N images.
        config: --cache, --cache-limit and --workers.

    Attributes:
        made: what there is by now, by kind.
    """

    labels: np.ndarray | None
    class_names: list[str] | None

    def __init__(self, images: Images, config: DataConfig):
        self.images, self.config, self.made = images, config, dict[str, PreparedImages]()
        self.labels, self.class_names = images.labels, images.class_names

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        return self.images.image(index)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def listing(self) -> Listing:
        return self.images.listing()


class PreparedImages:
    """Images whose pixels come from a cache; views of chance are made of them, as of pictures from files.

    Args:
        images: N images.
        path: of the cache's pixels, which were made of them.
    """

    labels: np.ndarray | None
    class_names: list[str] | None

    def __init__(self, images: Images, path: Path):
        self.images, self.path = images, path
        self.labels, self.class_names = images.labels, images.class_names
        index = read_index(path)
        assert index is not None
        self.sizes, self.reasons = index
        self.ends = _ends(self.sizes)
        # copied where written to, which nobody does: torch warns of arrays that can't be
        self.pixels = np.asarray(np.memmap(path, dtype=np.uint8, mode="c"))

    def __reduce__(self) -> tuple[type, tuple[Images, Path]]:  # a process that is not forked maps the file itself
        return type(self), (self.images, self.path)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels(index))

    def _pixels(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8, in the map itself."""
        if index in self.reasons:
            raise UnreadablePictureError(self.name(index), self.reasons[index])
        height, width = self.sizes[index].tolist()
        end = int(self.ends[index])
        return self.pixels[end - 3 * height * width : end].reshape(height, width, 3)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def listing(self) -> Listing:
        return self.images.listing()


class PreparedViews(PreparedImages):
    """Images of which the cache holds what is made of them: `image` gives that, (3, H, W) uint8 in the map itself."""

    def image(self, index: int) -> Tensor:  # type: ignore[override]
        return torch.from_numpy(self._pixels(index)).permute(2, 0, 1)


View = Callable[[Image.Image], Tensor]


def cached(images: Images, config: DataConfig) -> Images:
    """The images with a cache, where --cache asks for one; those in memory have no use for it."""
    in_memory = isinstance(whole_of(images), ArrayImages)
    return CachedImages(images, config) if config.cache and not in_memory else images


def prepared(images: Images, kind: str, view: View, side: int | None = None) -> tuple[Images, View]:
    """Images and a view of them that together give what view(image) gives, from the cache where the images have one: it
    holds what the view gives, or without a `side` pictures.

    The first process of a machine to need it makes it, while others wait.

    Args:
        images: N images.
        kind: what `view` does, for the cache's name: another view needs another.
        view: of an image in RGB, (3, H, W) uint8, without chance.
        side: of what `view` gives, height and width alike; None: each image has a size of its own.

    Raises:
        CommandError: the cache is larger than --cache-limit, or the folder can't be written.
        LoadingError: a process that loads images failed.
    """
    if not isinstance(images, CachedImages):
        return images, view
    if kind not in images.made:
        images.made[kind] = _open(images.images, kind, view, images.config, side)
    return images.made[kind], as_it_is


def as_it_is(made: Any) -> Any:
    return made


def _open(images: Images, kind: str, view: View, config: DataConfig, side: int | None) -> PreparedImages:
    folder = Path(config.cache)
    path = folder / f"{kind}-{_digest(images, kind)}.pixels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One lock for the folder: a rank that waits here is alive, and its signals are heard between looks.
        with filelock.FileLock(folder / ".lock").acquire(poll_interval=LOCK_SECONDS):
            if read_index(path) is None:
                try:
                    _write(path, images, view, config, side)
                finally:
                    remove_temporaries(folder)
    except OSError as error:
        raise CommandError(f"--cache {shown(config.cache)} can't be written: {error}") from error
    return PreparedImages(images, path) if side is None else PreparedViews(images, path)


def to_picture(image: Image.Image) -> Tensor:
    """The whole picture, (3, H, W) uint8."""
    return functional.pil_to_tensor(image)


def read_index(path: Path) -> tuple[np.ndarray, dict[int, str]] | None:
    """Heights and widths (N, 2) in the cache `path`, and why some of the images are unreadable; None: there is no such
    cache, or it is damaged."""
    try:
        with np.load(path.with_suffix(".npz")) as index:
            sizes, reasons = index["sizes"], json.loads(index["reasons"].tobytes())
        whole = path.stat().st_size == int(_ends(sizes)[-1])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return (sizes, {int(number): reason for number, reason in reasons.items()}) if whole else None


def _ends(sizes: np.ndarray) -> np.ndarray:
    """(N,) int64: where each image's pixels end, bytes."""
    return np.cumsum(3 * sizes.astype(np.int64).prod(axis=1))


def _digest(images: Images, kind: str) -> str:
    identity = identity_of({kind: images.listing()})[kind]
    return hashlib.blake2b(f"{FORMAT} {identity} {_times(images)}".encode(), digest_size=8).hexdigest()


def _times(images: Images) -> str:
    """A digest of when files were changed last; 0 of those that aren't there."""
    whole = whole_of(images)
    files = whole.files if isinstance(whole, FileImages) else []
    return content_of(np.array([file.stat().st_mtime_ns if file.exists() else 0 for file in files], dtype=np.int64))


class _Made(Dataset):
    """Item index: what the view makes of an image, (H, W, 3) uint8, and why it is unreadable."""

    def __init__(self, images: Images, view: View):
        self.images, self.view = images, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        view, reason = attempt(self.images, index, self.view)
        pixels = np.empty((0, 0, 3), dtype=np.uint8) if view is None else view.permute(1, 2, 0).numpy()
        return pixels, reason


def _write(path: Path, images: Images, view: View, config: DataConfig, side: int | None) -> None:
    n, sizes, reasons = len(images), np.zeros((len(images), 2), dtype=np.int32), dict[int, str]()
    refuse_size(3 * n * (side or 0) ** 2, config)
    loader = make_loader(_Made(images, view), config.workers, False, batch_size=A_BATCH, collate_fn=as_it_is)

    def save(file: IO[bytes]) -> None:
        number = written = 0
        with running(loader) as loaded:
            for items in track(loaded, "decoding images", len(loader), A_BATCH):
                for pixels, reason in items:
                    sizes[number] = pixels.shape[:2]
                    if reason:
                        reasons[number] = reason
                    written += file.write(np.ascontiguousarray(pixels).data)
                    number += 1
                refuse_size(written * n // number if written > 1e9 * config.cache_limit else 0, config)
        refuse_none(images, reasons)

    write_atomically(path, save, 3 * n * (side or 0) ** 2)
    index: dict[str, Any] = {"sizes": sizes, "reasons": np.frombuffer(json.dumps(reasons).encode(), dtype=np.uint8)}
    write_atomically(path.with_suffix(".npz"), lambda file: np.savez(file, **index))
    say(f"cache of {n:,} images, {path.stat().st_size / 1e6:,.1f} MB: {shown(str(path))}")


def refuse_size(size: int, config: DataConfig) -> None:
    """Raises CommandError: so many bytes are more than --cache-limit."""
    if size > 1e9 * config.cache_limit:
        raise CommandError(
            f"--cache {shown(config.cache)}: the images take about {size / 1e9:,.3g} GB decoded, --cache-limit is "
            f"{config.cache_limit:g}: raise it where disk and memory allow, or leave --cache out"
        )
