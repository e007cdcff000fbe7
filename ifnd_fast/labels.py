"""Pseudo labels: cluster the features, rate each label's confidence, accept the most confident ones.

Chen et al., Incremental False Negative Detection for Contrastive Learning, ICLR 2022, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ifnd_fast import distributed
from ifnd_fast.distributed import Shards
from ifnd_fast.kmeans import KMeans, as_matrix, centroids_of, check_rows, operator_chunks
from ifnd_fast.ops import assign_clusters, checks

Progress = Callable[[int, int, float], object]

UNIT_TOLERANCE = 1e-2  # of a row's length: bfloat16 rounds a unit row by up to 0.4 %


class PseudoLabels:
    """Cluster labels of N images at L levels, with the confidence that decides which to trust.

    At level l, k-means with C_l clusters gives the centroids c_j, which are then L2-normalised. Image i with
    feature z_i gets

        label       y_l(i)     = argmax_j z_i.c_j                                   (ties: the lowest j)
        confidence  kappa_l(i) = exp(z_i.c_y / tau) / sum_j exp(z_i.c_j / tau),     y = y_l(i)

    and `accept(r)` keeps, at every level, the ceil(r N) labels of highest confidence.

    Args:
        levels: C_l, the number of clusters of each level, such as (25000, 50000, 100000).
        temperature: tau of the confidence, above 0.
        max_iter, n_init, engine, spherical: of `ifnd_fast.KMeans`.
        seed: of the first level's k-means; level l uses seed + l.
        distributed: the features given to `fit` are this rank's share of all, as for `ifnd_fast.KMeans`. All
            ranks then have the labels and confidences of all N images.

    Attributes:
        centroids: L tensors (C_l, D) float32, of unit length.
        labels: (N, L) int32, of every image, accepted or not.
        confidence: (N, L) float32, above 0 and up to 1.

    All are None before `fit` and then live on the features' device.

    Example:
        >>> features = torch.nn.functional.normalize(torch.randn(100, 16))
        >>> pseudo_labels = PseudoLabels((4, 8)).fit(features)
        >>> (pseudo_labels.accept(0.25) >= 0).sum(0)
        tensor([25, 25])
    """

    def __init__(
        self,
        levels: Sequence[int],
        *,
        temperature: float = 0.2,
        max_iter: int = 20,
        n_init: int = 1,
        engine: str = "auto",
        spherical: bool = False,
        seed: int = 0,
        distributed: bool = False,
    ) -> None:
        self.levels = _check_levels(levels)
        self.temperature = checks.temperature(temperature)
        self.max_iter = max_iter
        self.n_init = n_init
        self.engine = engine
        self.spherical = spherical
        self.seed = seed
        self.distributed = distributed
        self.centroids: list[Tensor] | None = None
        self.labels: Tensor | None = None
        self.confidence: Tensor | None = None

    @torch.no_grad()
    def fit(
        self,
        features: Tensor,
        progress: Progress | None = None,
        previous: Tensor | None = None,
        max_iter: int | None = None,
    ) -> PseudoLabels:
        """Cluster the features at every level; nothing changes if that fails.

        Args:
            features: (N, D) with L2-normalised rows; float32, float16 or bfloat16.
            progress: called as progress(level, iteration, inertia), levels from 0 and iterations from 1.
            previous: (N, L) int32 labels of these images from an earlier clustering, -1 for none; k-means starts from
                the means of their features now, instead of from new draws, and needs fewer iterations.
            max_iter: in place of the one given when this was made.

        Returns:
            self.

        Raises:
            TypeError, ValueError: features are not finite unit rows, N is below the largest level or there
                are fewer distinct rows than that (see `scale_levels`).
        """
        with distributed.agreed(self.distributed):
            features = as_matrix("features", features)
        shards = Shards(len(features), features.device, self.distributed)
        with distributed.agreed(self.distributed):
            self._check_features(features, shards.total)
            if previous is not None and previous.shape != (len(features), len(self.levels)):
                wanted = (len(features), len(self.levels))
                raise ValueError(f"previous must have shape (N, L) = {wanted}, got {tuple(previous.shape)}")
        centroids, labels, confidence = [], [], []
        for level, n_clusters in enumerate(self.levels):
            kmeans = KMeans(
                n_clusters,
                max_iter=max_iter or self.max_iter,
                n_init=self.n_init,
                seed=self.seed + level,
                spherical=self.spherical,
                engine=self.engine,
                distributed=self.distributed,
            )
            start = None
            if previous is not None:
                start = centroids_of(features, previous[:, level].contiguous(), n_clusters, self.spherical, shards)
            kmeans.fit(features, init=start, callback=_of_level(progress, level))
            centroids.append(F.normalize(kmeans.cluster_centers_))
            y, kappa = assign_with_confidence(features, centroids[-1], self.temperature)
            labels.append(y)
            confidence.append(kappa)
        self.centroids = centroids
        self.labels = shards.gather(torch.stack(labels, dim=1))
        self.confidence = shards.gather(torch.stack(confidence, dim=1))
        return self

    def _check_features(self, features: Tensor, total: int) -> None:
        if total < max(self.levels):
            raise ValueError(
                f"features has {total} rows, fewer than the clusters of levels={self.levels}: "
                "pass levels=scale_levels(levels, N)"
            )
        _check_unit_rows(features)

    def accept(self, rate: float) -> Tensor:
        """The labels of each level's ceil(rate N) most confident images, -1 for all others; (N, L) int32.

        Of equally confident images the lower index comes first, so what a rate accepts, every higher rate
        accepts too.

        Raises:
            RuntimeError: not fitted yet.
            ValueError: rate is not in 0..1.
        """
        if self.labels is None or self.confidence is None:
            raise RuntimeError("there are no pseudo labels yet: call fit first")
        _check_fraction("rate", rate)
        most_confident = self.confidence.argsort(dim=0, descending=True, stable=True)
        rejected = most_confident[accepted_count(rate, len(self.labels)) :]
        return self.labels.scatter(0, rejected, -1)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything `fit` computed, as tensors: levels; once fitted, labels, confidence, centroids.0..."""
        state = {"levels": torch.tensor(self.levels)}
        if self.labels is None or self.confidence is None or self.centroids is None:
            return state
        state |= {"labels": self.labels, "confidence": self.confidence}
        return state | {f"centroids.{level}": centroids for level, centroids in enumerate(self.centroids)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave, on the devices its tensors are on.

        Raises:
            ValueError: it is of other levels, or its tensors don't belong together.
        """
        levels = tuple(state["levels"].tolist()) if "levels" in state else None
        if levels != self.levels:
            raise ValueError(f"state has the pseudo labels of levels {levels}, wanted {self.levels}")
        if "labels" not in state:
            self.centroids = self.labels = self.confidence = None
            return
        names = [f"centroids.{level}" for level in range(len(self.levels))]
        missing = {"confidence", *names} - state.keys()
        if missing:
            raise ValueError(f"state lacks {sorted(missing)}: it was not saved by PseudoLabels.state_dict")
        labels, confidence, centroids = state["labels"], state["confidence"], [state[name] for name in names]
        shape = (len(labels), len(levels))
        if labels.shape != shape or confidence.shape != shape or tuple(map(len, centroids)) != levels:
            raise ValueError(
                f"state must have labels and confidence of shape (N, {len(levels)}), centroids of {levels} "
                f"rows; got {tuple(labels.shape)}, {tuple(confidence.shape)}, {[len(c) for c in centroids]}"
            )
        self.labels, self.confidence, self.centroids = labels, confidence, centroids


def assign_with_confidence(features: Tensor, centroids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Label (N,) int32 and confidence (N,) float32 of unit rows among unit centroids."""
    centroids = centroids.to(features.dtype)
    labels = torch.empty(len(features), dtype=torch.int32, device=features.device)
    confidence = torch.empty(len(features), device=features.device)
    for part in operator_chunks(features, len(centroids), features.dtype):
        labels[part], confidence[part] = assign_clusters(features[part], centroids, temperature=temperature)
    return labels, confidence


def acceptance_rate(progress: float, acceptance_end: float = 1.0) -> float:
    """The share of labels to accept: linear from 0 to 1 over the first `acceptance_end` of the training.

    min(1, progress / acceptance_end), with progress the fraction of the training that is done, 0..1.

    Raises:
        ValueError: progress is not in 0..1, or acceptance_end not above 0 and at most 1.
    """
    _check_fraction("progress", progress)
    if not 0 < acceptance_end <= 1:
        raise ValueError(f"acceptance_end must be above 0 and at most 1, got {acceptance_end}")
    return min(1.0, progress / acceptance_end)


def accepted_count(rate: float, n: int) -> int:
    """ceil(rate n) for a rate in 0..1, as if rate were the number that its float stands for.

    0.07 * 100 is 7.000000000000001 in floats and must give 7, so 1e-12 of n is forgiven.
    """
    return max(0, math.ceil(rate * n - 1e-12 * n))


def scale_levels(levels: Sequence[int], n: int) -> tuple[int, ...]:
    """The levels themselves if none has more than n clusters, else scaled down so that the largest has n.

    Ratios are kept up to rounding down; no level goes below 2 clusters (1 where n is 1).

    Raises:
        ValueError: levels are not positive integers, or n is below 1.
    """
    levels = _check_levels(levels)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    largest = max(levels)
    if largest <= n:
        return levels
    return tuple(min(n, max(2, level * n // largest)) for level in levels)


def _of_level(progress: Progress | None, level: int) -> Callable[[int, float], object] | None:
    if progress is None:
        return None
    return lambda iteration, inertia: progress(level, iteration, inertia)


def _check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    levels = tuple(levels)
    if not levels or not all(isinstance(level, int) and level >= 1 for level in levels):
        raise ValueError(f"levels must be positive integers, at least one of them, got {levels}")
    return levels


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in 0..1, got {value}")


def _check_unit_rows(features: Tensor) -> None:
    norms = check_rows("features", features)
    off = ((norms - 1).abs() > UNIT_TOLERANCE).nonzero()
    if len(off):
        row = int(off[0])
        raise ValueError(
            f"features must have rows of length 1, but row {row} has length {float(norms[row]):.3g}: "
            "pass torch.nn.functional.normalize(features)"
        )
