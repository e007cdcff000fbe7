"""The cuda backend: tensors in, tensors out, around the kernels of ifnd_fast._cuda, on the current stream."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ifnd_fast.ops.address import address
from ifnd_fast.ops.backends import _cuda
from ifnd_fast.ops.float32_terms import Operand, margins_of, rows_of_pieces, shift_of, two_terms, unit_of
from ifnd_fast.ops.pair_labels import PairLabels

# float32 rows are split into terms of 16 bits this many at a time: the terms take as much memory as the rows.
ROWS_AT_A_TIME = 1 << 18
WARP_ROWS = 32
TILE_COLUMNS = 32
MAX_WARPS = 4
BLOCKS_PER_MULTIPROCESSOR = 2  # of 4 warps, by registers; of one warp twice as many, by Volta's shared memory
MAX_PARTS = 64  # of a cluster, in the sums
# Weights in (0, 1] are rounded to float16 to be multiplied, where those below 2^-14 would lose digits.
FLOAT16_SHIFT = 15
LOG2E = math.log2(math.e)

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# What the kernels read and write where it is always the same; rows of 16 bits, or of a kind that they are told, aside.
_DTYPES = {
    **dict.fromkeys(("query_labels", "negative_labels", "labels", "rows", "row_count", "near_rows", "near_count",
                     "level_count", "counts"), torch.int32),
    **dict.fromkeys(("query_ids", "negative_ids", "order", "begins"), torch.int64),
    **dict.fromkeys(("half_norms", "unit", "column_unit", "margins", "confidence", "split_max", "split_sum",
                     "split_grad", "split_factor", "level_max", "level_sum", "log_normalizer", "loss_grad",
                     "negatives_grad", "loss", "positive_weight", "query_grad", "distances"), torch.float32),
    "sums": torch.float64,
    "flags": torch.uint8,
}  # fmt: skip


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _pass_arguments(
    query: Operand, negatives: Operand, labels: PairLabels, temperature: float, false_negatives: str,
    level_combination: str,
) -> dict[str, Any]:
    """What every pass over the pairs takes."""
    split = query.shift is not None
    float16 = query.numbers.dtype == torch.float16
    return {
        "query": query.numbers, "negatives": negatives.numbers, **labels.plain()._asdict(),
        "unit": unit_of(query, negatives), "B": len(query.numbers), "K": len(negatives.numbers), "D": query.dim,
        "L": 0 if false_negatives == "keep" else labels.levels,
        "n_losses": labels.n_losses(level_combination),
        "all_levels": level_combination == "all",
        "terms": 3 if split else 1, "stored_terms": 2 if split else 1, "scale": LOG2E / temperature,
        "shift": float(FLOAT16_SHIFT if float16 else 0), "attract": false_negatives == "attract",
        "bfloat16": not float16, "stream": _stream(query.numbers.device),
    }  # fmt: skip


def _warps(rows: int, levels: int) -> int:
    """Of a block: 32 rows each; with many levels half as many, for 64 KiB of shared memory."""
    return min(MAX_WARPS if levels <= 4 else MAX_WARPS // 2, -(-rows // WARP_ROWS))


def _call(function, arguments: dict[str, Any]) -> None:
    device = next(value.device.type for value in arguments.values() if isinstance(value, Tensor))

    def native(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return address(name, value, _DTYPES.get(name, value.dtype), device, None)
        return 0 if value is None else value

    function(**{name: native(name, value) for name, value in arguments.items()})


def info_nce_forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    labels: PairLabels,
    temperature: float,
    false_negatives: str,
    level_combination: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (B,), query_grad (B, D) or (0, D), positive_weight (B,), log_normalizer and false_negative_counts
    (B, n_losses); the counts are 0 where they aren't needed: one loss that eliminates."""
    (B, D), K = query.shape, len(negatives)
    operands = Operand.of(query), Operand.of(negatives)
    both = _pass_arguments(*operands, labels, temperature, false_negatives, level_combination)
    L, n_losses, dim, warps = both["L"], both["n_losses"], both["D"], _warps(B, both["L"])
    has_marked_pass = L > 0 and (both["attract"] or n_losses > 1)  # tiles with false negatives, once more

    tiles = max(1, -(-K // TILE_COLUMNS))
    blocks = -(-B // (warps * WARP_ROWS)) * (-(-dim // 128) if with_grad else 1)
    resident = BLOCKS_PER_MULTIPROCESSOR * (2 if warps == 1 else 1) * _multiprocessors(query.device)
    splits = min(tiles, -(-resident // blocks))
    split_tiles = -(-tiles // splits)
    splits = -(-tiles // split_tiles)

    def floats(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    level_splits = splits if has_marked_pass else 0
    loss, positive_weight, log_normalizer = floats(B), floats(B), floats(B, n_losses)
    false_negative_counts = query.new_empty((B, n_losses), dtype=torch.int32)
    query_grad = floats(B if with_grad else 0, D)
    sums = {
        "split_max": floats(splits, B), "split_sum": floats(splits, B), "split_factor": floats(splits, B),
        "split_grad": floats(splits if with_grad else 0, B, D),
        "level_max": floats(level_splits, B, n_losses), "level_sum": floats(level_splits, B, n_losses),
        "level_count": query.new_empty((level_splits, B, n_losses), dtype=torch.int32),
        "flags": query.new_empty((-(-B // WARP_ROWS), tiles), dtype=torch.uint8) if has_marked_pass else None,
        "log_normalizer": log_normalizer, "false_negative_counts": false_negative_counts,
    }  # fmt: skip
    cut = {"split_columns": split_tiles * TILE_COLUMNS, "splits": splits, "tiles": tiles, "warps": warps}
    passes = {**both, **sums, **cut, "column_unit": unit_of(operands[1]), "with_grad": with_grad, "grad_columns": D}
    joins = {
        **sums, "query": query.contiguous(), "positive": positive.contiguous(), "loss": loss,
        "positive_weight": positive_weight, "query_grad": query_grad, "B": B, "D": D, "n_losses": n_losses,
        "splits": splits, "kind": _KINDS[query.dtype], "scale": both["scale"],
        "inverse_temperature": 1 / temperature, "attract": both["attract"], "has_marked_pass": has_marked_pass,
        "stream": both["stream"],
    }  # fmt: skip
    _call(_cuda.info_nce, {**passes, "step": "dense"})
    if has_marked_pass:
        _call(_cuda.info_nce, {**passes, "step": "marked_sums"})
    _call(_cuda.info_nce_normalise, joins)
    if with_grad:
        if has_marked_pass:
            _call(_cuda.info_nce, {**passes, "step": "marked_grad"})
        _call(_cuda.info_nce_add_splits, joins)
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
) -> Tensor:
    """sum_i loss_grad_i * d loss_i / d n_k, (K, D) float32."""
    (B, D), K = query.shape, len(negatives)
    operands = Operand.of(query), Operand.of(negatives)
    both = _pass_arguments(*operands, labels, temperature, false_negatives, level_combination)
    out = query.new_empty(negatives.shape, dtype=torch.float32)
    of_queries = {
        "log_normalizer": log_normalizer.contiguous(), "false_negative_counts": false_negative_counts.contiguous(),
        "loss_grad": loss_grad.contiguous(), "negatives_grad": out,
    }  # fmt: skip
    cut = {"split_columns": B, "splits": 1, "tiles": 0, "warps": _warps(K, both["L"])}
    last = {"column_unit": unit_of(operands[0]), "with_grad": True, "grad_columns": D, "step": "negatives"}
    if K:
        _call(_cuda.info_nce, {**both, **of_queries, **cut, **last})
    return out


def assign_clusters(
    features: Tensor, centroids: Tensor, temperature: float, metric: str, return_confidence: bool
) -> tuple[Tensor, Tensor]:
    """Labels (N,) int32 and confidences (N,) float32, or an empty tensor in their place."""
    features, centroids = rows_of_pieces(features), rows_of_pieces(centroids)
    labels = features.new_empty(len(features), dtype=torch.int32)
    confidence = features.new_empty(len(features) if return_confidence else 0, dtype=torch.float32)
    shared: dict[str, Any] = {
        "half_norms": centroids.float().square().sum(1) / 2 if metric == "l2" else None,
        "scale": LOG2E / temperature,
        "bfloat16": features.dtype == torch.bfloat16,
        "mode": "confidence" if return_confidence else "labels",
    }
    if features.dtype != torch.float32:
        _assign(features, centroids, labels=labels, confidence=confidence, **shared)
        return labels, confidence
    shift = shift_of(centroids)
    terms = two_terms(centroids, shift)
    for first in range(0, len(features), ROWS_AT_A_TIME):
        rows = slice(first, first + ROWS_AT_A_TIME)
        out: dict[str, Any] = {"labels": labels[rows], "confidence": confidence[rows]}
        _assign_float32(features[rows], centroids, terms, shift, return_confidence, **out, **shared)
    return labels, confidence


def _assign_float32(
    features: Tensor, centroids: Tensor, centroid_terms: Tensor, centroid_shift: Tensor, return_confidence: bool, **how
) -> None:
    """With confidence, three products of terms; without, one, and three for the rows whose two best are too close."""
    shift = shift_of(features)
    terms = two_terms(features, shift)
    unit = torch.exp2(-(shift + centroid_shift)).float()
    how |= {"unit": unit, "stored_terms": 2}
    if return_confidence:
        _assign(terms, centroid_terms, terms=3, **how)
        return
    near_rows = torch.empty_like(how["labels"])
    near_count = torch.zeros_like(near_rows[:1])
    margins = margins_of(features, terms, shift, centroids, centroid_terms, centroid_shift)
    near: dict[str, Any] = {"margins": margins, "near_rows": near_rows, "near_count": near_count}
    _assign(terms, centroid_terms, **near, **how | {"mode": "screen"})
    _assign(terms, centroid_terms, terms=3, rows=near_rows, row_count=near_count, **how)


def _assign(features: Tensor, centroids: Tensor, *, stored_terms: int = 1, terms: int = 1, **arguments) -> None:
    rows, columns, dim = len(features), len(centroids), features.shape[1] // stored_terms
    operands = {"features": features, "centroids": centroids, "N": rows, "C": columns, "D": dim}
    how = {"terms": terms, "stored_terms": stored_terms, "stream": _stream(features.device)}
    _call(_cuda.assign_clusters, {**operands, **how, **arguments})


def cluster_sums(features: Tensor, labels: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (C, D) float64, counts (C,) int64, and squared distances (N,) float32 to the own centroid.

    Labels are not read on the CPU, so none is refused: a row with one out of range is in no sum, its distance NaN.
    """
    features, labels, centroids = features.contiguous(), labels.contiguous(), centroids.contiguous()
    (N, D), C = features.shape, len(centroids)
    ordered, order = torch.sort(labels, stable=True)
    begins = torch.searchsorted(ordered, torch.arange(C + 1, device=labels.device, dtype=labels.dtype))
    blocks = C * -(-D // WARP_ROWS)
    parts = min(MAX_PARTS, -(-BLOCKS_PER_MULTIPROCESSOR * _multiprocessors(features.device) // blocks))
    sums = features.new_empty((parts, C, D), dtype=torch.float64)
    distances = features.new_empty(N, dtype=torch.float32)
    arguments = {
        "features": features, "centroids": centroids, "labels": labels, "order": order, "begins": begins,
        "sums": sums, "distances": distances, "N": N, "C": C, "D": D, "parts": parts,
        "kind": _KINDS[features.dtype], "stream": _stream(features.device),
    }  # fmt: skip
    _call(_cuda.cluster_sums, arguments)
    return sums.sum(0), begins.diff(), distances
