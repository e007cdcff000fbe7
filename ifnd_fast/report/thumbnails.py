"""Small pictures of images in rows, and which of many to show."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ifnd_fast.data.images import Images, attempt

SIDE = 64  # largest thumbnail, pixels


@dataclass(frozen=True)
class Thumbnail:
    source: str | None  # a data URI; None: the image can't be read
    text: str
    wrong: bool = False


@dataclass(frozen=True)
class Row:
    anchor: Thumbnail | None  # what stands apart before the others
    name: str
    note: str
    shown: list[Thumbnail]


@dataclass(frozen=True)
class Sheet:
    title: str
    note: str
    rows: list[Row]

    @property
    def has_wrong(self) -> bool:
        return any(thumbnail.wrong for row in self.rows for thumbnail in row.shown)


def spread(found: np.ndarray, confidence: np.ndarray | None, count: int) -> np.ndarray:
    """At most `count` of `found`: the middle one of each of `count` equal parts by falling confidence."""
    ordered = np.sort(found) if confidence is None else found[np.lexsort((found, -confidence[found]))]
    if len(ordered) <= count:
        return ordered
    return ordered[((np.arange(count) + 0.5) * len(ordered) / count).astype(np.int64)]


def thumbnails(
    images: Images, indices: np.ndarray, right: int | None, confidence: np.ndarray | None
) -> list[Thumbnail]:
    """Thumbnails of `indices` with their confidence, (N,); those of another class than `right` are marked as wrong."""
    shown = []
    for index in indices.tolist():
        wrong = images.labels is not None and right is not None and bool(images.labels[index] != right)
        text = describe(images, index)
        text += "" if confidence is None else f", confidence {confidence[index]:.2f}"
        text += ", wrong" if wrong else ""
        shown.append(thumbnail(images, index, text, wrong))
    return shown


def describe(images: Images, index: int) -> str:
    name = class_name(images, index)
    return f"{name}, image {index}" if name else f"image {index}"


def class_name(images: Images, index: int) -> str | None:
    """Of the image's true class, where it is known."""
    return None if images.labels is None else name_of_class(images, int(images.labels[index]))


def name_of_class(images: Images, label: int) -> str:
    return images.class_names[label] if images.class_names else f"class {label}"


def thumbnail(images: Images, index: int, text: str, wrong: bool = False) -> Thumbnail:
    """Of an image, described by `text` and, where it can't be read, the reason."""
    source, reason = attempt(images, index, _encoded)
    return Thumbnail(source, text if source else f"{text}, not readable: {reason}", wrong)


def _encoded(image: Image.Image) -> str:
    """A square picture as a data URI, in the smaller of PNG and JPEG."""
    side = min(SIDE, *image.size)
    image = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, data = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
