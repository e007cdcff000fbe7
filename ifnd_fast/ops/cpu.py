"""The cpu backend: tensors in, tensors out, around the C++ functions of ifnd_fast._cpu."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ifnd_fast.ops.address import address, plain
from ifnd_fast.ops.backends import _cpu
from ifnd_fast.ops.checks import COMBINATIONS, METRICS, STRATEGIES
from ifnd_fast.ops.pair_labels import PairLabels

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Everything made here says its dtype and device: torch's defaults are the user's to set.
_CPU = torch.device("cpu")


def _call(function: Callable, *arguments: int | float | tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]) -> int:
    """`function` of numbers, and of tensors as (name, tensor, dtype, shape)."""
    return function(*(address(*a[:3], "cpu", a[3]) if isinstance(a, tuple) else a for a in arguments))


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_CPU)


def _arguments_of(labels: PairLabels, rows: int, keys: int) -> list:
    """Labels (rows or keys, L) int32 and ids (rows or keys,) int64 as `_call` takes them."""
    shapes = ((rows, labels.levels), (keys, labels.levels), (rows,), (keys,))
    dtypes = (torch.int32, torch.int32, torch.int64, torch.int64)
    return list(zip(labels._fields, labels.plain(), dtypes, shapes, strict=True))


def _given(rows: int, *of_rows: Tensor | None) -> list:
    """Numbers (rows,) float32 as `_call` takes them; none where no call has any."""
    present = any(t is not None for t in of_rows)
    return [("of_rows", None if t is None else plain(t), torch.float32, (rows,)) for t in of_rows if present]


def info_nce_forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    labels: PairLabels,
    temperature: float,
    false_negatives: str,
    level_combination: str,
    with_grad: bool,
    log_hard: Tensor | None = None,
    ceiling: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (B,), query_grad (B, D) or (0, D), positive_weight (B,), log_normalizer and false_negative_counts
    (B, n_losses). log_hard (B,) float32: of exponentials that join each sum. ceiling (B,) float32: a key with q.n above
    it is in no sum."""
    (rows, dim), keys, dtype, levels = query.shape, len(negatives), query.dtype, max(1, labels.levels)
    n_losses = labels.n_losses(level_combination)
    loss, positive_weight, log_normalizer = _empty(rows), _empty(rows), _empty(rows, n_losses)
    query_grad = _empty(rows if with_grad else 0, dim)
    false_negative_counts = _empty(rows, n_losses, dtype=torch.int32)
    _call(
        _cpu.info_nce_forward,
        ("query", plain(query), dtype, (rows, dim)),
        ("positive", plain(positive), dtype, (rows, dim)),
        ("negatives", plain(negatives), dtype, (keys, dim)),
        *_arguments_of(labels, rows, keys),
        rows,
        keys,
        dim,
        levels,
        _DTYPES[dtype],
        temperature,
        STRATEGIES.index(false_negatives),
        COMBINATIONS.index(level_combination),
        ("loss", loss, torch.float32, (rows,)),
        ("query_grad", query_grad if with_grad else None, torch.float32, (rows, dim)),
        ("positive_weight", positive_weight, torch.float32, (rows,)),
        ("log_normalizer", log_normalizer, torch.float32, (rows, n_losses)),
        ("false_negative_counts", false_negative_counts, torch.int32, (rows, n_losses)),
        torch.get_num_threads(),
        *_given(rows, ceiling, log_hard),
    )
    return loss, query_grad, positive_weight, log_normalizer, false_negative_counts


def info_nce_negatives_grad(
    loss_grad: Tensor,
    query: Tensor,
    negatives: Tensor,
    labels: PairLabels,
    log_normalizer: Tensor,
    false_negative_counts: Tensor,
    temperature: float,
    false_negatives: str,
    level_combination: str,
    ceiling: Tensor | None = None,
) -> Tensor:
    """sum_i loss_grad_i * d loss_i / d n_k, (K, D) float32."""
    (rows, dim), keys, dtype, levels = query.shape, len(negatives), query.dtype, max(1, labels.levels)
    n_losses = labels.n_losses(level_combination)
    negatives_grad = _empty(keys, dim)
    _call(
        _cpu.info_nce_negatives_grad,
        ("query", plain(query), dtype, (rows, dim)),
        ("negatives", plain(negatives), dtype, (keys, dim)),
        *_arguments_of(labels, rows, keys),
        rows,
        keys,
        dim,
        levels,
        _DTYPES[dtype],
        temperature,
        STRATEGIES.index(false_negatives),
        COMBINATIONS.index(level_combination),
        ("loss_grad", plain(loss_grad), torch.float32, (rows,)),
        ("log_normalizer", plain(log_normalizer), torch.float32, (rows, n_losses)),
        ("false_negative_counts", plain(false_negative_counts), torch.int32, (rows, n_losses)),
        ("negatives_grad", negatives_grad, torch.float32, (keys, dim)),
        torch.get_num_threads(),
        *_given(rows, ceiling),
    )
    return negatives_grad


def assign_clusters(
    features: Tensor, centroids: Tensor, temperature: float, metric: str, return_confidence: bool
) -> tuple[Tensor, Tensor]:
    """Labels (N,) int32 and confidences (N,) float32, or an empty tensor in their place."""
    (rows, dim), clusters, dtype = features.shape, len(centroids), features.dtype
    labels, confidence = _empty(rows, dtype=torch.int32), _empty(rows if return_confidence else 0)
    _call(
        _cpu.assign_clusters,
        ("features", plain(features), dtype, (rows, dim)),
        ("centroids", plain(centroids), dtype, (clusters, dim)),
        rows,
        clusters,
        dim,
        _DTYPES[dtype],
        METRICS.index(metric),
        temperature,
        ("labels", labels, torch.int32, (rows,)),
        ("confidence", confidence if return_confidence else None, torch.float32, (rows,)),
        torch.get_num_threads(),
    )
    return labels, confidence


def reassign_by_bounds(
    features: Tensor, previous: Tensor | None, centroids: Tensor, labels: Tensor, bounds: Tensor
) -> int:
    """Labels (N,) int32 of the nearest centroids (C, D) by l2, in place, from those among `previous` (None: none yet).

    `bounds` (N,) float32 keeps less than each row's distance to every centroid but its own. Labels and bounds are
    contiguous, all but labels float32.

    Returns:
        How many rows screening could not decide, which makes this slow; -1, and nothing done, where there is none.
    """
    (rows, dim), clusters = features.shape, len(centroids)
    return _call(
        _cpu.reassign,
        ("features", plain(features), torch.float32, (rows, dim)),
        ("previous", None if previous is None else plain(previous), torch.float32, (clusters, dim)),
        ("centroids", plain(centroids), torch.float32, (clusters, dim)),
        rows,
        clusters,
        dim,
        ("labels", labels, torch.int32, (rows,)),
        ("bounds", bounds, torch.float32, (rows,)),
        torch.get_num_threads(),
    )


def cluster_sums(features: Tensor, labels: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (C, D) float64, counts (C,) int64, and squared distances (N,) float32 to the own centroid.

    Raises:
        ValueError: a label is not in 0..C-1.
    """
    (rows, dim), clusters, dtype = features.shape, len(centroids), features.dtype
    sums, counts = _empty(clusters, dim, dtype=torch.float64), _empty(clusters, dtype=torch.int64)
    distances = _empty(rows)
    _call(
        _cpu.cluster_sums,
        ("features", plain(features), dtype, (rows, dim)),
        ("labels", plain(labels), torch.int32, (rows,)),
        ("centroids", plain(centroids), torch.float32, (clusters, dim)),
        rows,
        clusters,
        dim,
        _DTYPES[dtype],
        ("sums", sums, torch.float64, (clusters, dim)),
        ("counts", counts, torch.int64, (clusters,)),
        ("distances", distances, torch.float32, (rows,)),
        torch.get_num_threads(),
    )
    return sums, counts, distances
