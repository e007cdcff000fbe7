"""Whitening of features before they are clustered, so that no few directions of large variance decide alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ifnd_fast.clustering.shards import Shards

SMALLEST_VARIANCE = 1e-6  # of the largest: directions below it hold rounding


@torch.no_grad()
def whiten(features: Tensor, power: float, shards: Shards) -> Tensor:
    """Unit rows of (x - mean) Q diag(v)^(-power / 2), with the covariance Q diag(v) Q^T of all rows.

    power 1 is PCA whitening, as DeepCluster (Caron et al., 2018) does before k-means; less leaves some of each
    direction's weight. Directions of next to no variance are left out. A row at the mean stays zero.

    Args:
        features: (N, D) of this rank's rows; float32 or half precision.
        power: above 0 and up to 1.
        shards: how all rows are dealt out.

    Returns:
        (N, D) in the features' dtype.
    """
    x = features.double()
    mean = shards.sum(x.sum(0)) / shards.total
    x = x - mean
    variances, directions = torch.linalg.eigh(shards.sum(x.T @ x) / shards.total)
    kept = variances > SMALLEST_VARIANCE * variances[-1]
    scale = torch.where(kept, variances.clamp_min(torch.finfo(torch.float64).tiny), torch.inf) ** (-power / 2)
    return F.normalize(x @ (directions * scale), dim=1).to(features.dtype)
