"""Incremental false negative detection for contrastive learning (IFND, Chen et al., ICLR 2022), fast."""

from typing import Any as _Any

import torch as _torch  # noqa: F401  first: the extension then shares torch's OpenMP runtime

from ifnd_fast.clustering.kmeans import KMeans
from ifnd_fast.clustering.levels import cluster_levels
from ifnd_fast.clustering.pseudo_labels import PseudoLabels
from ifnd_fast.contrast.loss import IFNDLoss
from ifnd_fast.contrast.models import InBatch, MoCo
from ifnd_fast.contrast.queue import NegativeQueue
from ifnd_fast.ops import assign_clusters, info_nce, symmetric_info_nce

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
    "pretrain",
    "symmetric_info_nce",
]


def __getattr__(name: str) -> _Any:
    if name == "pretrain":  # takes what the others need not: the commands, and torchvision when it is called
        from ifnd_fast.cli import pretrain

        return pretrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
