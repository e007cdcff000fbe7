"""What joins the splits of the queue: losses and normalisers, and the query's gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from ifnd_fast.kernels.products import LN2, load_rows
from ifnd_fast.kernels.tiles import Tile

# Rows, or numbers of the gradient, by splits side by side.
ROWS_BY_SPLITS, NUMBERS_BY_SPLITS = Tile(4, 64, 4, 1, registers=96), Tile(64, 16, 4, 1)


@triton.jit
def join_splits(split_max, split_sum, at, valid, stride, splits, scale, SPLITS: tl.constexpr):
    """The splits' sums of powers of 2, each relative to its own maximum, as one (rows,): the largest maximum, and the
    sum relative to it, in float64. A row's are at `at` and every `stride` from there."""
    highest = tl.full((at.shape[0],), float("-inf"), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = (split < splits)[:, None] & valid[None, :]
        place = split[:, None] * stride + at[None, :]
        highest = tl.maximum(highest, tl.max(tl.load(split_max + place, mask=inside, other=float("-inf")), 0))
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros((at.shape[0],), tl.float64)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = (split < splits)[:, None] & valid[None, :]
        place = split[:, None] * stride + at[None, :]
        m = tl.load(split_max + place, mask=inside, other=float("-inf"))
        part = tl.load(split_sum + place, mask=inside, other=0.0) * tl.exp2((m - reference[None, :]) * scale)
        total += tl.sum(part.to(tl.float64), 0)
    return highest, total


@triton.jit
def add_up(numbers, at, valid, stride, splits, SPLITS: tl.constexpr, dtype: tl.constexpr):
    """The splits' numbers of each row, added up."""
    total = tl.zeros((at.shape[0],), dtype)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = (split < splits)[:, None] & valid[None, :]
        total += tl.sum(tl.load(numbers + split[:, None] * stride + at[None, :], mask=inside, other=0).to(dtype), 0)
    return total


@triton.jit(do_not_specialize=["B", "splits"])
def normalise_kernel(
    query, positive, split_max, split_sum, level_max, level_sum, level_count,
    loss, log_normalizer, false_negative_counts, positive_weight, split_factor, B, splits, scale,
    D: tl.constexpr, N_LOSSES: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, ATTRACT: tl.constexpr, HAS_MARKED_PASS: tl.constexpr,
):  # fmt: skip
    """One program: the sums of ROWS queries, SPLITS at a time side by side; what is left, which is little, in float64.

    `split_factor` (splits, B) is mean_l e^{m_split - lse_l} = e^{m_split - m} mean_l e^{m - lse_l}, m the largest."""
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    valid = rows < B
    s_positive = tl.zeros((ROWS,), tl.float64)
    for chunk in range(CHUNKS):
        q = load_rows(query, row, valid, chunk, D, CHUNK).to(tl.float64)
        p = load_rows(positive, row, valid, chunk, D, CHUNK).to(tl.float64)
        s_positive += tl.sum(q * p, 1)
    s_positive *= scale

    at, stride = rows.to(tl.int64), tl.cast(B, tl.int64)
    highest, total = join_splits(split_max, split_sum, at, valid, stride, splits, scale, SPLITS)
    dense_max = highest.to(tl.float64) * scale
    losses, weight, factor = tl.zeros_like(total), tl.zeros_like(total), tl.zeros_like(total)
    for level in range(N_LOSSES):
        at_level = at * N_LOSSES + level
        M, rest = tl.maximum(dense_max, s_positive), total
        count = tl.zeros((ROWS,), tl.int32)
        if HAS_MARKED_PASS:
            count = add_up(level_count, at_level, valid, stride * N_LOSSES, splits, SPLITS, tl.int32)
        if HAS_MARKED_PASS and not ATTRACT:
            own_max, own = join_splits(level_max, level_sum, at_level, valid, stride * N_LOSSES, splits, scale, SPLITS)
            own_max = own_max.to(tl.float64) * scale
            M = tl.maximum(M, own_max)
            rest = total * tl.exp2(dense_max - M) + own * tl.exp2(own_max - M)
        else:
            rest = total * tl.exp2(dense_max - M)
        Z = rest + tl.exp2(s_positive - M)
        log_Z = tl.log(Z)
        losses += (M - s_positive) * LN2 + log_Z
        weight -= rest / Z  # e^{s+ - lse} - 1
        factor += tl.exp2(dense_max - M) / Z
        if HAS_MARKED_PASS and ATTRACT:
            n = count.to(tl.float64)
            attracted = add_up(level_sum, at_level, valid, stride * N_LOSSES, splits, SPLITS, tl.float64) * scale
            losses -= (attracted - n * s_positive) * LN2 / (1.0 + n)
            weight += n / (1.0 + n)
        tl.store(log_normalizer + at_level, M * LN2 + log_Z, mask=valid)
        tl.store(false_negative_counts + at_level, count, mask=valid)
    tl.store(loss + rows, losses / N_LOSSES, mask=valid)
    tl.store(positive_weight + rows, weight / N_LOSSES, mask=valid)
    of_row = (factor / N_LOSSES).to(tl.float32)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = (split < splits)[:, None] & valid[None, :]
        place = split[:, None] * stride + at[None, :]
        m = tl.load(split_max + place, mask=inside, other=float("-inf"))
        tl.store(split_factor + place, tl.exp2((m - reference[None, :]) * scale) * of_row[None, :], mask=inside)


@triton.jit(do_not_specialize=["B", "splits"])
def add_splits_kernel(
    positive, positive_weight, split_grad, split_factor, query_grad, B, splits, inverse_temperature,
    D: tl.constexpr, NUMBERS: tl.constexpr, SPLITS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One program: NUMBERS of the query's gradient, SPLITS at a time side by side."""
    at = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    inside = at < B.to(tl.int64) * D
    row = at // D
    grad = tl.load(positive_weight + row, mask=inside, other=0.0)
    grad *= tl.load(positive + at, mask=inside, other=0.0).to(tl.float32)
    for first in range(0, splits, SPLITS):
        split = (first + tl.arange(0, SPLITS))[:, None]
        real = (split < splits) & inside[None, :]
        part = tl.load(split_grad + split * (B.to(tl.int64) * D) + at[None, :], mask=real, other=0.0)
        if not SCALED:
            part *= tl.load(split_factor + split * B.to(tl.int64) + row[None, :], mask=real, other=0.0)
        grad += tl.sum(part, 0)
    tl.store(query_grad + at, grad * inverse_temperature, mask=inside)
