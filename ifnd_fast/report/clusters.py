"""Contact sheets of clusters: what the clustering put together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ifnd_fast.clustering.image_clusters import ImageClusters
from ifnd_fast.data.images import Images
from ifnd_fast.report.thumbnails import Row, Sheet, name_of_class, spread, thumbnails

ROWS, COLUMNS = 12, 10


def cluster_sheets(images: Images, clustering: ImageClusters, levels: Sequence[str]) -> tuple[list[Sheet], str]:
    """A sheet for each level, and an explanation of what they show.

    Args:
        images: The N images that were clustered.
        clustering: Of L levels.
        levels: Their names.
    """
    sheets = []
    for level, title in enumerate(levels):
        labels, confidence = clustering.labels[:, level].numpy(), clustering.confidence[:, level].numpy()
        order = np.argsort(labels, kind="stable")
        sizes = np.bincount(labels[labels >= 0], minlength=clustering.levels[level])
        ends = (labels < 0).sum() + np.cumsum(sizes)
        rows = []
        for cluster, why in choose_clusters(labels, confidence, len(sizes)):
            members = order[ends[cluster] - sizes[cluster] : ends[cluster]]
            rows.append(_row(images, f"cluster {cluster}", why, members, confidence))
        held = sizes[sizes > 0]
        note = f"{held.min():,} to {held.max():,} images each, median {np.median(held):,.0f}"
        empty = len(sizes) - len(held)
        sheets.append(Sheet(title, note + (f"; {empty:,} empty" if empty else ""), rows))
    explanation = (
        f"Each row is a cluster of the last clustering: up to {COLUMNS} of its images, at even steps from the most to "
        f"the least confident, whether accepted or not. A level of up to {ROWS} clusters shows all, the largest first; "
        f"of more it shows the {ROWS // 4} largest, the {ROWS // 4} of highest and the {ROWS // 4} of lowest mean "
        f"confidence among those of two images or more, and {ROWS // 4} drawn at random (always the same ones)."
    )
    return sheets, explanation


def choose_clusters(
    labels: np.ndarray, confidence: np.ndarray, n_clusters: int, count: int = ROWS, seed: int = 0
) -> list[tuple[int, str]]:
    """Clusters to show, none twice, and why each: see the explanation of `cluster_sheets`.

    Args:
        labels: (N,) int, -1 for none.
        confidence: (N,) float.
    """
    known = labels >= 0
    sizes = np.bincount(labels[known], minlength=n_clusters)
    mean = np.bincount(labels[known], confidence[known], minlength=n_clusters) / np.maximum(sizes, 1)
    held = np.flatnonzero(sizes)
    largest_first = held[np.argsort(-sizes[held], kind="stable")]
    if len(held) <= count:
        return [(cluster, "") for cluster in largest_first.tolist()]
    several = held[sizes[held] > 1]
    rising = several[np.argsort(mean[several], kind="stable")]
    chance = np.random.default_rng(seed).permutation(held)
    chosen: dict[int, str] = {}
    for why, order in (
        ("largest", largest_first), ("most confident", rising[::-1]), ("least confident", rising),
        ("at random", chance),
    ):  # fmt: skip
        new = [cluster for cluster in order.tolist() if cluster not in chosen]
        chosen |= dict.fromkeys(new[: count // 4], why)
    return list(chosen.items())


def _row(images: Images, name: str, why: str, members: np.ndarray, confidence: np.ndarray) -> Row:
    note = f"{len(members):,} image{'s' if len(members) > 1 else ''}"
    commonest = None
    if images.labels is not None:
        commonest = int(np.bincount(images.labels[members]).argmax())
        share = (images.labels[members] == commonest).mean()
        note += f", {share:.0%} “{name_of_class(images, commonest)}”"
    note += f", mean confidence {confidence[members].mean():.2f}"
    shown = thumbnails(images, spread(members, confidence, COLUMNS), commonest, confidence)
    return Row(None, f"{name}, {why}" if why else name, note, shown)
