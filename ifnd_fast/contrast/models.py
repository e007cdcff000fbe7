"""Encoders, and the two ways to get positives and negatives from them: MoCo and in-batch (SimCLR)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ifnd_fast.ops import checks
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.spans import span


class MoCo(nn.Module):
    """Momentum contrast (He et al., 2020): a query encoder, and a key encoder that is its moving average.

    Keys are computed with shuffled batch norm, so that query and positive don't share batch statistics: among
    the ranks when torch.distributed runs, and in `bn_groups` groups of the batch on each.

    Args:
        encoder: images (B, ...) -> unit features (B, dim); copied for the keys.
        momentum: of the moving average per step, key = momentum * key + (1 - momentum) * query.
        bn_groups: groups of a rank's batch with batch-norm statistics of their own.

    Raises:
        TypeError, ValueError: momentum is no number from 0 to 1, or bn_groups no integer of at least 1.

    Example:
        >>> moco = MoCo(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), momentum=0.99)
        >>> query, key = moco(torch.randn(8, 3, 2, 2), torch.randn(8, 3, 2, 2))
        >>> query.requires_grad, key.requires_grad
        (True, False)
        >>> moco.update_key_encoder()  # after the optimizer's step
    """

    def __init__(self, encoder: nn.Module, momentum: float = 0.999, bn_groups: int = 1):
        super().__init__()
        self.momentum, self.bn_groups = checks.fraction("momentum", momentum), checks.integer("bn_groups", bn_groups, 1)
        self.query_encoder = encoder
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)

    def forward(self, view: Tensor, other_view: Tensor, shuffle_seed: int = 0) -> tuple[Tensor, Tensor]:
        """Queries (B, dim) of one view, with gradient, and keys (B, dim) of the other, without.

        `shuffle_seed` (the step, say) fixes the shuffle; it must be the same on all ranks.
        """
        with span("query encoder"):
            queries = self.query_encoder(view)
        return queries, self.keys(other_view, shuffle_seed)

    @torch.no_grad()
    def keys(self, images: Tensor, shuffle_seed: int = 0) -> Tensor:
        """Keys (B, dim) of images (B, ...), computed in shuffled groups."""
        if self.bn_groups == 1 and distributed.world_size() == 1:
            with span("key encoder"):
                return self.key_encoder(images)
        with span("shuffled batch norm"):
            gathered = distributed.all_gather(images)
            generator = torch.Generator().manual_seed(shuffle_seed)
            order = torch.randperm(len(gathered), dtype=torch.int64, generator=generator, device=generator.device)
            order = order.to(images.device, non_blocking=True)
            own = distributed.own_share(gathered[order])
            with span("key encoder"):
                own_keys = torch.cat([self.key_encoder(group) for group in _groups(own, self.bn_groups)])
            shuffled_keys = distributed.all_gather(own_keys)
            keys = torch.empty_like(shuffled_keys)
            keys[order] = shuffled_keys
            return distributed.own_share(keys)

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """One step of the moving average, over parameters; batch-norm buffers follow the keys' own batches."""
        torch._foreach_lerp_(
            list(self.key_encoder.parameters()), list(self.query_encoder.parameters()), 1 - self.momentum
        )

    @property
    def feature_encoder(self) -> nn.Module:
        """The encoder whose features are clustered: the momentum encoder."""
        return self.key_encoder


def _groups(batch: Tensor, n_groups: int) -> tuple[Tensor, ...]:
    """Contiguous groups of nearly equal size, of at least two rows (batch norm needs them)."""
    return torch.tensor_split(batch, max(1, min(n_groups, len(batch) // 2)))


class InBatch(nn.Module):
    """SimCLR's memory-free contrast (Chen et al., 2020): negatives are the other images of the batch.

    Args:
        encoder: images (B, ...) -> unit features (B, dim).

    Example:
        >>> in_batch = InBatch(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))
        >>> features, other_features = in_batch(torch.randn(8, 3, 2, 2), torch.randn(8, 3, 2, 2))
        >>> features.shape, other_features.requires_grad
        (torch.Size([8, 4]), True)
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.query_encoder = encoder

    def forward(self, view: Tensor, other_view: Tensor, shuffle_seed: int = 0) -> tuple[Tensor, Tensor]:
        """Features (B, dim) of both views, both with gradient; `shuffle_seed` is unused."""
        with span("query encoder"):
            features = self.query_encoder(torch.cat([view, other_view]))
        return features[: len(view)], features[len(view) :]

    def update_key_encoder(self) -> None:
        """Nothing to do: there is one encoder."""

    @property
    def feature_encoder(self) -> nn.Module:
        """The encoder whose features are clustered: the only one."""
        return self.query_encoder
