"""What a step minimises: IFND's loss against a queue of keys, or against the other images of the batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ifnd_fast.config import Config, ContrastConfig
from ifnd_fast.contrast.encoder import Encoder, build, n_features_of
from ifnd_fast.contrast.models import InBatch, MoCo
from ifnd_fast.contrast.queue import NegativeQueue
from ifnd_fast.ops.info_nce import info_nce
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.compute import Compute
from ifnd_fast.runtime.errors import CommandError, UsageError

StateDict = dict[str, Tensor]


def memory_format(config: Config) -> torch.memory_format:
    """Of the encoder's weights and of the views it gets."""
    return torch.channels_last if config.run.channels_last else torch.contiguous_format


def new_encoder(config: Config, backbone: nn.Module | None = None) -> Encoder:
    """With weights from torch's global generator, on the CPU; `backbone` (as it is) in place of that of --arch.

    Raises:
        UsageError: the backbone gives no features of the images.
    """
    if backbone is None:
        return build(config.model, config.data.image_size)()
    n_features = n_features_of(backbone, config.data.image_size)
    return Encoder(backbone, n_features, config.model.dim, config.model.hidden or None)


def build_objective(
    config: Config,
    levels: int,
    compute: Compute,
    weights: StateDict | None = None,
    backbone: nn.Module | None = None,
) -> Objective:
    """That of --negatives, with a new encoder, on the device.

    Args:
        levels: of labels.
        compute: the device, and the dtype of the queue's keys.
        weights: that its backbone starts from: see `initial_weights`.
        backbone: in place of that of --arch.

    Raises:
        UsageError: --sync-bn on a CPU, or the backbone gives no features of the images.
    """
    encoder = new_encoder(config, backbone)
    if weights is not None:
        encoder.backbone.load_state_dict(weights, strict=False)  # counters of batch norm may lack
    if config.contrast.sync_bn:
        if compute.device.type == "cpu":
            raise UsageError("--sync-bn: torch has it for GPUs only")
        encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    queued = config.contrast.negatives == "queue"
    objective: Objective = (
        QueueObjective(config, encoder, levels, compute) if queued else InBatchObjective(config, encoder)
    )
    model = objective.model
    if config.run.compile:
        for part in {model.query_encoder, model.feature_encoder}:
            part.compile()
    model.to(compute.device).to(memory_format=memory_format(config))
    return objective


def across_ranks(model: nn.Module, parts: int = 1) -> nn.Module:
    """The model as a step calls it: with gradients that are means over the ranks, where there are several.

    Args:
        parts: of a batch that a step calls it with.
    """
    if distributed.world_size() == 1:
        return model
    # every step has the same graph; the bits are the same with and without
    return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=parts == 1)


def exchanging(model: nn.Module, gradients: bool) -> AbstractContextManager[None]:
    """Whether the backward pass of what is computed in this context exchanges gradients between the ranks."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not gradients else nullcontext()


class Objective(Protocol):
    """A model with its source of negatives. Labels (N, L) int32 are those in use of all N images, -1 for none.

    Attributes:
        model: (view, view, shuffle_seed) -> queries and keys, (B, dim) each.
        encoder: what is trained.
    """

    encoder: Encoder

    @property
    def model(self) -> MoCo | InBatch: ...

    def loss(self, query: Tensor, key: Tensor, indices: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of this rank's images, by their dataset indices (B,)."""
        ...

    def after_step(self, keys: Tensor, indices: Tensor, labels: Tensor) -> None:
        """The step's keys and indices, of all ranks."""
        ...

    def relabel(self, labels: Tensor) -> None:
        """There are new labels."""
        ...

    def negatives(self, last_indices: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (K, L) and dataset indices (K,) of what detection is counted against; `last_indices` are of the last
        step's images, of all ranks."""
        ...

    def check_ranks(self, epoch: int) -> None:
        """Raises CommandError: the ranks have come apart."""
        ...

    def state_dict(self) -> dict[str, Tensor] | None:
        """Of the negatives, where they outlive a step."""
        ...

    def load_state_dict(self, state: dict[str, Any] | None) -> None: ...


class QueueObjective:
    """MoCo: the positive is the image's own key, the negatives are a queue of earlier keys."""

    def __init__(self, config: Config, encoder: Encoder, levels: int, compute: Compute):
        contrast = self.contrast = config.contrast
        groups = 1 if contrast.sync_bn else max(1, contrast.bn_groups // distributed.world_size())
        self.encoder, self.model = encoder, MoCo(encoder, contrast.momentum, groups)
        queue = NegativeQueue(contrast.queue_size, config.model.dim, levels, compute.contrast_dtype)
        self.queue = queue.to(compute.device)

    def loss(self, query: Tensor, key: Tensor, indices: Tensor, labels: Tensor) -> Tensor:
        negatives, negative_labels, negative_ids = self.queue.negatives()
        return _loss(self.contrast, query, key, negatives, labels[indices], negative_labels, indices, negative_ids)

    def after_step(self, keys: Tensor, indices: Tensor, labels: Tensor) -> None:
        self.queue.enqueue(keys, labels[indices], indices)

    def relabel(self, labels: Tensor) -> None:
        self.queue.relabel(labels)

    def negatives(self, last_indices: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        _, queue_labels, queue_indices = self.queue.negatives()
        return queue_labels, queue_indices

    def check_ranks(self, epoch: int) -> None:
        if not distributed.same_everywhere(*self.queue.negatives()):
            raise CommandError(f"the ranks' queues differ after epoch {epoch}: a memory or network fault")

    def state_dict(self) -> dict[str, Tensor] | None:
        return self.queue.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self.queue.load_state_dict(state or {})


class InBatchObjective:
    """SimCLR's NT-Xent: both views are anchors, and all views of the other images, of every rank, are negatives."""

    def __init__(self, config: Config, encoder: Encoder):
        self.contrast = config.contrast
        self.encoder, self.model = encoder, InBatch(encoder)

    def loss(self, query: Tensor, key: Tensor, indices: Tensor, labels: Tensor) -> Tensor:
        views, positive, indices = torch.cat([query, key]), torch.cat([key, query]), torch.cat([indices, indices])
        negatives, negative_ids = distributed.all_gather_with_grad(views), distributed.all_gather(indices)
        return _loss(
            self.contrast, views, positive, negatives, labels[indices], labels[negative_ids], indices, negative_ids
        )

    def after_step(self, keys: Tensor, indices: Tensor, labels: Tensor) -> None:
        pass

    def relabel(self, labels: Tensor) -> None:
        pass

    def negatives(self, last_indices: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return labels[last_indices], last_indices

    def check_ranks(self, epoch: int) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor] | None:
        return None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        pass


def _loss(contrast: ContrastConfig, query: Tensor, positive: Tensor, negatives: Tensor, query_labels: Tensor,
          negative_labels: Tensor, query_ids: Tensor, negative_ids: Tensor) -> Tensor:  # fmt: skip
    strategy = contrast.false_negatives
    return info_nce(
        query, positive, negatives, temperature=contrast.temperature,
        query_labels=query_labels, negative_labels=negative_labels, query_ids=query_ids, negative_ids=negative_ids,
        false_negatives="eliminate" if strategy == "oracle" else strategy,  # whose labels are the true ones
        level_combination=contrast.level_combination,
    )  # fmt: skip
