"""Incremental false negative detection for contrastive learning (IFND, Chen et al., ICLR 2022), fast."""

from typing import TYPE_CHECKING

import torch as _torch  # noqa: F401  first: the extension then shares torch's OpenMP runtime

from ifnd_fast.clustering.kmeans import KMeans
from ifnd_fast.clustering.levels import cluster_levels
from ifnd_fast.clustering.pseudo_labels import PseudoLabels
from ifnd_fast.loss import IFNDLoss
from ifnd_fast.ops import assign_clusters, info_nce
from ifnd_fast.queue import NegativeQueue

if TYPE_CHECKING:
    from ifnd_fast.model import InBatch, MoCo

__version__ = "0.1.0"

__all__ = [
    "IFNDLoss",
    "InBatch",
    "KMeans",
    "MoCo",
    "NegativeQueue",
    "PseudoLabels",
    "assign_clusters",
    "cluster_levels",
    "info_nce",
]


def __getattr__(name: str) -> object:
    """The models bring torchvision with them, which takes as long to import as torch: only when they are asked for."""
    if name not in ("InBatch", "MoCo"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ifnd_fast import model

    return getattr(model, name)
