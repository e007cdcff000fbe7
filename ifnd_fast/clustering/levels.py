"""Clustering at several granularities at once: labels and confidence of every image at each of L levels.

Chen et al., Incremental False Negative Detection for Contrastive Learning, ICLR 2022, section 3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ifnd_fast.clustering.distinct import TooFewDistinct
from ifnd_fast.clustering.kmeans import KMeans
from ifnd_fast.clustering.lloyd import centroids_of
from ifnd_fast.clustering.rows import as_matrix, check_rows, single
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.ops import assign_clusters, checks
from ifnd_fast.runtime import distributed as ranks

Progress = Callable[[int, int, float], object]

UNIT_TOLERANCE = 1e-2  # of a row's length: bfloat16 rounds a unit row by up to 0.4 %


class Level(NamedTuple):
    """One level of C clusters: what was found and what it took."""

    centroids: Tensor  # (C, D) float32, of unit length
    labels: Tensor  # (N,) int32, the nearest centroid (the lowest among equals); of a rank's own rows
    confidence: Tensor  # (N,) float32, above 0 and up to 1
    n_iter: int  # Lloyd iterations
    inertia: float  # of all rows and k-means' own centroids, before they were scaled to unit length
    seconds: float  # k-means and the pass for labels and confidence
    bytes: int  # of the three tensors


@torch.no_grad()
def cluster_levels(
    features: Tensor,
    levels: Sequence[int],
    *,
    temperature: float = 0.2,
    max_iter: int = 20,
    n_init: int = 1,
    engine: str = "auto",
    spherical: bool = False,
    seed: int = 0,
    distributed: bool = False,
    previous: Tensor | None = None,
    progress: Progress | None = None,
) -> list[Level]:
    """Cluster unit features at every level, and rate each label's confidence.

    At level l, k-means with C_l clusters gives the centroids c_j, which are then L2-normalised. Image i with
    feature z_i gets

        label       y_l(i)     = argmax_j z_i.c_j                                   (ties: the lowest j)
        confidence  kappa_l(i) = exp(z_i.c_y / tau) / sum_j exp(z_i.c_j / tau),     y = y_l(i)

    The levels share the features, which stay where they are, and are swept one level after another: a sweep does
    2 C operations for each number it reads, so that reading once for several levels would gain nothing from some
    hundred clusters on.

    Args:
        features: (N, D) with L2-normalised rows; float32, float16 or bfloat16.
        levels: C_l, the number of clusters of each level, such as (25000, 50000, 100000).
        temperature: tau of the confidence, 1e-6 to 1e6.
        max_iter, n_init, engine, spherical: of `ifnd_fast.KMeans`.
        seed: of the first level's k-means; level l uses seed + l.
        distributed: the features are this rank's share of all rows, as for `ifnd_fast.KMeans`.
        previous: (N, L) int32 labels of these images from an earlier clustering, -1 for none; k-means starts from
            the means of their features now, instead of from new draws, and needs fewer iterations.
        progress: called as progress(level, iteration, inertia), levels from 0 and iterations from 1.

    Raises:
        TypeError, ValueError: a parameter is unfit, features are not finite unit rows, `previous` does not fit, N is
            below the largest level or there are fewer distinct rows than that: then pass scale_levels(levels, that
            many), which the message says.

    Example:
        >>> features = torch.eye(4).repeat(25, 1)
        >>> coarse, fine = cluster_levels(features, (2, 4))
        >>> fine.centroids.shape, fine.labels.shape, fine.labels.unique().tolist()
        (torch.Size([4, 4]), torch.Size([100]), [0, 1, 2, 3])
    """
    levels, temperature = check_levels(levels), checks.temperature(temperature)
    settings: dict[str, Any] = {
        "max_iter": max_iter, "n_init": n_init, "seed": seed, "spherical": spherical, "engine": engine,
        "distributed": distributed,
    }  # fmt: skip
    KMeans(1, **settings).check_parameters()
    with ranks.raise_on_all_ranks(distributed):
        features = single(as_matrix("features", features))
    shards = Shards(len(features), features.device, distributed)
    with ranks.raise_on_all_ranks(distributed):
        _check_features(features, levels, shards.total)
        if previous is not None:
            _check_previous(previous, features, levels)
    found = []
    for level, n_clusters in enumerate(levels):
        kmeans = KMeans(n_clusters, **settings | {"seed": seed + level})
        kmeans.check_parameters()
        labels = None if previous is None else previous[:, level].contiguous()
        try:
            found.append(_level(kmeans, features, labels, temperature, shards, _of_level(progress, level)))
        except TooFewDistinct as error:
            raise ValueError(
                f"features has only {error.distinct} distinct rows, fewer than the clusters of levels={levels}: "
                f"pass levels=scale_levels(levels, {error.distinct})"
            ) from error
    return found


def _level(
    kmeans: KMeans,
    features: Tensor,
    previous: Tensor | None,
    temperature: float,
    shards: Shards,
    callback: Callable[[int, float], object] | None,
) -> Level:
    """The clusters of checked features, from the means of `previous` labels (N,) where there are any."""
    started, start = time.perf_counter(), None
    if previous is not None:
        start = centroids_of(features, previous, kmeans.n_clusters, shards, kmeans.spherical)
    found = kmeans._fit(features, shards, start, callback)
    centroids = F.normalize(found.centers)
    result = centroids, *assign_clusters(features, centroids.to(features.dtype), temperature=temperature)
    if features.device.type == "cuda":
        torch.cuda.current_stream(features.device).synchronize()  # or the seconds would be of the launches
    size = sum(tensor.nbytes for tensor in result)
    return Level(*result, found.n_iter, found.inertia, time.perf_counter() - started, size)


def scale_levels(levels: Sequence[int], n: int) -> tuple[int, ...]:
    """The levels themselves if none has more than n clusters, else scaled down so that the largest has n.

    Ratios are kept up to rounding down; no level goes below 2 clusters (1 where n is 1).

    n is of images that can be told apart, so not of unreadable or duplicated ones; a part of those, for at least so
    many images a cluster: scale_levels(levels, n // 4).

    Raises:
        ValueError: levels are not positive integers, or n is none.
    """
    levels, n = check_levels(levels), checks.integer("n", n, 1)
    largest = max(levels)
    if largest <= n:
        return levels
    return tuple(min(n, max(2, level * n // largest)) for level in levels)


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """Their numbers of clusters as a tuple of int; of NumPy's integers too."""
    if isinstance(levels, Tensor) or not isinstance(levels, Iterable):
        raise TypeError(f"levels must be a sequence of integers, got {levels!r}")
    levels = tuple(levels)
    try:
        found = tuple(checks.integer("a level", level, 1) for level in levels)
    except ValueError:
        found = ()
    if not found:
        raise ValueError(f"levels must be positive integers, at least one of them, got {levels}")
    return found


def _of_level(progress: Progress | None, level: int) -> Callable[[int, float], object] | None:
    if progress is None:
        return None
    return lambda iteration, inertia: progress(level, iteration, inertia)


def _check_previous(previous: Tensor, features: Tensor, levels: tuple[int, ...]) -> None:
    checks.integers("previous", previous, torch.int32, (len(features), len(levels)), features, "features")
    for level, n_clusters in enumerate(levels):
        largest = int(previous[:, level].max())
        if largest >= n_clusters:
            raise ValueError(f"previous has label {largest} at level {level}, which has {n_clusters} clusters")


def _check_features(features: Tensor, levels: tuple[int, ...], total: int) -> None:
    if total < max(levels):
        raise ValueError(
            f"features has {total} rows, fewer than the clusters of levels={levels}: "
            "pass levels=scale_levels(levels, N)"
        )
    norms = check_rows("features", features)
    off = ((norms - 1).abs() > UNIT_TOLERANCE).nonzero()
    if len(off):
        row = int(off[0])
        raise ValueError(
            f"features must have rows of length 1, but row {row} has length {float(norms[row]):.3g}: "
            "pass torch.nn.functional.normalize(features)"
        )
