"""The cpu backend: tensors in, tensors out, around the C++ functions of ifnd_fast._cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from ifnd_fast.ops.backends import _cpu

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STRATEGIES = {"eliminate": 0, "attract": 1, "keep": 2}
_COMBINATIONS = {"mean": 0, "any": 1, "all": 2}
_METRICS = {"inner_product": 0, "l2": 1}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _columns(labels: Tensor | None) -> int:
    return 1 if labels is None else labels.shape[1]


def info_nce_forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    labels_and_ids: tuple[Tensor | None, ...],
    temperature: float,
    false_negatives: str,
    level_combination: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (B,), query_grad (B, D) or (0, D), positive_weight (B,), log_normalizer and counts (B, losses)."""
    query, positive, negatives = query.contiguous(), positive.contiguous(), negatives.contiguous()
    extra = [None if t is None else t.contiguous() for t in labels_and_ids]
    (rows, dim), columns = query.shape, _columns(extra[0])
    losses = columns if level_combination == "mean" else 1
    loss = torch.empty(rows)
    query_grad = torch.empty(rows if with_grad else 0, dim)
    positive_weight = torch.empty(rows)
    log_normalizer = torch.empty(rows, losses)
    counts = torch.empty(rows, losses, dtype=torch.int32)
    _cpu.info_nce_forward(
        *map(_address, (query, positive, negatives, *extra)),  # type: ignore[call-arg]
        rows,
        len(negatives),
        dim,
        columns,
        _DTYPES[query.dtype],
        temperature,
        _STRATEGIES[false_negatives],
        _COMBINATIONS[level_combination],
        loss.data_ptr(),
        query_grad.data_ptr() if with_grad else 0,
        positive_weight.data_ptr(),
        log_normalizer.data_ptr(),
        counts.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, query_grad, positive_weight, log_normalizer, counts


def info_nce_negatives_grad(
    loss_grad: Tensor,
    query: Tensor,
    negatives: Tensor,
    labels_and_ids: tuple[Tensor | None, ...],
    log_normalizer: Tensor,
    counts: Tensor,
    temperature: float,
    false_negatives: str,
    level_combination: str,
) -> Tensor:
    """sum_i loss_grad_i * d loss_i / d n_k, (K, D) float32."""
    loss_grad, query, negatives = loss_grad.contiguous(), query.contiguous(), negatives.contiguous()
    extra = [None if t is None else t.contiguous() for t in labels_and_ids]
    negatives_grad = torch.empty(negatives.shape)
    _cpu.info_nce_negatives_grad(
        *map(_address, (query, negatives, *extra)),  # type: ignore[call-arg]
        len(query),
        len(negatives),
        query.shape[1],
        _columns(extra[0]),
        _DTYPES[query.dtype],
        temperature,
        _STRATEGIES[false_negatives],
        _COMBINATIONS[level_combination],
        loss_grad.data_ptr(),
        log_normalizer.data_ptr(),
        counts.data_ptr(),
        negatives_grad.data_ptr(),
        torch.get_num_threads(),
    )
    return negatives_grad


def assign_clusters(
    features: Tensor, centroids: Tensor, temperature: float, metric: str, return_confidence: bool
) -> tuple[Tensor, Tensor]:
    """Labels (N,) int32 and confidences (N,) float32, or an empty tensor in their place."""
    features, centroids = features.contiguous(), centroids.contiguous()
    labels = torch.empty(len(features), dtype=torch.int32)
    confidence = torch.empty(len(features) if return_confidence else 0)
    _cpu.assign_clusters(
        features.data_ptr(),
        centroids.data_ptr(),
        len(features),
        len(centroids),
        features.shape[1],
        _DTYPES[features.dtype],
        _METRICS[metric],
        temperature,
        labels.data_ptr(),
        confidence.data_ptr() if return_confidence else 0,
        torch.get_num_threads(),
    )
    return labels, confidence


def reassign(features: Tensor, previous: Tensor | None, centroids: Tensor, labels: Tensor, bounds: Tensor) -> int:
    """Labels (N,) int32 of the nearest centroids (C, D) by l2, in place, from those among `previous` (None: none yet).

    `bounds` (N,) float32 keeps less than each row's distance to every centroid but its own. Labels and bounds are
    contiguous, all but labels float32.

    Returns:
        How many rows screening could not decide, which makes this slow; -1, and nothing done, where there is none.
    """
    features, centroids = features.contiguous(), centroids.contiguous()
    previous = None if previous is None else previous.contiguous()
    return _cpu.reassign(
        features.data_ptr(),
        _address(previous),
        centroids.data_ptr(),
        len(features),
        len(centroids),
        features.shape[1],
        labels.data_ptr(),
        bounds.data_ptr(),
        torch.get_num_threads(),
    )


def cluster_sums(features: Tensor, labels: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (C, D) float64, counts (C,) int64, and squared distances (N,) float32 to the own centroid."""
    features, labels, centroids = features.contiguous(), labels.contiguous(), centroids.contiguous()
    sums = torch.empty(centroids.shape, dtype=torch.float64)
    counts = torch.empty(len(centroids), dtype=torch.int64)
    distances = torch.empty(len(features))
    _cpu.cluster_sums(
        features.data_ptr(),
        labels.data_ptr(),
        centroids.data_ptr(),
        len(features),
        len(centroids),
        features.shape[1],
        _DTYPES[features.dtype],
        sums.data_ptr(),
        counts.data_ptr(),
        distances.data_ptr(),
        torch.get_num_threads(),
    )
    return sums, counts, distances
