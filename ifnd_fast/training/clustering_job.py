"""One clustering during training: at once, or in the background while the next epoch trains."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ifnd_fast.clustering.distinct import count_distinct
from ifnd_fast.clustering.pseudo_labels import PseudoLabels
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.config import Config
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.background import Background
from ifnd_fast.runtime.console import progress
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.runtime.spans import span
from ifnd_fast.training.feature_source import Features
from ifnd_fast.training.schedule import levels_for


class ClusteringJob:
    """Clusters features into pseudo labels, on all ranks together.

    Args:
        config: of the run.
        levels: that the images allow; a clustering scales them further where fewer have distinct features.
        device: where features live.

    Attributes:
        pseudo_labels: of the last clustering.
        figures: of the last clustering, for the metrics: `cluster_inertia`, for each level the mean squared distance to
            the centroid that each iteration began with; `cluster_level_seconds` and `cluster_level_bytes`, what each
            level took and holds, on rank 0.
        background: a clustering that goes on beside training.
    """

    def __init__(self, config: Config, levels: tuple[int, ...], device: torch.device):
        self.config, self.levels, self.device = config, levels, device
        self.pseudo_labels = PseudoLabels(
            levels,
            temperature=config.contrast.temperature,
            max_iter=config.cluster.kmeans_iterations,
            n_init=config.cluster.kmeans_restarts,
            engine=config.cluster.kmeans_engine,
            spherical=config.cluster.spherical,
            seed=config.run.seed,
            distributed=True,
        )
        self.figures: dict[str, Any] = {}
        self.background: Background | None = None
        self.group = distributed.new_group() if config.cluster.cluster_async else None

    def fit_levels(self, features: Features, epoch: int) -> bool:
        """Scale the levels to what of the features is distinct; whether they are others than before.

        Raises:
            CommandError: that is too little.
        """
        n = count_distinct(features.vectors, Shards(len(features.vectors), self.device))
        before, what = self.pseudo_labels.levels, "images that are readable and have distinct features"
        try:
            self.pseudo_labels.levels = levels_for(self.config, self.levels, before, n, what)
        except UsageError as error:
            readable = f"{int(features.usable.sum()):,} of {len(features.usable):,} images are readable"
            raise CommandError(
                f"clustering failed after epoch {epoch}: {readable}, {n:,} with distinct features; {error}. "
                "Where the images are no copies of each other, the encoder has collapsed: a lower --lr may help"
            ) from error
        return self.pseudo_labels.levels != before

    def start(self, vectors: Tensor, before: Tensor, epoch: int) -> None:
        """Cluster this rank's vectors (n, dim), or with --cluster-async begin to; see `wait`.

        Args:
            before: all ranks' labels of the last clustering, -1 for none.

        Raises:
            CommandError: they can't be clustered.
        """
        cluster = partial(self._cluster, vectors, before, epoch)
        if self.config.cluster.cluster_async:
            self.background = Background(cluster, self.device, self.group)
        else:
            cluster()

    def wait(self) -> None:
        """Until what goes on in the background is done. Raises CommandError: see `start`."""
        if self.background is not None:
            background, self.background = self.background, None
            background.wait()

    def _cluster(self, vectors: Tensor, before: Tensor, epoch: int) -> None:
        iterations, own, warm = self.config.cluster.kmeans_iterations, None, self.config.cluster.warm_iterations
        if warm and bool((before >= 0).any()):
            iterations, shards = warm, Shards(len(vectors), self.device)
            own = before[shards.first : shards.first + len(vectors)]
        inertia: list[list[float]] = [[] for _ in self.levels]
        beside = self.config.cluster.cluster_async  # the epoch's bar, and there is room for one
        with progress("clustering", len(self.levels) * iterations, hidden=beside) as advance:

            def step(level: int, iteration: int, found: float) -> None:
                inertia[level].append(found / len(before))
                advance()

            try:
                with span("clustering"):
                    self.pseudo_labels.fit(vectors, progress=step, previous=own, max_iter=iterations)
            except ValueError as error:  # too few different images for the clusters, say
                raise CommandError(f"clustering failed after epoch {epoch}: {error}") from error
        self.figures = {
            "cluster_inertia": inertia,
            "cluster_level_seconds": self.pseudo_labels.seconds,
            "cluster_level_bytes": self.pseudo_labels.bytes,
        }
