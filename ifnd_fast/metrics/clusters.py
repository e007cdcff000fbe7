"""How a clustering looks and how well it agrees with another or with the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn import metrics
from sklearn.metrics import adjusted_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor


def agreement(truth: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Figures of clusters (N,) against classes (N,), by scikit-learn; each at most 1.

    Mutual information is normalised by the arithmetic mean of the entropies.
    """
    table = contingency_matrix(truth, labels, sparse=True)  # (classes, clusters)
    return {
        "adjusted_mutual_information": float(metrics.adjusted_mutual_info_score(truth, labels)),
        "normalized_mutual_information": float(metrics.normalized_mutual_info_score(truth, labels)),
        "adjusted_rand_index": float(metrics.adjusted_rand_score(truth, labels)),
        "purity": float(table.max(axis=0).sum() / len(truth)),
    }


AGREEMENT_IMAGES = 10_000  # its time grows with the square of the clusters that they fall in


def quality(labels: Tensor, before: Tensor, levels: tuple[int, ...]) -> dict[str, Any]:
    """How a clustering looks, at each level, from labels (N, L) now and before, -1 for none.

    `cluster_largest`: share of the images in the largest 1 % of the clusters (at least one), 0.01 were all alike.
    `cluster_empty`: clusters without an image. `cluster_agreement`: adjusted mutual information with the labels before,
    of at most AGREEMENT_IMAGES images evenly spread, 1 for the same clusters; absent the first time.
    """
    largest, empty, agreement = [], [], []
    for level, n_clusters in enumerate(levels):
        now, then = labels[:, level], before[:, level]
        sizes = torch.bincount(now[now >= 0], minlength=n_clusters)
        top = sizes.sort(descending=True).values[: max(1, n_clusters // 100)]
        largest.append(float(top.sum() / sizes.sum()))
        empty.append(int((sizes == 0).sum()))
        both = ((now >= 0) & (then >= 0)).nonzero().flatten()
        both = both[:: max(1, len(both) // AGREEMENT_IMAGES)]
        if len(both):
            agreement.append(float(adjusted_mutual_info_score(then[both].cpu(), now[both].cpu())))
    found = {"cluster_largest": largest, "cluster_empty": empty}
    return found | ({"cluster_agreement": agreement} if agreement else {})
