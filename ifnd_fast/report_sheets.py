"""Contact sheets: anchors, each beside images that clustering detected as its false negatives."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ifnd_fast.data import Images

SIDE = 64  # largest thumbnail, pixels


@dataclass(frozen=True)
class Thumbnail:
    source: str | None  # a data URI; None: the image can't be read
    text: str
    wrong: bool = False


@dataclass(frozen=True)
class Row:
    anchor: Thumbnail
    name: str
    note: str
    shown: list[Thumbnail]


@dataclass(frozen=True)
class Sheet:
    title: str
    note: str
    rows: list[Row]


def contact_sheets(
    images: Images,
    labels: np.ndarray,
    confidence: np.ndarray | None,
    candidates: np.ndarray,
    levels: Sequence[str],
    *,
    anchors: int = 12,
    columns: int = 10,
) -> list[Sheet]:
    """One sheet per level, all with the same anchors.

    Args:
        images: The N images of the data set.
        labels: (N, L) int accepted pseudo labels, -1 where none is accepted.
        confidence: (N, L) float confidence of the labels; None where it is not known.
        candidates: (K,) int64 distinct indices of the images that may be detected, as those of the queue.
        levels: Names of the L levels.
        anchors: Rows of a sheet.
        columns: Most detected images shown beside an anchor.
    """
    chosen = choose_anchors(labels, candidates, images.labels, anchors)
    sheets = []
    for level, title in enumerate(levels):
        kappa = None if confidence is None else confidence[:, level]
        own = labels[:, level]
        rows = [_row(images, anchor, own, kappa, candidates, columns) for anchor in chosen.tolist()]
        accepted = int((own >= 0).sum())
        note = f"{accepted:,} of {len(labels):,} labels accepted ({accepted / len(labels):.0%})"
        sheets.append(Sheet(title, note, rows))
    return sheets


def choose_anchors(
    labels: np.ndarray, candidates: np.ndarray, truth: np.ndarray | None, count: int = 12, seed: int = 0
) -> np.ndarray:
    """Indices of `count` anchors (fewer if there are fewer images), the same ones at every call.

    Each group (true class, or cluster of the first level where classes are unknown) gives one image in turn,
    first those with detections at more levels; images without any come last. Apart from that the order is
    drawn from `seed`, so that no anchor is picked for its looks or its confidence.
    """
    detections = np.zeros(len(labels), dtype=np.int64)
    for column in labels.T:
        held = np.bincount(column[candidates][column[candidates] >= 0], minlength=column.max(initial=0) + 1)
        others = held[column]
        others[candidates] -= 1
        detections += (column >= 0) & (others > 0)
    group = labels[:, 0] if truth is None else truth
    chance = np.random.default_rng(seed).permutation(len(labels))
    order = np.lexsort((chance, -detections, group))
    sizes = np.unique(group[order], return_counts=True)[1]
    turn = np.empty(len(labels), dtype=np.int64)
    turn[order] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = np.lexsort((chance, turn, detections == 0))[:count]
    return chosen[np.lexsort((chosen, group[chosen]))]


def detected(labels: np.ndarray, candidates: np.ndarray, anchor: int) -> np.ndarray:
    """The candidates, (P,) indices, that share `anchor`'s accepted label at one level; not itself."""
    if labels[anchor] < 0:
        return candidates[:0]
    return candidates[(labels[candidates] == labels[anchor]) & (candidates != anchor)]


def spread(found: np.ndarray, confidence: np.ndarray | None, count: int) -> np.ndarray:
    """At most `count` of `found`: the middle one of each of `count` equal parts by falling confidence."""
    ordered = np.sort(found) if confidence is None else found[np.lexsort((found, -confidence[found]))]
    if len(ordered) <= count:
        return ordered
    return ordered[((np.arange(count) + 0.5) * len(ordered) / count).astype(np.int64)]


def _row(
    images: Images,
    anchor: int,
    labels: np.ndarray,
    confidence: np.ndarray | None,
    candidates: np.ndarray,
    columns: int,
) -> Row:
    truth = images.labels
    found = detected(labels, candidates, anchor)
    if labels[anchor] < 0:
        note = "label not accepted"
    else:
        note = f"{len(found):,} detected"
        if truth is not None and len(found):
            note += f", {(truth[found] == truth[anchor]).mean():.0%} right"
    shown = []
    for index in spread(found, confidence, columns).tolist():
        wrong = truth is not None and bool(truth[index] != truth[anchor])
        text = _describe(images, index)
        text += "" if confidence is None else f", confidence {confidence[index]:.2f}"
        text += ", wrong" if wrong else ""
        shown.append(Thumbnail(_thumbnail(images, index), text, wrong))
    first = Thumbnail(_thumbnail(images, anchor), f"anchor: {_describe(images, anchor)}")
    return Row(first, _class_name(images, anchor) or f"image {anchor}", note, shown)


def _describe(images: Images, index: int) -> str:
    name = _class_name(images, index)
    return f"{name}, image {index}" if name else f"image {index}"


def _class_name(images: Images, index: int) -> str | None:
    if images.labels is None:
        return None
    label = int(images.labels[index])
    return images.class_names[label] if images.class_names else f"class {label}"


def _thumbnail(images: Images, index: int) -> str | None:
    """A square thumbnail, in the smaller of PNG and JPEG; None when the image can't be read."""
    try:
        image = images.image(index).convert("RGB")
    except OSError:
        return None
    side = min(SIDE, *image.size)
    image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, data = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
