"""The features of some of a run's images in the plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from ifnd_fast.report.plots import GRID, SERIES, Texts, shortened
from ifnd_fast.training.saved_state import StoredFeatures

FEWEST_FOR_TSNE = 50
MARKERS = "o^"
MOST_GROUPS = len(SERIES) * len(MARKERS)


def embed(features: np.ndarray) -> tuple[np.ndarray, str]:
    """Points (n, 2) for features (n, D), the same bits for the same features, and the method's name."""
    points = np.zeros((len(features), 2))
    if not np.ptp(features, axis=0).any():  # collapsed: all are alike
        return points, "PCA"
    if len(features) < FEWEST_FOR_TSNE:
        n_components = min(2, *features.shape)
        points[:, :n_components] = PCA(n_components, svd_solver="full").fit_transform(features)
        return points, "PCA"
    with threadpool_limits(1):  # several threads add up in an order of their own
        tsne = TSNE(init="pca", perplexity=min(30, len(features) // 5), max_iter=500, random_state=0)
        return tsne.fit_transform(features), "t-SNE"


def draw_embedding(
    figure: Figure, stored: StoredFeatures, groups: np.ndarray | None, name_of: Sequence[str], what: str
) -> Texts | None:
    """A point for each image, coloured by its group.

    Args:
        stored: n features.
        groups: (n,) int, -1 for none; None: all points alike.
        name_of: Names of the groups.
        what: What a group is, such as "true class".
    """
    if len(stored.features) < 3:
        return None
    points, method = embed(stored.features)
    groups = np.full(len(points), -1) if groups is None else groups
    found, sizes = np.unique(groups[groups >= 0], return_counts=True)
    shown = np.sort(found[np.argsort(-sizes, kind="stable")][:MOST_GROUPS])
    figure.set_size_inches(5.6, 5.0)
    axes = figure.subplots()
    legend: list[tuple[Any, str]] = []  # told to it by name: of itself it leaves out names that start with _
    others = points[~np.isin(groups, shown)]
    if len(others):
        colour, label = (GRID, "others") if len(shown) else (SERIES[0], None)
        dots = axes.scatter(others[:, 0], others[:, 1], s=7, color=colour, linewidths=0)
        legend += [(dots, label)] if label else []
    for i, group in enumerate(shown.tolist()):
        own = points[groups == group]
        dots = axes.scatter(
            own[:, 0], own[:, 1], s=9, color=SERIES[i % len(SERIES)], marker=MARKERS[i // len(SERIES)], linewidths=0,
        )  # fmt: skip
        legend.append((dots, shortened(name_of[group])))
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    if len(shown):
        fit_one_row = sum(len(shortened(name_of[group])) + 4 for group in shown) < 80
        figure.legend(
            *zip(*legend, strict=True), loc="outside upper left", ncols=len(shown) + 1 if fit_one_row else 4,
            markerscale=2, handletextpad=0.2, columnspacing=1.0,
        )  # fmt: skip
    caption = f"{len(points):,} images by their {stored.source}: near in the plane means near in feature space, mostly."
    if len(shown):
        caption += f" Coloured by {what}{f', the {MOST_GROUPS} commonest' if len(shown) < len(found) else ''}."
    alt = f"Scatter plot of {len(points):,} images, {len(found)} groups by {what}."
    return f"Features in the plane ({method})", caption, alt
