"""Contact sheets: anchors, each beside images that clustering detected as its false negatives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ifnd_fast.clustering.image_clusters import ImageClusters
from ifnd_fast.data.images import Images
from ifnd_fast.report.thumbnails import Row, Sheet, class_name, describe, spread, thumbnail, thumbnails
from ifnd_fast.training.saved_state import SavedState

IN_BATCH_SAMPLE = 4096


def detection_sheets(
    images: Images, state: SavedState, clustering: ImageClusters | None, levels: Sequence[str]
) -> tuple[list[Sheet], str]:
    """The contact sheets of a checkpoint and an explanation of what they show, or none and the reason why.

    Args:
        images: The N images that it was trained on.
        state: The checkpoint; with (N, L) accepted labels.
        clustering: The checkpoint's, where there is one.
        levels: Names of the L levels.
    """
    assert state.accepted is not None
    epoch, labels = state.epoch, state.accepted.numpy()
    if labels.max(initial=-1) < 0:
        return [], f"No contact sheets: no pseudo label was accepted by epoch {epoch}."
    confidence = None
    if clustering is not None and clustering.explains(state.accepted):
        confidence = clustering.confidence.numpy()
    candidates, source = _candidates(state.queued, len(images))
    groups = "clusters" if images.labels is None else "classes"
    order = "in order" if confidence is None else "from the most to the least confident"
    explanation = (
        f"Each row starts with an anchor. Beside it are images {source} that carry the anchor's accepted "
        f"label at epoch {epoch}: up to 10, at even steps {order}. Anchors are drawn at random (always the "
        f"same ones), spread over the {groups}; images with detections at more levels come first."
    )
    unreadable = np.zeros(len(labels), dtype=bool)
    unreadable[list(state.unreadable)] = True
    return contact_sheets(images, labels, confidence, candidates, levels, unreadable=unreadable), explanation


def contact_sheets(
    images: Images,
    labels: np.ndarray,
    confidence: np.ndarray | None,
    candidates: np.ndarray,
    levels: Sequence[str],
    *,
    anchors: int = 12,
    columns: int = 10,
    unreadable: np.ndarray | None = None,
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
        unreadable: (N,) bool, images that count for nothing; default: none.
    """
    unreadable = np.zeros(len(labels), dtype=bool) if unreadable is None else unreadable
    chosen = choose_anchors(labels, candidates, images.labels, anchors, unreadable=unreadable)
    n_readable = max(1, int((~unreadable).sum()))
    sheets = []
    for level, title in enumerate(levels):
        kappa = None if confidence is None else confidence[:, level]
        own = labels[:, level]
        rows = [_row(images, anchor, own, kappa, candidates, columns) for anchor in chosen.tolist()]
        accepted = int((own >= 0).sum())
        note = f"{accepted:,} of {n_readable:,} labels accepted ({accepted / n_readable:.0%})"
        sheets.append(Sheet(title, note, rows))
    return sheets


def choose_anchors(
    labels: np.ndarray,
    candidates: np.ndarray,
    truth: np.ndarray | None,
    count: int = 12,
    seed: int = 0,
    unreadable: np.ndarray | None = None,
) -> np.ndarray:
    """Indices of `count` anchors (fewer if there are fewer images that are readable), the same ones at every call.

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
    chosen = np.lexsort((chance, turn, detections == 0))
    chosen = (chosen if unreadable is None else chosen[~unreadable[chosen]])[:count]
    return chosen[np.lexsort((chosen, group[chosen]))]


def detected(labels: np.ndarray, candidates: np.ndarray, anchor: int) -> np.ndarray:
    """The candidates, (P,) indices, that share `anchor`'s accepted label at one level; not itself."""
    if labels[anchor] < 0:
        return candidates[:0]
    return candidates[(labels[candidates] == labels[anchor]) & (candidates != anchor)]


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
    right = None if truth is None else int(truth[anchor])
    shown = thumbnails(images, spread(found, confidence, columns), right, confidence)
    first = thumbnail(images, anchor, f"anchor: {describe(images, anchor)}")
    return Row(first, class_name(images, anchor) or f"image {anchor}", note, shown)


def _candidates(queued: np.ndarray | None, n: int) -> tuple[np.ndarray, str]:
    """Distinct indices that may be detected, and where they come from."""
    if queued is not None:
        indices = np.unique(queued)
        indices = indices[(indices >= 0) & (indices < n)]
        return indices, f"among the {len(indices):,} in the queue"
    if n <= IN_BATCH_SAMPLE:
        return np.arange(n), f"among all {n:,} (in-batch negatives: there is no queue)"
    sample = np.sort(np.random.default_rng(0).choice(n, IN_BATCH_SAMPLE, replace=False))
    return sample, f"in a fixed random sample of {IN_BATCH_SAMPLE:,} (in-batch negatives: there is no queue)"
