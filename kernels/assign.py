"""assign_clusters in Triton: label and confidence in one pass over the centroids.

    s_j = x.c_j (- |c_j|^2 / 2 for l2),  label = argmax_j s_j,  confidence = 1 / sum_j e^{(s_j - s_label) / tau}
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ifnd_fast.kernels.products import LOG2E, load_rows, similarities
from ifnd_fast.kernels.tiles import capability_of, chunk_of, tile_of


@triton.jit(do_not_specialize=["N", "C"])
def assign_kernel(
    features, centroids, half_norms, labels, confidence, N, C, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    L2: tl.constexpr, WITH_CONFIDENCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ROWS features against all centroids. `scale` is log2(e) / temperature."""
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    valid = rows < N
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    label = tl.zeros((ROWS,), tl.int32)
    total = tl.zeros((ROWS,), tl.float32)
    x = load_rows(features, row, valid, 0, D, CHUNK)
    for first in range(0, C, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        exists = j < C
        if CHUNKS == 1:
            c = load_rows(centroids, first, exists, 0, D, CHUNK)
            s = tl.dot(x, tl.trans(c), input_precision=PRECISION)
        else:
            s = similarities(features, row, valid, centroids, first, exists, D, CHUNK, CHUNKS, PRECISION)
        if L2:
            s -= tl.load(half_norms + j, mask=exists, other=0.0)[None, :]
        s = tl.where(exists[None, :], s, float("-inf"))
        nearest, at = tl.max(s, 1, return_indices=True, return_indices_tie_break_left=True)
        nearer = nearest > best  # strictly: of equals the first stays
        highest = tl.where(nearer, nearest, best)
        if WITH_CONFIDENCE:
            reference = tl.where(highest == float("-inf"), 0.0, highest)
            total = total * tl.exp2((best - reference) * scale)
            total += tl.sum(tl.exp2((s - reference[:, None]) * scale), 1)
        label = tl.where(nearer, first + at, label)
        best = highest
    tl.store(labels + rows, label, mask=valid)
    if WITH_CONFIDENCE:
        tl.store(confidence + rows, 1.0 / total, mask=valid)


def assign_clusters(
    features: Tensor, centroids: Tensor, temperature: float, metric: str, return_confidence: bool
) -> tuple[Tensor, Tensor]:
    """Labels (N,) int32 and confidences (N,) float32, or an empty tensor in their place."""
    features, centroids = features.contiguous(), centroids.contiguous()
    n, dim = features.shape
    labels = features.new_empty(n, dtype=torch.int32)
    confidence = features.new_empty(n if return_confidence else 0, dtype=torch.float32)
    half_norms = centroids.float().square().sum(1) / 2 if metric == "l2" else confidence
    tile = tile_of("assign_clusters", features.dtype, capability_of(features.device))
    chunk, chunks = chunk_of(dim)
    assign_kernel[(triton.cdiv(n, tile.rows),)](
        features, centroids, half_norms, labels, confidence, n, len(centroids), LOG2E.value / temperature,
        D=dim, ROWS=tile.rows, COLUMNS=tile.columns, CHUNK=chunk, CHUNKS=chunks, L2=metric == "l2",
        WITH_CONFIDENCE=return_confidence, PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return labels, confidence
