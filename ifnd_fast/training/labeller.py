"""Labels during training: when they are made, from which features, and how many are trusted."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ifnd_fast.clustering.distinct import count_distinct
from ifnd_fast.clustering.pseudo_labels import PseudoLabels
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.clustering.whitening import whiten
from ifnd_fast.config import Config
from ifnd_fast.contrast.encoder import Encoder
from ifnd_fast.data import features
from ifnd_fast.data.images import Images
from ifnd_fast.data.unreadable import Unreadable
from ifnd_fast.metrics.clusters import quality
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.background import Background
from ifnd_fast.runtime.compute import Compute
from ifnd_fast.runtime.console import progress, warn
from ifnd_fast.runtime.errors import CommandError, NonFiniteError, UsageError
from ifnd_fast.runtime.spans import span
from ifnd_fast.training.schedule import IMAGES_PER_CLUSTER, clusters_before, fit_levels, rate_of


class Labeller:
    """The labels of all N images that training uses now, and their renewal (Chen et al., ICLR 2022, section 3).

    Args:
        config: of the run.
        images: N training images.
        compute: where labels and features live, the dtype of those, and how the encoder is evaluated.

    Attributes:
        levels: clusters at each of L levels, scaled down to the images there are; a clustering scales them further
            where fewer are readable and distinct. The oracle has one level, of the true classes.
        accepted: (N, L) int32, -1 where no label is trusted.
        clustered: (N, L) int32, of the last clustering, trusted or not; -1 for images without features.
        quality: of the last clustering, for the metrics: see `quality`; `cluster_inertia`, for each level the mean
            squared distance to the centroid that each iteration began with; `cluster_level_seconds` and
            `cluster_level_bytes`, what each level took and holds, on rank 0.
        acceptance_rate: share of the labels that is trusted, 0..1.

    Raises:
        UsageError: the oracle has no true labels; too few images for so many levels, or with --strict for so many
            clusters.
    """

    def __init__(self, config: Config, images: Images, compute: Compute):
        self.config, self.images, self.compute, self.device = config, images, compute, compute.device
        self.strategy = config.contrast.false_negatives
        self.clusters = self.strategy in ("eliminate", "attract")
        self.levels = self._levels()
        self.pseudo_labels = PseudoLabels(
            self.levels,
            temperature=config.contrast.temperature,
            max_iter=config.cluster.kmeans_iterations,
            n_init=config.cluster.kmeans_restarts,
            engine=config.cluster.kmeans_engine,
            spherical=config.cluster.spherical,
            seed=config.run.seed,
            distributed=True,
        )
        self.own = distributed.share(len(images))
        self.accepted = torch.full((len(images), len(self.levels)), -1, dtype=torch.int32, device=self.device)
        self.acceptance_rate = 0.0
        self.clustered = torch.full_like(self.accepted, -1)
        self.quality: dict[str, Any] = {}
        self.found: dict[str, Any] = {}  # what of that the clustering itself tells
        self.usable = torch.zeros(len(images), dtype=torch.bool, device=self.device)  # at the last clustering
        self.waiting = False  # whether that clustering's labels are still to be taken up
        self.background: Background | None = None  # where it goes on
        self.group = distributed.new_group() if config.cluster.cluster_async else None
        uses_bank = self.clusters and config.cluster.features == "bank"
        # One row more than this rank's images: the keys of all others go there.
        shape, dtype = (len(self.own) + 1, config.model.dim), compute.contrast_dtype
        self.bank = torch.zeros(shape, dtype=dtype, device=self.device) if uses_bank else None
        self.seconds = {"feature_seconds": 0.0, "cluster_seconds": 0.0}  # that training waited in this epoch

    def _levels(self) -> tuple[int, ...]:
        if self.strategy == "oracle":
            if self.images.labels is None:
                raise UsageError("--false-negatives oracle needs images in one folder per class")
            return (int(self.images.labels.max()) + 1,)
        levels = self.config.cluster.levels
        return self._fitting(levels, levels, len(self.images), "images") if self.clusters else levels

    def _fitting(self, wanted: tuple[int, ...], now: tuple[int, ...], n: int, what: str) -> tuple[int, ...]:
        """The wanted levels as n images allow them, which is told where they differ from those now.

        Raises:
            UsageError: the images are too few, or with --strict for the levels as they are.
        """
        fitting = fit_levels(wanted, n)
        rule = f"at most one cluster for every {IMAGES_PER_CLUSTER} {what}, of which there are {n:,}"
        if fitting != wanted and self.config.data.strict:
            raise UsageError(f"--levels {' '.join(map(str, wanted))}: {rule} (--strict)")
        if fitting != now:
            warn(f"--levels {' '.join(map(str, now))} scaled to {' '.join(map(str, fitting))}: {rule}")
        return fitting

    def observe(self, keys: Tensor, indices: Tensor) -> None:
        """Keep those of a step's keys (B, dim) that are of this rank's images for the next clustering, where
        --features bank asks for it."""
        if self.bank is not None:
            rows = torch.where((indices >= self.own.start) & (indices < self.own.stop), indices - self.own.start, -1)
            self.bank[rows] = keys.to(self.bank.dtype)

    def start_epoch(self, epoch: int, encoder: nn.Module, unreadable: Unreadable) -> bool:
        """Renew the labels where that is due before this epoch (from 0), from features of `encoder` or the bank.

        With --cluster-async the clustering begun here goes on beside the epoch, and its labels are taken up before
        the next one.

        Returns:
            whether there are new labels.

        Raises:
            NonFiniteError, CommandError: features that are not finite, or that can't be clustered.
        """
        if self.strategy == "oracle":
            self.accepted = torch.as_tensor(self.images.labels, device=self.device).int()[:, None]
            self.acceptance_rate = 1.0
            return True
        renewed = self.waiting
        if self.waiting:
            self._take_up(epoch)
        if clusters_before(self.config, epoch):
            self._cluster(epoch, encoder, unreadable)
            if not self.config.cluster.cluster_async:
                self._take_up(epoch)
                renewed = True
        return renewed

    def _cluster(self, epoch: int, encoder: nn.Module, unreadable: Unreadable) -> None:
        """Cluster the features, or begin to."""
        started = time.perf_counter()
        with span("features"):
            vectors, own_usable = self._features(encoder, unreadable)
        vectors = vectors[own_usable]
        if not self._everywhere(bool(torch.isfinite(vectors).all())):
            raise NonFiniteError(f"the features are not finite after epoch {epoch}")
        self.usable = Shards(len(own_usable), self.device).gather(own_usable)
        if not self.usable.any():
            raise CommandError(f"clustering failed after epoch {epoch}: no image has features")
        vectors = self._prepared(vectors)
        before = self.clustered[self.usable]
        if self._scale(vectors, epoch):
            before = torch.full_like(before, -1)  # labels of other clusters
        fit = partial(self._fit, vectors, before, epoch)
        self.seconds["feature_seconds"] += time.perf_counter() - started
        self.waiting = True
        if self.config.cluster.cluster_async:
            self.background = Background(fit, self.device, self.group)
        else:
            started = time.perf_counter()
            fit()
            self.seconds["cluster_seconds"] += time.perf_counter() - started

    def _scale(self, vectors: Tensor, epoch: int) -> bool:
        """Scale the levels to these features of this rank's images; whether there are other levels than before."""
        n = count_distinct(vectors, Shards(len(vectors), self.device))
        before, what = self.pseudo_labels.levels, "images that are readable and have distinct features"
        try:
            self.pseudo_labels.levels = self._fitting(self.levels, before, n, what)
        except UsageError as error:
            usable = f"{int(self.usable.sum()):,} of {len(self.images):,} images are readable"
            raise CommandError(
                f"clustering failed after epoch {epoch}: {usable}, {n:,} with distinct features; {error}. "
                "Where the images are no copies of each other, the encoder has collapsed: a lower --lr may help"
            ) from error
        return self.pseudo_labels.levels != before

    def _wait(self) -> None:
        if self.background is not None:
            started = time.perf_counter()
            background, self.background = self.background, None
            background.wait()
            self.seconds["cluster_seconds"] += time.perf_counter() - started

    def _take_up(self, epoch: int) -> None:
        """The last clustering's labels become the ones in use, as many as this epoch accepts."""
        self._wait()
        started = time.perf_counter()
        self.waiting = False
        self.accepted, before = torch.full_like(self.accepted, -1), self.clustered
        self.accepted[self.usable] = self.pseudo_labels.accept(rate_of(self.config, epoch))
        self.clustered = torch.full_like(self.accepted, -1)
        self.clustered[self.usable] = cast(Tensor, self.pseudo_labels.labels)
        self.quality = self.found | quality(self.clustered, before, self.pseudo_labels.levels)
        self.acceptance_rate = rate_of(self.config, epoch)
        self.seconds["cluster_seconds"] += time.perf_counter() - started

    def _features(self, encoder: nn.Module, unreadable: Unreadable) -> tuple[Tensor, Tensor]:
        """Features (n, D) of this rank's images and which rows hold any, (n,): not those of images unread or
        not yet seen."""
        if self.bank is not None:
            return self.bank[:-1], self.bank[:-1].any(dim=1)
        network = cast(Encoder, encoder).backbone if self.config.cluster.cluster_space == "backbone" else encoder
        return features.extract_share(
            network, self.images, self.config.data, self.compute, unreadable=unreadable
        )

    def _prepared(self, vectors: Tensor) -> Tensor:
        """Unit rows to cluster, of this rank's features (n, D)."""
        if self.config.cluster.whiten:
            vectors = whiten(vectors, self.config.cluster.whiten, Shards(len(vectors), self.device))
        vectors = F.normalize(vectors.float(), dim=1).to(self.compute.contrast_dtype)
        shards = Shards(len(vectors), self.device)
        if min(shards.sizes) == 0:  # a rank none of whose images can be read: the others' are dealt out anew
            share = distributed.share(shards.total)
            vectors = shards.gather(vectors)[share.start : share.stop]
        return vectors

    def _everywhere(self, holds: bool) -> bool:
        return Shards(len(self.own), self.device).every(holds, self.device)

    def _fit(self, vectors: Tensor, before: Tensor, epoch: int) -> None:
        """Cluster this rank's vectors (n, dim); `before` are all ranks' labels of the last clustering, -1 for none."""
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
        self.found = {
            "cluster_inertia": inertia,
            "cluster_level_seconds": self.pseudo_labels.seconds,
            "cluster_level_bytes": self.pseudo_labels.bytes,
        }

    def state_dict(self) -> dict[str, Any]:
        """Every rank has to call it: the bank is brought together, so that any number of ranks can go on. A clustering
        in the background is waited for."""
        self._wait()
        shards = Shards(len(self.own), self.device)
        return {
            "pseudo_labels": self.pseudo_labels.state_dict(),
            "accepted": self.accepted,
            "acceptance_rate": self.acceptance_rate,
            "bank": None if self.bank is None else shards.gather(self.bank[:-1]),
            "label_seconds": self.seconds,
            "clustered": self.clustered,
            "cluster_quality": self.quality,
            "cluster_waiting": {"waiting": self.waiting, "usable": self.usable, "found": self.found},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError: the state is of another number of images or levels."""
        if state["accepted"].shape != self.accepted.shape:
            shape, wanted = tuple(state["accepted"].shape), tuple(self.accepted.shape)
            raise ValueError(f"it has labels of shape {shape} (images, levels), wanted {wanted}")
        self.pseudo_labels.levels = tuple(state["pseudo_labels"]["levels"].tolist())  # as the images allowed
        self.pseudo_labels.load_state_dict(state["pseudo_labels"])
        self.accepted = state["accepted"].to(self.device)
        self.acceptance_rate, self.seconds = state["acceptance_rate"], dict(state["label_seconds"])
        self.clustered, self.quality = state["clustered"].to(self.device), state["cluster_quality"]
        waiting = state["cluster_waiting"]
        self.waiting, self.usable, self.found = waiting["waiting"], waiting["usable"].to(self.device), waiting["found"]
        if self.bank is not None:
            self.bank[:-1].copy_(state["bank"][self.own.start : self.own.stop])
