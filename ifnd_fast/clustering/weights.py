"""Weights of rows: a row of weight 2 counts as two rows do."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ifnd_fast.clustering.shards import Shards


def as_weights(sample_weight: Any, rows: int, device: torch.device) -> Tensor | None:
    """sample_weight, a number for each of the rows, or one for all, as (N,) float64; None where there are none.

    Raises:
        TypeError, ValueError: they are not so many finite numbers of at least 0.
    """
    if sample_weight is None:
        return None
    if isinstance(sample_weight, numbers.Real):
        sample_weight = np.full(rows, sample_weight)
    if not isinstance(sample_weight, Tensor):
        try:
            sample_weight = torch.from_numpy(np.array(sample_weight, np.float64))
        except (TypeError, ValueError) as error:
            raise TypeError(f"sample_weight must be numbers, one for each row: {error}") from error
    weights = sample_weight.detach().to(device, torch.float64)
    if weights.shape != (rows,):
        raise ValueError(f"sample_weight must have shape (N,) = ({rows},), got {tuple(weights.shape)}")
    if not bool(((weights >= 0) & (weights < math.inf)).all()):
        raise ValueError("sample_weight must be finite numbers of at least 0")
    if not bool((weights > 0).any()):
        raise ValueError("sample_weight must have a number above 0, all are zero")
    return weights


def relative_weights(weights: Tensor | None, x: Tensor, shards: Shards) -> tuple[Tensor | None, float]:
    """The weights of rows x, (N,) float32 of which the largest of all ranks is near 1, and the factor that they are
    over. None: all ranks' rows have the same weight, which is the factor.

    Rows whose weight is too small for float32 beside the largest have 0.
    """
    if shards.every(weights is None, x.device):
        return None, 1.0
    if weights is None:  # on this rank
        weights = torch.ones(len(x), dtype=torch.float64, device=x.device)
    ends = shards.gather(torch.stack([weights.min(), weights.max()])[None])
    least, most = float(ends[:, 0].min()), float(ends[:, 1].max())
    if least == most:
        return None, most
    factor = 2.0 ** math.frexp(most)[1]
    return (weights / factor).float(), factor
