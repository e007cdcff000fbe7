"""Weighted k-nearest-neighbour classification, the usual quick test of self-supervised features."""

from __future__ import annotations

import torch
from torch import Tensor

from ifnd_fast.metrics.rows import check_count, check_pair, check_tests, unit_rows
from ifnd_fast.ops import checks
from ifnd_fast.ops.reference import no_autocast


@torch.no_grad()
def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    n_classes: int | None = None,
    chunk: int = 2048,
) -> Tensor:
    """Classify each test row by the weighted votes of its ``k`` nearest training rows.

    The rule of Wu et al., *Unsupervised Feature Learning via Non-Parametric Instance Discrimination*
    (CVPR 2018): with cosine similarity s and N_k the ``k`` most similar training rows, class c gets the vote
    ``sum over j in N_k with label c of exp(s_j / temperature)``, and the largest vote wins.

    Rows are L2-normalised here; a row of zeros stays zero (similarity 0 to everything). Equally similar
    training rows count in order of their index, equal votes go to the lower class. Half precision is
    computed in float32.

    Args:
        train_features: (N, D) floating point, N >= 1.
        train_labels: (N,) integers from 0 to ``n_classes - 1``.
        test_features: (M, D) floating point on the same device.
        k: Number of neighbours; more than N means all N.
        temperature: Positive; low trusts the nearest rows only, ``inf`` gives every neighbour one vote.
        n_classes: Number of classes; by default the largest training label plus one.
        chunk: Rows of either side compared at a time: chunk * chunk similarities in memory, never M * N.

    Returns:
        (M,) int64 predicted classes.

    Raises:
        TypeError: For an argument that is not a tensor or not of the right kind of dtype.
        ValueError: For shapes, devices or values that do not fit, and for features that are not finite.

    Examples:
        >>> train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_classify(train, torch.tensor([0, 0, 1]), torch.tensor([[5.0, 1.0], [0.0, 2.0]]), k=1)
        tensor([0, 1])
    """
    check_pair(train_features, train_labels, test_features)
    check_count("k", k)
    check_count("chunk", chunk)
    if not checks.number("temperature", temperature) > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if n_classes is None:
        n_classes = int(train_labels.max()) + 1
    elif int(train_labels.max()) >= n_classes:
        raise ValueError(f"train_labels has label {int(train_labels.max())}, but n_classes is {n_classes}")

    dtype = torch.promote_types(torch.promote_types(train_features.dtype, test_features.dtype), torch.float32)
    train = unit_rows(train_features.to(dtype))
    labels = train_labels.to(train.device, torch.int64)
    predictions = []
    for test in test_features.split(chunk):
        similarity, index = _nearest(unit_rows(test.to(dtype)), train, k, chunk)
        predictions.append(_vote(similarity, labels[index], temperature, n_classes))
    return torch.cat(predictions)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    n_classes: int | None = None,
    chunk: int = 2048,
) -> float:
    """Top-1 accuracy of :func:`knn_classify`, in percent.

    Args:
        test_labels: (M,) integers, M >= 1. A class that training lacks simply counts as an error.

    The other arguments, and what is raised, are those of :func:`knn_classify`.
    """
    check_tests(test_features, test_labels)
    predictions = knn_classify(
        train_features,
        train_labels,
        test_features,
        k=k,
        temperature=temperature,
        n_classes=n_classes,
        chunk=chunk,
    )
    correct = int((predictions == test_labels.to(predictions.device)).sum())
    return 100.0 * correct / len(predictions)


def _nearest(test: Tensor, train: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Similarities and indices (m, min(k, N)) of the nearest training rows, nearest first."""
    similarity = test.new_empty((len(test), 0))
    index = torch.empty((len(test), 0), dtype=torch.int64, device=test.device)
    start = 0
    for block in train.split(chunk):
        with no_autocast(test.device):
            near, where = _top(test @ block.T, k)
        # Earlier blocks stand to the left, so "first position wins" is "lowest index wins".
        similarity, order = _top(torch.cat([similarity, near], dim=1), k)
        index = torch.cat([index, where + start], dim=1).gather(1, order)
        start += len(block)
    return similarity, index


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``values.topk(k, dim=1)`` with ties in order of position, of which torch.topk promises nothing."""
    k = min(k, values.shape[1])
    least, where = values.topk(k, dim=1)
    ambiguous = (values >= least[:, -1:]).sum(dim=1) > k
    if ambiguous.any():
        where[ambiguous] = values[ambiguous].sort(dim=1, descending=True, stable=True).indices[:, :k]
    where = where.sort(dim=1).values
    top, order = values.gather(1, where).sort(dim=1, descending=True, stable=True)
    return top, where.gather(1, order)


def _vote(similarity: Tensor, labels: Tensor, temperature: float, n_classes: int) -> Tensor:
    """Winning classes (m,) of neighbours with similarities and labels (m, k), nearest first."""
    # Dividing all votes of a row by the largest weight leaves the winner as it is and cannot overflow.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weights.new_zeros((len(weights), n_classes))
    rows = torch.arange(len(weights), dtype=torch.int64, device=weights.device)
    # One neighbour at a time: no two additions meet in one cell, so the sums have one order on every device.
    for weight, label in zip(weights.T, labels.T, strict=True):
        votes[rows, label] += weight
    return votes.argmax(dim=1)
