"""symmetric_info_nce: the loss of two towers, each against the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ifnd_fast.ops import checks
from ifnd_fast.ops.info_nce import info_nce


def symmetric_info_nce(
    left: Tensor,
    right: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    labels: Tensor | None = None,
    ids: Tensor | None = None,
    false_negatives: str = "eliminate",
    margin: float = 0.1,
    level_combination: str = "mean",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """The loss of two towers on a batch of pairs (CLIP: Radford et al., 2021), without its false negatives.

    The mean of `ifnd_fast.info_nce` of left's rows against right's and of right's against left's: row i of the one is
    the positive of row i of the other, whose other rows are its negatives. Rows of one id are no negatives of
    each other.

    Args:
        left: (B, D) rows of one tower, e.g. images; see `ifnd_fast.info_nce` for dtypes.
        right: (B, D) rows of the other, e.g. their texts.
        temperature: softmax temperature, 1e-6 to 1e6; or a tensor, which is learned.
        labels: (B, L) int32 pseudo labels of the pairs; -1 is no accepted label.
        ids: (B,) int64 of what the pairs show, where several pairs show the same; below 0: like no other.
        false_negatives, margin, level_combination, reduction, backend: as of `ifnd_fast.info_nce`.

    Returns:
        The loss, float32 (float64 for float64 inputs): a scalar, or (B,) with reduction "none".

    Raises:
        TypeError, ValueError: as `ifnd_fast.info_nce`.

    Example:
        >>> images, texts = torch.eye(3), torch.eye(3)[[0, 1, 1]]
        >>> symmetric_info_nce(images, texts, temperature=1.0, reduction="none")
        tensor([0.5514, 0.7067, 1.3250])
    """
    checks.matrix("left", left)
    checks.matrix("right", right)
    if left.shape != right.shape:
        raise ValueError(f"right must have left's shape {tuple(left.shape)}, got {tuple(right.shape)}")
    own = torch.iinfo(torch.int64).max - torch.arange(len(left), dtype=torch.int64, device=left.device)
    if ids is not None:
        checks.integers("ids", ids, torch.int64, (len(left),), left, "left")
        own = torch.where(ids < 0, own, ids)

    def loss(query: Tensor, key: Tensor) -> Tensor:
        return info_nce(
            query, key, key, temperature=temperature, query_labels=labels, negative_labels=labels, query_ids=own,
            negative_ids=own, false_negatives=false_negatives, margin=margin, level_combination=level_combination,
            reduction=reduction, backend=backend,
        )  # fmt: skip

    return (loss(left, right) + loss(right, left)) / 2
