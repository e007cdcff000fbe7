"""Pseudo labels: the clusters of the features at every level, of which the most confident ones are accepted.

Chen et al., Incremental False Negative Detection for Contrastive Learning, ICLR 2022, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ifnd_fast.clustering.acceptance import accepted_count
from ifnd_fast.clustering.kmeans import KMeans
from ifnd_fast.clustering.levels import Progress, check_levels, cluster_levels
from ifnd_fast.ops import checks
from ifnd_fast.runtime import distributed


class PseudoLabels:
    """Cluster labels of N images at L levels, with the confidence that decides which to trust.

    Labels and confidence are those of `ifnd_fast.cluster_levels`; `accept(r)` keeps, at every level, the ceil(r N)
    labels of highest confidence.

    Args:
        levels: C_l, the number of clusters of each level, such as (25000, 50000, 100000).
        temperature: tau of the confidence, 1e-6 to 1e6.
        max_iter, n_init, engine, spherical: of `ifnd_fast.KMeans`.
        seed: of the first level's k-means; level l uses seed + l.
        distributed: the features given to `fit` are this rank's share of all, as for `ifnd_fast.KMeans`. All
            ranks then have the labels and confidences of all N images.

    Attributes:
        centroids: L tensors (C_l, D) float32, of unit length.
        labels: (N, L) int32, of every image, accepted or not.
        confidence: (N, L) float32, above 0 and up to 1.
        seconds, bytes: L numbers each: what clustering took, on this rank (not kept in `state_dict`).

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
        self.levels = check_levels(levels)
        self.temperature = checks.temperature(temperature)
        KMeans(
            1, max_iter=max_iter, n_init=n_init, seed=seed, spherical=spherical, engine=engine, distributed=distributed
        ).check_parameters()
        self.max_iter = max_iter
        self.n_init = n_init
        self.engine = engine
        self.spherical = spherical
        self.seed = seed
        self.distributed = distributed
        self.centroids: list[Tensor] | None = None
        self.labels: Tensor | None = None
        self.confidence: Tensor | None = None
        self.seconds: list[float] | None = None
        self.bytes: list[int] | None = None

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
            TypeError, ValueError: features are not finite unit rows, previous or max_iter is unfit, N is below the
                largest level or there are fewer distinct rows than that: the message says what levels there can be.
        """
        found = cluster_levels(
            features,
            self.levels,
            temperature=self.temperature,
            max_iter=self.max_iter if max_iter is None else max_iter,
            n_init=self.n_init,
            engine=self.engine,
            spherical=self.spherical,
            seed=self.seed,
            distributed=self.distributed,
            previous=previous,
            progress=progress,
        )
        gather = distributed.gather_rows if self.distributed else lambda rows: rows
        self.centroids = [level.centroids for level in found]
        self.seconds, self.bytes = [level.seconds for level in found], [level.bytes for level in found]
        self.labels = gather(torch.stack([level.labels for level in found], dim=1))
        self.confidence = gather(torch.stack([level.confidence for level in found], dim=1))
        return self

    def accept(self, rate: float) -> Tensor:
        """The labels of each level's ceil(rate N) most confident images, -1 for all others; (N, L) int32.

        Of equally confident images the lower index comes first, so what a rate accepts, every higher rate
        accepts too.

        Raises:
            RuntimeError: not fitted yet.
            TypeError, ValueError: rate is no number in 0..1.
        """
        if self.labels is None or self.confidence is None:
            raise RuntimeError("there are no pseudo labels yet: call fit first")
        rate = checks.fraction("rate", rate)
        most_confident = self.confidence.argsort(dim=0, descending=True, stable=True)
        rejected = most_confident[accepted_count(rate, len(self.labels)) :]
        return self.labels.scatter(0, rejected, -1)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything `fit` computed, as tensors: levels; once fitted, labels, confidence, centroids.0..."""
        state = {"levels": torch.tensor(self.levels, dtype=torch.int64, device="cpu")}
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
