"""Images in files of NumPy: .npy, read as it is needed, and .npz with labels and parts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ifnd_fast.data.folders import TEST, TRAIN
from ifnd_fast.data.identity import Listing, content_of
from ifnd_fast.data.images import ArrayImages
from ifnd_fast.data.picture import scaled
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.runtime.paths import shown

ENDINGS = (".npy", ".npz")
LABELS = {"y", "label", "labels", "target", "targets"}
"""Words in the names of an .npz file's arrays; what has none of them are pixels."""
LOOKED_AT = 1000  # images of a memory map that its identity is of


class MappedImages(ArrayImages):
    """Images of which the system reads what is looked at; their identity is of some of them."""

    def listing(self) -> Listing:
        some = np.unique(np.linspace(0, len(self) - 1, min(LOOKED_AT, len(self))).astype(int))
        sizes = np.full(len(self), self.pixels[:1].nbytes, dtype=np.int64)
        return Listing([], sizes, content_of(np.ascontiguousarray(self.pixels[some])))


def open_arrays(path: Path, split: str) -> ArrayImages | None:
    """Images (N, H, W) or (N, H, W, C) or (N, C, H, W), C of 1, 3 or 4, of 8 or 16 bits, or floats from 0 to 1 or 255.

    Of an .npz file the names tell what is what: with "train", or "test", "val", ... for a part, and "y", "labels" or
    "targets" for labels (N,) or (N, 1), such as x_train, y_train, x_test, y_test, or images and labels alone.

    Args:
        split: "train" or "test"; of the latter None where there is none.

    Raises:
        UsageError: the file can't be read, or holds something else, or it can't be told what.
    """
    called = f"--data {shown(str(path))}"
    try:
        if path.suffix.lower() == ".npy":
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            return None if split == "test" else MappedImages(as_pixels(found, called))
        with np.load(path, allow_pickle=False) as arrays:
            parts = _parts(arrays.files, called)
            if split not in parts:
                return None
            pixels, labels = parts[split]
            images = ArrayImages(as_pixels(arrays[pixels], f"{called}, {pixels}"))
            if labels:
                images.labels = _labels(arrays[labels], len(images), f"{called}, {labels}")
            return images
    except (OSError, ValueError, EOFError) as error:  # what NumPy makes of broken files, and of objects in them
        raise UsageError(f"{called} can't be read: {error}") from error


def _parts(names: Iterable[str], called: str) -> dict[str, tuple[str, str]]:
    """The names of pixels and labels ("": none) of "train" and perhaps "test"."""
    words = {name: set(re.findall("[a-z]+", name.lower())) for name in names}
    parts = {name: next((part for part in TEST if part in own), "train" if own & {*TRAIN} else "")
             for name, own in words.items()}  # fmt: skip
    found = {}
    tests = [part for part in TEST if any(parts[name] == part and not words[name] & LABELS for name in words)]
    for split, part in (("train", "train" if "train" in parts.values() else ""), *(("test", t) for t in tests[:1])):
        pixels = [name for name in words if parts[name] == part and not words[name] & LABELS]
        labels = [name for name in words if parts[name] == part and words[name] & LABELS]
        if len(pixels) != 1 or len(labels) > 1:
            told = ", ".join(words) or "none"
            names_to_give = "images and labels, or x_train, y_train, x_test and y_test"
            raise UsageError(
                f"{called}: which of its arrays ({told}) are the {split} images? Name them {names_to_give}"
            )
        found[split] = pixels[0], labels[0] if labels else ""
    return found


def as_pixels(array: np.ndarray, called: str) -> np.ndarray:
    """(N, H, W) or (N, H, W, C) uint8, a view where it can be.

    Raises:
        UsageError: they are no images, or of no range that it can be told what is white.
    """
    if array.ndim == 4 and array.shape[-1] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = np.moveaxis(array, 1, -1)
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] not in (1, 3, 4)) or 0 in array.shape[1:]:
        raise UsageError(f"{called}: images must be (N, H, W), (N, H, W, C) or (N, C, H, W), got {array.shape}")
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype == np.uint8 or not len(array):
        return array.astype(np.uint8, copy=False)
    if array.dtype.kind not in "buif":
        raise UsageError(f"{called}: images must be numbers, got {array.dtype}")
    finite = np.isfinite(array)
    if not finite.all():
        first = int(np.flatnonzero(~finite.reshape(len(array), -1).all(axis=1))[0])
        raise UsageError(f"{called}: image {first} holds values that are not finite")
    low, high = float(array.min()), float(array.max())
    ranges = [65535.0] if array.dtype == np.uint16 else [1.0, 255.0] if array.dtype.kind in "bf" else [255.0]
    white = next((top for top in ranges if high <= top), None)
    if low < 0 or white is None:
        raise UsageError(
            f"{called}: values from {low:g} to {high:g} of {array.dtype}: save images as uint8, or floats from 0 to 1"
        )
    return np.stack([scaled(image, 0, white) for image in array])


def _labels(array: np.ndarray, n: int, called: str) -> np.ndarray:
    labels = array.reshape(len(array), -1) if array.ndim else array
    if labels.ndim != 2 or labels.shape != (n, 1) or array.dtype.kind not in "bui" or (n and labels.min() < 0):
        raise UsageError(f"{called}: labels must be {n} integers from 0, got {array.dtype} of shape {array.shape}")
    return labels[:, 0].astype(np.int64)
