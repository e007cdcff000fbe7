"""The cuda backend: tensors in, tensors out, around the kernels of ifnd_fast._cuda, on the current stream."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ifnd_fast.ops import launch
from ifnd_fast.ops.float32_terms import Operand, margins_of
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


def _pass_arguments(
    query: Operand,
    negatives: Operand,
    labels: PairLabels,
    temperature: float,
    false_negatives: str,
    level_combination: str,
) -> dict[str, Any]:
    """What every pass over the pairs takes."""
    return {
        "query": query.numbers, "query_units": query.units, "query_summary": query.summary,
        "negatives": negatives.numbers, "negative_units": negatives.units, "negative_summary": negatives.summary,
        **labels.plain()._asdict(),
        "B": len(query.numbers), "K": len(negatives.numbers), "D": query.dim,
        "L": 0 if false_negatives == "keep" else labels.levels,
        "n_losses": labels.n_losses(level_combination),
        "all_levels": level_combination == "all", "scale": LOG2E / temperature,
        "shift": 0.0 if query.kind == "bfloat16" else float(FLOAT16_SHIFT), "attract": false_negatives == "attract",
        "numbers": query.kind,
    }  # fmt: skip


def _warps(rows: int, levels: int) -> int:
    """Of a block: 32 rows each; with many levels half as many, for 64 KiB of shared memory."""
    return min(MAX_WARPS if levels <= 4 else MAX_WARPS // 2, -(-rows // WARP_ROWS))


def resident_blocks(warps: int, device: torch.device) -> int:
    """Blocks of so many warps that the GPU holds at a time."""
    return BLOCKS_PER_MULTIPROCESSOR * (2 if warps == 1 else 1) * launch.multiprocessors(device)


def splits_of(columns: int, blocks: int, resident: int) -> tuple[int, int, int]:
    """Splits of the columns, columns in each, and tiles in all: as many blocks as run at a time, as a few more would
    take as long again."""
    tiles = max(1, -(-columns // TILE_COLUMNS))
    split_tiles = -(-tiles // max(1, min(tiles, resident // blocks)))
    return -(-tiles // split_tiles), split_tiles * TILE_COLUMNS, tiles


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
    blocks = -(-B // (warps * WARP_ROWS)) * (-(-dim // 128) if with_grad else 1)
    splits, split_columns, tiles = splits_of(K, blocks, resident_blocks(warps, query.device))

    def floats(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    loss, positive_weight, log_normalizer = floats(B), floats(B), floats(B, n_losses)
    false_negative_counts = query.new_empty((B, n_losses), dtype=torch.int32)
    query_grad = floats(B if with_grad else 0, D)
    sizes = dict.fromkeys(("split_max", "split_sum", "split_factor"), splits * B)
    if with_grad:
        sizes["split_grad"] = splits * B * D
    if has_marked_pass:
        sizes |= dict.fromkeys(("level_max", "level_sum", "level_count"), splits * B * n_losses)
        sizes["flags"] = -(-tiles * -(-B // WARP_ROWS) // 4)  # a byte for each tile of each warp's queries
    _held, places = launch.buffers(query, sizes)
    device = query.device
    kept = {
        **places,
        "log_normalizer": log_normalizer.data_ptr(),
        "false_negative_counts": false_negative_counts.data_ptr(),
    }
    passes = {
        **launch.addresses(device, **both), **kept, "split_columns": split_columns, "splits": splits, "tiles": tiles,
        "warps": warps, "with_grad": with_grad, "grad_columns": D,
    }  # fmt: skip
    joins = {
        **kept,
        **launch.addresses(device, query=query.contiguous(), positive=positive.contiguous()),
        "loss": loss.data_ptr(), "positive_weight": positive_weight.data_ptr(), "query_grad": query_grad.data_ptr(),
        "B": B, "D": D, "n_losses": n_losses, "splits": splits, "kind": _KINDS[query.dtype], "scale": both["scale"],
        "inverse_temperature": 1 / temperature, "attract": both["attract"], "has_marked_pass": has_marked_pass,
    }  # fmt: skip
    launch.kernel_at("info_nce", device, passes, step="dense")
    if has_marked_pass:
        launch.kernel_at("info_nce", device, passes, step="marked_sums")
    launch.kernel_at("info_nce_normalise", device, joins)
    if with_grad:
        if has_marked_pass:
            launch.kernel_at("info_nce", device, passes, step="marked_grad")
        launch.kernel_at("info_nce_add_splits", device, joins)
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
    if K == 0:
        return query.new_empty((0, D), dtype=torch.float32)
    operands = Operand.of(query), Operand.of(negatives)
    both = _pass_arguments(*operands, labels, temperature, false_negatives, level_combination)
    warps = _warps(K, both["L"])
    blocks = max(1, -(-K // (warps * WARP_ROWS)) * -(-both["D"] // 128))
    splits, split_columns, _ = splits_of(B, blocks, resident_blocks(warps, query.device))
    out = query.new_empty((splits, K, D), dtype=torch.float32)
    of_queries = {
        "log_normalizer": log_normalizer.contiguous(), "false_negative_counts": false_negative_counts.contiguous(),
        "loss_grad": loss_grad.contiguous(), "negatives_grad": out,
    }  # fmt: skip
    cut = {"split_columns": split_columns, "splits": splits, "tiles": 0, "warps": warps}
    launch.kernel(
        "info_nce", query.device, **both, **of_queries, **cut, with_grad=True, grad_columns=D, step="negatives"
    )
    return out.sum(0) if splits > 1 else out[0]


def assign_clusters(
    features: Tensor, centroids: Tensor, temperature: float, metric: str, return_confidence: bool
) -> tuple[Tensor, Tensor]:
    """Labels (N,) int32 and confidences (N,) float32, or an empty tensor in their place."""
    features, centroids = features.contiguous(), centroids.contiguous()
    labels = features.new_empty(len(features), dtype=torch.int32)
    confidence = features.new_empty(len(features) if return_confidence else 0, dtype=torch.float32)
    how: dict[str, Any] = {
        "half_norms": centroids.float().square().sum(1) / 2 if metric == "l2" else None,
        "scale": LOG2E / temperature,
        "mode": "confidence" if return_confidence else "labels",
    }
    of_centroids = Operand.of(centroids, with_lengths=not return_confidence)
    if features.dtype != torch.float32:
        _assign(Operand.of(features), of_centroids, labels=labels, confidence=confidence, **how)
        return labels, confidence
    for first in range(0, len(features), ROWS_AT_A_TIME):
        rows = slice(first, first + ROWS_AT_A_TIME)
        out: dict[str, Any] = {"labels": labels[rows], "confidence": confidence[rows] if return_confidence else None}
        _assign_float32(features[rows], centroids, of_centroids, **out, **how)
    return labels, confidence


def _assign_float32(x: Tensor, c: Tensor, centroids: Operand, *, mode: str, **how) -> None:
    """With confidence, three products of terms; without, one, and three for the rows whose two best are too close."""
    features = Operand.of(x, with_lengths=mode == "labels")
    if mode == "confidence":
        _assign(features, centroids, mode=mode, **how)
    else:
        near_rows = torch.empty_like(how["labels"])
        near_count = torch.zeros_like(near_rows[:1])
        near: dict[str, Any] = {"near_rows": near_rows, "near_count": near_count}
        _assign(features, centroids, mode="screen", margins=margins_of(features, centroids), **near, **how)
        _assign(features, centroids, mode=mode, rows=near_rows, row_count=near_count, **how)
    exact = {"exact_features": x, "exact_centroids": c, "centroid_summary": centroids.summary}
    _assign(features, centroids, "assign_exactly", columns=x.shape[1], **exact, **how)


def _assign(
    features: Operand, centroids: Operand, kernel: str = "assign_clusters", columns: int = 0, **arguments
) -> None:
    operands = {
        "features": features.numbers, "feature_units": features.units, "centroids": centroids.numbers,
        "centroid_units": centroids.units, "N": len(features.numbers), "C": len(centroids.numbers), "D": features.dim,
        "columns": columns, "numbers": features.kind,
    }  # fmt: skip
    launch.kernel(kernel, features.numbers.device, **operands, **arguments)


def cluster_sums(features: Tensor, labels: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (C, D) float64, counts (C,) int64, and squared distances (N,) float32 to the own centroid.

    Labels are not read on the CPU, so none is refused: a row with one out of range is in no sum, its distance NaN.
    """
    features, labels, centroids = features.contiguous(), labels.contiguous(), centroids.contiguous()
    (N, D), C = features.shape, len(centroids)
    ordered, order = torch.sort(labels, stable=True)
    begins = torch.searchsorted(ordered, torch.arange(C + 1, device=labels.device, dtype=labels.dtype))
    blocks = C * -(-D // WARP_ROWS)
    parts = min(MAX_PARTS, -(-BLOCKS_PER_MULTIPROCESSOR * launch.multiprocessors(features.device) // blocks))
    sums = features.new_empty((parts, C, D), dtype=torch.float64)
    distances = features.new_empty(N, dtype=torch.float32)
    arguments: dict[str, Any] = {
        "features": features, "centroids": centroids, "labels": labels, "order": order, "begins": begins,
        "sums": sums, "distances": distances, "N": N, "C": C, "D": D, "parts": parts,
        "kind": _KINDS[features.dtype],
    }  # fmt: skip
    launch.kernel("cluster_sums", features.device, **arguments)
    return sums.sum(0), begins.diff(), distances
