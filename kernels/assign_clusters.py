"""assign_clusters in Triton: label and confidence in one pass over the centroids.

    s_j = x.c_j (- |c_j|^2 / 2 for l2),  label = argmax_j s_j,  confidence = 1 / sum_j e^{(s_j - s_label) / tau}

A similarity that is NaN is never the largest, and makes the confidence NaN; a row that has no other gets label -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ifnd_fast.kernels.products import LOG2E, load_column, load_rows, similarities
from ifnd_fast.kernels.tiles import Tile, capability_of, chunk_of, tile_of

INFINITIES = Tile(32, 32, 4, 1)


@triton.jit
def join_tile(
    best, label, total, x, row, valid, features, centroids, half_norms, first, C, scale,
    D: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, L2: tl.constexpr,
    WITH_CONFIDENCE: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Each row's largest score so far, its centroid, and the sum of e^{score - largest}, with one tile of centroids
    more; in a `WHOLE` tile all columns exist."""
    exists = tl.full((COLUMNS,), True, tl.int1) if WHOLE else first + tl.arange(0, COLUMNS) < C
    if CHUNKS == 1:
        c = load_rows(centroids, first, exists, 0, D, CHUNK)
        s = tl.dot(x, tl.trans(c), input_precision=PRECISION)
    else:
        s = similarities(features, row, valid, centroids, first, exists, D, CHUNK, CHUNKS, PRECISION)
    if L2:
        s -= load_column(half_norms, first, exists, 0, 1, 0.0)[None, :]
    if not WHOLE:
        s = tl.where(exists[None, :], s, float("-inf"))
    numbers = tl.maximum(s, float("-inf"))  # NaN, which `max` would take or leave by its place, becomes -infinity
    nearest, at = tl.max(numbers, 1, return_indices=True, return_indices_tie_break_left=True)
    highest = tl.maximum(nearest, best)
    if WITH_CONFIDENCE:
        reference = tl.where(highest == float("-inf"), 0.0, highest)
        # The difference first: it is exact where it matters, products with a large scale are not.
        total = total * tl.exp2((best - reference) * scale) + tl.sum(tl.exp2((s - reference[:, None]) * scale), 1)
    label = tl.where(nearest > best, first + at, label)  # strictly: of equals the first stays
    return highest, label, total


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
    label = tl.full((ROWS,), -1, tl.int32)
    total = tl.zeros((ROWS,), tl.float32)
    x = load_rows(features, row, valid, 0, D, CHUNK)
    whole = 0
    if features.dtype.element_ty.primitive_bitwidth == 16:  # in float32 two loops would spill registers
        whole = C // COLUMNS * COLUMNS
        for first in range(0, whole, COLUMNS):
            best, label, total = join_tile(
                best, label, total, x, row, valid, features, centroids, half_norms, first, C, scale,
                D, COLUMNS, CHUNK, CHUNKS, L2, WITH_CONFIDENCE, PRECISION, True,
            )  # fmt: skip
    for first in tl.range(whole, C, COLUMNS, num_stages=1):  # of 16-bit inputs once at most; a branch would spill, too
        best, label, total = join_tile(
            best, label, total, x, row, valid, features, centroids, half_norms, first, C, scale,
            D, COLUMNS, CHUNK, CHUNKS, L2, WITH_CONFIDENCE, PRECISION, False,
        )  # fmt: skip
    tl.store(labels + rows, label, mask=valid)
    if WITH_CONFIDENCE:
        tl.store(confidence + rows, tl.where(best == float("-inf"), float("nan"), 1.0 / total), mask=valid)


@triton.jit(do_not_specialize=["N", "C"])
def infinities_kernel(
    features, centroids, half_norms, labels, N, C,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    L2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: of ROWS features those that have no label yet, and so no similarity above -infinity: the first
    centroid at -infinity takes them. Such rows are rare, and in `assign_kernel` this would take registers."""
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    valid = rows < N
    label = tl.load(labels + rows, mask=valid, other=0)
    for first in range(0, tl.where(tl.min(label) < 0, C, 0), COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        exists = columns < C
        s = similarities(features, row, valid, centroids, first, exists, D, CHUNK, CHUNKS, PRECISION)
        if L2:
            s -= load_column(half_norms, first, exists, 0, 1, 0.0)[None, :]
        lowest = tl.min(tl.where((s == float("-inf")) & exists[None, :], columns[None, :], C), 1)
        label = tl.where((label < 0) & (lowest < C), lowest, label)
    tl.store(labels + rows, label, mask=valid)


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
    shape = {"D": dim, "CHUNK": chunk, "CHUNKS": chunks, "L2": metric == "l2", "PRECISION": "ieee"}
    assign_kernel[(triton.cdiv(n, tile.rows),)](
        features, centroids, half_norms, labels, confidence, n, len(centroids), LOG2E.value / temperature,
        ROWS=tile.rows, COLUMNS=tile.columns, WITH_CONFIDENCE=return_confidence, num_warps=tile.warps,
        num_stages=tile.stages, maxnreg=tile.registers, **shape,
    )  # fmt: skip
    infinities_kernel[(triton.cdiv(n, INFINITIES.rows),)](
        features, centroids, half_norms, labels, n, len(centroids), ROWS=INFINITIES.rows,
        COLUMNS=INFINITIES.columns, num_warps=INFINITIES.warps, num_stages=INFINITIES.stages, **shape,
    )  # fmt: skip
    return labels, confidence
