"""The features that are clustered during training: of a pass over the images, or the keys of the steps (the bank)."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ifnd_fast.clustering.shards import Shards
from ifnd_fast.clustering.whitening import whiten
from ifnd_fast.config import Config
from ifnd_fast.contrast.encoder import Encoder
from ifnd_fast.data import features
from ifnd_fast.data.images import Images
from ifnd_fast.data.unreadable import Unreadable
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.compute import Compute
from ifnd_fast.runtime.errors import CommandError, NonFiniteError
from ifnd_fast.runtime.spans import span
from ifnd_fast.training.schedule import labels_by_clustering


class Features(NamedTuple):
    """What can be clustered of N images."""

    vectors: Tensor
    """(n, D) unit rows of `Compute.contrast_dtype`: this rank's part, in order"""
    usable: Tensor
    """(N,) bool, which images have features; the same on all ranks"""


class FeatureSource:
    """Where --features, --cluster-space and --whiten have the features come from.

    Args:
        config: of the run.
        images: N training images.
        compute: how the encoder is evaluated, and where features live.

    Attributes:
        own: the numbers of this rank's images.
        bank: (len(own) + 1, dim), the newest key of each of them, zero before the first, with --features bank; the keys
            of other ranks' images go to the last row.
    """

    def __init__(self, config: Config, images: Images, compute: Compute):
        self.config, self.images, self.compute = config, images, compute
        self.own = distributed.share(len(images))
        self.bank: Tensor | None = None
        if labels_by_clustering(config) and config.cluster.features == "bank":
            shape = len(self.own) + 1, config.model.dim
            self.bank = torch.zeros(shape, dtype=compute.contrast_dtype, device=compute.device)

    def observe(self, keys: Tensor, indices: Tensor) -> None:
        """Keep those of a step's keys (B, dim) that are of this rank's images, where there is a bank."""
        if self.bank is not None:
            rows = torch.where((indices >= self.own.start) & (indices < self.own.stop), indices - self.own.start, -1)
            self.bank[rows] = keys.to(self.bank.dtype)

    def collect(self, epoch: int, encoder: nn.Module, unreadable: Unreadable) -> Features:
        """The features as they are now, after so many epochs; all ranks have to call it.

        Raises:
            NonFiniteError: some are not finite.
            CommandError: no image has any.
        """
        with span("features"):
            vectors, own_usable = self._own_features(encoder, unreadable)
        vectors = vectors[own_usable]
        if not distributed.every(bool(torch.isfinite(vectors).all()), self.compute.device):
            raise NonFiniteError(f"the features are not finite after epoch {epoch}")
        usable = distributed.gather_rows(own_usable)
        if not usable.any():
            raise CommandError(f"clustering failed after epoch {epoch}: no image has features")
        return Features(self._unit_rows(vectors), usable)

    def _own_features(self, encoder: nn.Module, unreadable: Unreadable) -> tuple[Tensor, Tensor]:
        """Features (n, D) of this rank's images, and which rows hold any, (n,): not those of images that are unreadable
        or were in no step yet."""
        if self.bank is not None:
            return self.bank[:-1], self.bank[:-1].any(dim=1)
        network = cast(Encoder, encoder).backbone if self.config.cluster.cluster_space == "backbone" else encoder
        return features.extract_share(network, self.images, self.config.data, self.compute, unreadable=unreadable)

    def _unit_rows(self, vectors: Tensor) -> Tensor:
        """This rank's features (n, D), whitened if asked for; no rank is left without a row."""
        shards = Shards(len(vectors), self.compute.device)
        if self.config.cluster.whiten:
            vectors = whiten(vectors, self.config.cluster.whiten, shards)
        vectors = F.normalize(vectors.float(), dim=1).to(self.compute.contrast_dtype)
        if min(shards.sizes) == 0:  # a rank none of whose images can be read: the others' are shared out anew
            share = distributed.share(shards.total)
            vectors = shards.gather(vectors)[share.start : share.stop]
        return vectors

    def state(self) -> Tensor | None:
        """The bank of all images, (N, dim); every rank has to call it: any number of ranks can go on from it."""
        return None if self.bank is None else distributed.gather_rows(self.bank[:-1])

    def load_state(self, bank: Tensor | None) -> None:
        """From what `state` gave."""
        if self.bank is not None:
            assert bank is not None
            self.bank[:-1].copy_(bank[self.own.start : self.own.stop])
