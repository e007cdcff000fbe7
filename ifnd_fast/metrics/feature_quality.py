"""How good features are as far as that can be told without labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ifnd_fast.ops.reference import no_autocast

CHUNK = 2048  # rows compared with others at a time
ONE_POINT = 0.02
"""Below it `feature_std` counts as none, as a share of what features all around have; bfloat16 alone makes 0.004"""
ONE_DIRECTION = 2.5
"""Below it `effective_rank` counts as one direction and a mean, which make 2; bfloat16 alone adds 0.3 in 256 columns"""


def effective_rank(features: Tensor) -> float:
    """In how many directions features spread, from 1 to min(N, D): e to the entropy of their singular values, taken as
    shares of their sum.

    RankMe of Garrido et al., *RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
    Representations by Their Rank* (ICML 2023), equation 1, of features as they are, not centred.

    Args:
        features: (N, D), floating point; of fewer rows than columns it says what the rows allow.

    Example:
        >>> round(effective_rank(torch.eye(3)), 4), round(effective_rank(torch.ones(5, 3)), 4)
        (3.0, 1.0)
    """
    singular = torch.linalg.svdvals(_of_host(features))
    shares = singular / singular.sum()
    return math.exp(float(torch.special.entr(shares).sum()))  # entr(0) is 0


def feature_std(features: Tensor) -> float:
    """The standard deviation over the rows of unit features, mean over the columns: 0 where all are the same, and
    D ** -0.5 where they are spread all around.

    Chen and He, *Exploring Simple Siamese Representation Learning* (CVPR 2021), section 4.1.

    Args:
        features: (N, D), floating point; rows are L2-normalised here.
    """
    return float(F.normalize(_of_host(features), dim=1).std(dim=0, correction=0).mean())


def alignment(first: Tensor, second: Tensor) -> float:
    """The mean squared distance of features of two views of the same images: 0 to 4, lower is closer.

    Wang and Isola, *Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere* (ICML 2020), section 4.1, alpha = 2.

    Args:
        first, second: (N, D) unit rows.
    """
    return float((_of_host(first) - _of_host(second)).square().sum(dim=1).mean())


def uniformity(features: Tensor) -> float:
    """The log of the mean of exp(-2 * squared distance) over all pairs of different rows: 0 where all are the same,
    lower is more evenly spread, -4 about the least.

    Wang and Isola (ICML 2020), section 4.1, t = 2.

    Args:
        features: (N, D) unit rows, N >= 2.
    """
    rows = _of_host(features, torch.float32)
    squares, total = rows.square().sum(dim=1), 0.0
    with no_autocast(rows.device):
        for start in range(0, len(rows), CHUNK):
            some = slice(start, start + CHUNK)
            distances = torch.addmm(squares, rows[some], rows.T, alpha=-2) + squares[some, None]
            similar = distances.clamp_(min=0).mul_(-2).exp_()
            similar.diagonal(start).zero_()  # of each row with itself
            total += float(similar.sum(dtype=torch.float64))
    return math.log(total / (len(rows) * (len(rows) - 1)))


def collapse(rank: float, std: float, dim: int) -> str | None:
    """What features of D = `dim` columns have collapsed to, if they have.

    Args:
        rank: see `effective_rank`.
        std: see `feature_std`.
    """
    if std * math.sqrt(dim) < ONE_POINT:
        return f"all images have nearly the same features (standard deviation {std:.1g}; spread out: {dim**-0.5:.2g})"
    if rank < min(ONE_DIRECTION, dim / 2):
        return f"features differ in one direction alone (effective rank {rank:.2f} of {dim})"
    return None


def _of_host(features: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """On the CPU, in that dtype or a finer one."""
    features = features.detach().cpu()
    return features.to(torch.promote_types(features.dtype, dtype))
