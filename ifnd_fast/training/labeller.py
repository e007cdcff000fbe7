"""Labels during training: renewed when it is time, of the features that there are, as many as are trusted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ifnd_fast.clustering.pseudo_labels import PseudoLabels
from ifnd_fast.config import Config
from ifnd_fast.data.images import Images
from ifnd_fast.data.unreadable import Unreadable
from ifnd_fast.metrics.clusters import quality
from ifnd_fast.runtime.compute import Compute
from ifnd_fast.training.clustering_job import ClusteringJob
from ifnd_fast.training.feature_source import FeatureSource
from ifnd_fast.training.schedule import clusters_before, levels_of, rate_of


@dataclass
class Labels:
    """Of all N images at L levels: those that training uses, and the clustering that they are from."""

    accepted: Tensor
    """(N, L) int32, -1 where no label is trusted"""
    clustered: Tensor
    """(N, L) int32, of the last clustering, trusted or not; -1 for images without features"""
    usable: Tensor
    """(N,) bool, which images had features at the last clustering"""
    acceptance_rate: float = 0.0
    """share of the labels that is trusted, 0..1"""
    waiting: bool = False
    """whether there was a clustering since, whose labels are not in use yet"""
    quality: dict[str, Any] = field(default_factory=dict)
    """of the clustering whose labels are in use, for the metrics: see `metrics.clusters.quality` and `ClusteringJob`"""

    @classmethod
    def none(cls, n_images: int, n_levels: int, device: torch.device) -> Labels:
        """Before the first clustering."""
        accepted = torch.full((n_images, n_levels), -1, dtype=torch.int32, device=device)
        usable = torch.zeros(n_images, dtype=torch.bool, device=device)
        return cls(accepted, torch.full_like(accepted, -1), usable)

    def use_true(self, labels: Any) -> None:
        """The true labels (N,), all of them."""
        self.accepted = torch.as_tensor(labels, device=self.accepted.device).int()[:, None]
        self.acceptance_rate = 1.0

    def use(self, pseudo_labels: PseudoLabels, rate: float, figures: dict[str, Any]) -> None:
        """Those of the last clustering, of the `usable` images, as many as that rate accepts."""
        self.waiting = False
        self.accepted, before = torch.full_like(self.accepted, -1), self.clustered
        self.accepted[self.usable] = pseudo_labels.accept(rate)
        self.clustered = torch.full_like(self.accepted, -1)
        self.clustered[self.usable] = cast(Tensor, pseudo_labels.labels)
        self.quality = figures | quality(self.clustered, before, pseudo_labels.levels)
        self.acceptance_rate = rate


class Labeller:
    """The labels of all N images, and their renewal (Chen et al., ICLR 2022, section 3).

    Args:
        config: of the run.
        images: N training images.
        compute: where labels and features live, and how the encoder is evaluated.

    Attributes:
        levels: clusters at each of L levels, scaled down to the images there are. The oracle has one level, of the true
            classes.
        labels: now.
        source: of features.
        job: the last clustering, or the one that goes on.
        seconds: that training waited in this epoch.

    Raises:
        UsageError: the oracle has no true labels; too few images for so many levels, or with --strict for so many
            clusters.
    """

    def __init__(self, config: Config, images: Images, compute: Compute):
        self.config, self.images, self.device = config, images, compute.device
        self.levels = levels_of(config, len(images), images.labels)
        self.source = FeatureSource(config, images, compute)
        self.job = ClusteringJob(config, self.levels, compute.device)
        self.labels = Labels.none(len(images), len(self.levels), compute.device)
        self.seconds = {"feature_seconds": 0.0, "cluster_seconds": 0.0}

    def observe(self, keys: Tensor, indices: Tensor) -> None:
        """A step's keys (B, dim) and the numbers of their images (B,), of all ranks."""
        self.source.observe(keys, indices)

    def start_epoch(self, epoch: int, encoder: nn.Module, unreadable: Unreadable) -> bool:
        """Renew the labels where that is due before this epoch (from 0), from features of `encoder` or the bank.

        With --cluster-async the clustering begun here goes on beside the epoch, and its labels are used from the next
        one on.

        Returns:
            whether there are new labels.

        Raises:
            NonFiniteError, CommandError: features that are not finite, or that can't be clustered.
        """
        if self.config.contrast.false_negatives == "oracle":
            self.labels.use_true(self.images.labels)
            return True
        renewed = self.labels.waiting
        if renewed:
            self._use_clustering(epoch)
        if clusters_before(self.config, epoch):
            self._cluster(epoch, encoder, unreadable)
            if not self.config.cluster.cluster_async:
                self._use_clustering(epoch)
                renewed = True
        return renewed

    def _cluster(self, epoch: int, encoder: nn.Module, unreadable: Unreadable) -> None:
        """Cluster the features, or begin to."""
        labels = self.labels
        with self._timed("feature_seconds"):
            features = self.source.collect(epoch, encoder, unreadable)
            labels.usable = features.usable
            before = labels.clustered[labels.usable]
            if self.job.fit_levels(features, epoch):
                before = torch.full_like(before, -1)  # labels of other clusters
        labels.waiting = True
        if self.config.cluster.cluster_async:
            self.job.start(features.vectors, before, epoch)
        else:
            with self._timed("cluster_seconds"):
                self.job.start(features.vectors, before, epoch)

    def _use_clustering(self, epoch: int) -> None:
        """The last clustering's labels become the ones in use, as many as this epoch accepts."""
        with self._timed("cluster_seconds"):
            self.job.wait()
            self.labels.use(self.job.pseudo_labels, rate_of(self.config, epoch), self.job.figures)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        """All ranks have to call it. A clustering in the background is waited for."""
        if self.job.background is not None:
            with self._timed("cluster_seconds"):
                self.job.wait()
        labels = self.labels
        return {
            "pseudo_labels": self.job.pseudo_labels.state_dict(),
            "accepted": labels.accepted,
            "acceptance_rate": labels.acceptance_rate,
            "bank": self.source.state(),
            "label_seconds": self.seconds,
            "clustered": labels.clustered,
            "cluster_quality": labels.quality,
            "cluster_waiting": {"waiting": labels.waiting, "usable": labels.usable, "found": self.job.figures},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError: the state is of another number of images or levels."""
        shape, wanted = tuple(state["accepted"].shape), tuple(self.labels.accepted.shape)
        if shape != wanted:
            raise ValueError(f"it has labels of shape {shape} (images, levels), wanted {wanted}")
        self.job.pseudo_labels.levels = tuple(state["pseudo_labels"]["levels"].tolist())  # as the images allowed
        self.job.pseudo_labels.load_state_dict(state["pseudo_labels"])
        waiting = state["cluster_waiting"]
        self.job.figures = waiting["found"]
        self.labels = Labels(
            state["accepted"].to(self.device), state["clustered"].to(self.device), waiting["usable"].to(self.device),
            state["acceptance_rate"], waiting["waiting"], state["cluster_quality"],
        )  # fmt: skip
        self.seconds = dict(state["label_seconds"])
        self.source.load_state(state["bank"])
