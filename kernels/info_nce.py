"""info_nce in Triton: logits, false negatives, log-sum-exps and the query's gradient in one pass over the queue.

Let s_k = q.n_k / tau. Every level l needs  Z_l = e^{s+} + sum_{k not in F_l} e^{s_k}  and, for the gradient,
sum_k w_k n_k  with the weights  w_k = mean_l [k not in F_l] e^{s_k} / Z_l,  and Z_l is known only at the end. Keys in
no F_l count alike at every level; keys in some F_l are few. So, with the queue split over programs,

1. `pass_kernel`: one online softmax over the keys in no F_l, whose weighted key sum G is accumulated as flash attention
   accumulates its output. Tiles that hold a false negative are flagged.
2. `marked_sums_kernel`: in the flagged tiles alone, |F_l| and each level's own online softmax over the keys that are in
   another level's F, not in its own. Nothing is ever subtracted: a level's largest logit may be masked in another.
3. `normalise_kernel`: joins the splits, in order: loss, log Z_l, |F_l|, and what each split's G is to be scaled by.
4. `marked_grad_kernel`: in the flagged tiles alone, now that Z_l is known, those keys' part of the gradient.
5. `add_splits_kernel`: the splits' gradients, in order, and the positive's.

Levels that are combined make one loss, whose F holds the keys that `marked_pairs` finds at any level or at all: L
columns of labels then, and one of LOSSES. Where one loss eliminates there is no key left for 2 and 4.

Attraction: every key but the own image's is in the dense softmax; level l sums T_l = sum_{F_l} s_k in 2, and
-mean_l [k in F_l] / (1 + |F_l|) are the weights of 4. No atomics: the same bits every time.
Logits carry a factor log2(e), so that exponentials are powers of 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ifnd_fast.kernels.products import (
    LN2,
    LOG2E,
    excluded_pairs,
    ids_of,
    labels_of,
    load_column,
    load_rows,
    loss_pairs,
    marked_pairs,
    marked_pairs_held,
    similarities,
)  # fmt: skip
from ifnd_fast.kernels.tiles import Tile, capability_of, chunk_of, multiprocessors, tile_of

PROGRAMS_PER_MULTIPROCESSOR = 2
# Weights in (0, 1] are rounded to the inputs' dtype to be multiplied. In float16 those below 2^-14 would lose digits,
# so all are scaled by this power of 2: relative to the largest, digits last to 2^-29.
FLOAT16_SHIFT = 15
SMALLEST_LOSS_GRAD = tl.constexpr(2.0**-100)  # of the largest: its inverse is finite
# Of the kernels that join splits: rows, or numbers of the gradient, by splits side by side.
ROWS_BY_SPLITS, NUMBERS_BY_SPLITS = Tile(4, 64, 4, 1, registers=96), Tile(64, 16, 4, 1)


@triton.jit
def pass_tile(
    highest, total, grad, q, own, y, row, valid, query, negatives, query_labels, negative_labels, negative_ids,
    flags, first, end, chunk, tiles, scale,
    D: tl.constexpr, L: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    SHIFT: tl.constexpr, ATTRACT: tl.constexpr, ALL: tl.constexpr, WITH_GRAD: tl.constexpr, HAS_LABELS: tl.constexpr,
    FLAGS: tl.constexpr, HAS_IDS: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The online softmax of each row with one tile of keys more; in a `WHOLE` tile all keys exist."""
    exists = tl.full((KEYS,), True, tl.int1) if WHOLE else first + tl.arange(0, KEYS) < end
    if CHUNKS == 1:
        n = load_rows(negatives, first, exists, 0, D, CHUNK)
        s = tl.dot(q, tl.trans(n), input_precision=PRECISION)
    else:
        s = similarities(query, row, valid, negatives, first, exists, D, CHUNK, CHUNKS, PRECISION)
        n = load_rows(negatives, first, exists, chunk, D, CHUNK)
    excluded = excluded_pairs(own, negative_ids, first, exists, HAS_IDS)
    if HAS_LABELS:
        marked = marked_pairs_held(y, query_labels, row, valid, negative_labels, first, exists, L, ALL)
        kept = tl.where(marked, float("-inf"), s)
        if FLAGS:
            # By the logits: of the marks alone, in a layout of its own, Triton makes a second. Excluded pairs count,
            # which at most flags a tile for nothing.
            found = (tl.min(kept) == float("-inf")).to(tl.int8)
            tl.store(flags + tl.program_id(0).to(tl.int64) * tiles + first // KEYS, found)
        if not ATTRACT:
            s = kept
    s = tl.where(excluded, float("-inf"), s)
    raised = tl.maximum(highest, tl.max(s, 1))
    reference = tl.where(raised == float("-inf"), 0.0, raised)
    # The difference first: it is exact where it matters, and a large product with the scale, or less SHIFT, is not.
    weights = tl.exp2((s - reference[:, None]) * scale + SHIFT)
    rescale = tl.exp2((highest - reference) * scale)
    total = total * rescale + tl.sum(weights, 1)
    if WITH_GRAD:
        grad = tl.dot(weights.to(n.dtype), n, grad * rescale[:, None], input_precision=PRECISION)
    return raised, total, grad


@triton.jit(do_not_specialize=["B", "K", "split_keys", "tiles"])
def pass_kernel(
    query, negatives, query_labels, negative_labels, query_ids, negative_ids,
    split_max, split_sum, split_grad, flags, B, K, split_keys, tiles, scale,
    D: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, SHIFT: tl.constexpr, ATTRACT: tl.constexpr, ALL: tl.constexpr, WITH_GRAD: tl.constexpr,
    HAS_LABELS: tl.constexpr, FLAGS: tl.constexpr, HAS_IDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries, one split of the keys, one chunk of the gradient's columns."""
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    split, chunk = tl.program_id(1), tl.program_id(2)
    valid = rows < B
    begin = split * split_keys
    end = tl.minimum(K, begin + split_keys)
    q = load_rows(query, row, valid, 0, D, CHUNK)
    own, y = ids_of(query_ids, row, valid, HAS_IDS), labels_of(query_labels, row, valid, L if HAS_LABELS else 0)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    grad = tl.zeros((ROWS, CHUNK), tl.float32)
    whole = begin + (end - begin) // KEYS * KEYS
    for first in range(begin, whole, KEYS):
        highest, total, grad = pass_tile(
            highest, total, grad, q, own, y, row, valid, query, negatives, query_labels, negative_labels, negative_ids,
            flags, first, end, chunk, tiles, scale,
            D, L, KEYS, CHUNK, CHUNKS, SHIFT, ATTRACT, ALL, WITH_GRAD, HAS_LABELS, FLAGS, HAS_IDS, PRECISION, True,
        )  # fmt: skip
    for first in tl.range(whole, end, KEYS, num_stages=1):  # one turn at most; as a branch it would spill registers
        highest, total, grad = pass_tile(
            highest, total, grad, q, own, y, row, valid, query, negatives, query_labels, negative_labels, negative_ids,
            flags, first, end, chunk, tiles, scale,
            D, L, KEYS, CHUNK, CHUNKS, SHIFT, ATTRACT, ALL, WITH_GRAD, HAS_LABELS, FLAGS, HAS_IDS, PRECISION, False,
        )  # fmt: skip

    at = split.to(tl.int64) * B + rows  # the maximum without the scale, the sum relative to it
    if chunk == 0:
        tl.store(split_max + at, highest, mask=valid)
        tl.store(split_sum + at, total * (1.0 / (1 << SHIFT)), mask=valid)
    if WITH_GRAD:
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        place = split_grad + at[:, None] * D + columns[None, :]
        tl.store(place, grad * (1.0 / (1 << SHIFT)), mask=valid[:, None] & (columns < D)[None, :])


@triton.jit(do_not_specialize=["B", "K", "split_keys", "tiles"])
def marked_sums_kernel(
    query, negatives, query_labels, negative_labels, query_ids, negative_ids,
    level_max, level_sum, level_count, flags, B, K, split_keys, tiles, scale,
    D: tl.constexpr, L: tl.constexpr, LOSSES: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, FLAG_KEYS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    ATTRACT: tl.constexpr, ALL: tl.constexpr, HAS_IDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries and the flagged tiles of one split."""
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    split = tl.program_id(1)
    valid = rows < B
    end = tl.minimum(K, (split + 1) * split_keys)
    levels = tl.arange(0, PADDED)[None, :]
    own_max = tl.full((ROWS, PADDED), float("-inf"), tl.float32)
    own_sum = tl.zeros((ROWS, PADDED), tl.float32)
    count = tl.zeros((ROWS, PADDED), tl.int32)
    for first in range(split * split_keys, end, KEYS):
        if tl.load(flags + tl.program_id(0).to(tl.int64) * tiles + first // FLAG_KEYS) != 0:
            exists = first + tl.arange(0, KEYS) < end
            s = similarities(query, row, valid, negatives, first, exists, D, CHUNK, CHUNKS, PRECISION)
            excluded = excluded_pairs(ids_of(query_ids, row, valid, HAS_IDS), negative_ids, first, exists, HAS_IDS)
            marked = marked_pairs(query_labels, row, valid, negative_labels, first, exists, L, ALL) & ~excluded
            for level in range(LOSSES):
                here = loss_pairs(marked, query_labels, row, valid, negative_labels, first, exists, level, L, LOSSES)
                here &= marked
                count += tl.where(levels == level, tl.sum(here.to(tl.int32), 1)[:, None], 0)
                if ATTRACT:
                    own_sum += tl.where(levels == level, tl.sum(tl.where(here, s, 0.0), 1)[:, None], 0.0)
                else:
                    kept = tl.where(marked & ~here, s, float("-inf"))
                    before = tl.max(tl.where(levels == level, own_max, float("-inf")), 1)
                    raised = tl.maximum(before, tl.max(kept, 1))
                    reference = tl.where(raised == float("-inf"), 0.0, raised)
                    added = tl.sum(tl.exp2((kept - reference[:, None]) * scale), 1)
                    joined = own_sum * tl.exp2((before - reference) * scale)[:, None] + added[:, None]
                    own_sum = tl.where(levels == level, joined, own_sum)
                    own_max = tl.where(levels == level, raised[:, None], own_max)
    at = (split.to(tl.int64) * B + rows)[:, None] * LOSSES + levels
    real = valid[:, None] & (levels < LOSSES)
    tl.store(level_max + at, own_max, mask=real)
    tl.store(level_sum + at, own_sum, mask=real)
    tl.store(level_count + at, count, mask=real)


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
    loss, log_normalizer, counts, positive_weight, split_factor, B, splits, scale,
    D: tl.constexpr, LOSSES: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, ATTRACT: tl.constexpr, FLAGS: tl.constexpr,
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
    for level in range(LOSSES):
        at_level = at * LOSSES + level
        M, rest = tl.maximum(dense_max, s_positive), total
        count = tl.zeros((ROWS,), tl.int32)
        if FLAGS:
            count = add_up(level_count, at_level, valid, stride * LOSSES, splits, SPLITS, tl.int32)
        if FLAGS and not ATTRACT:
            own_max, own = join_splits(level_max, level_sum, at_level, valid, stride * LOSSES, splits, scale, SPLITS)
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
        if ATTRACT:
            n = count.to(tl.float64)
            attracted = add_up(level_sum, at_level, valid, stride * LOSSES, splits, SPLITS, tl.float64) * scale
            losses -= (attracted - n * s_positive) * LN2 / (1.0 + n)
            weight += n / (1.0 + n)
        tl.store(log_normalizer + at_level, M * LN2 + log_Z, mask=valid)
        tl.store(counts + at_level, count, mask=valid)
    tl.store(loss + rows, losses / LOSSES, mask=valid)
    tl.store(positive_weight + rows, weight / LOSSES, mask=valid)
    of_row = (factor / LOSSES).to(tl.float32)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = (split < splits)[:, None] & valid[None, :]
        place = split[:, None] * stride + at[None, :]
        m = tl.load(split_max + place, mask=inside, other=float("-inf"))
        tl.store(split_factor + place, tl.exp2((m - reference[None, :]) * scale) * of_row[None, :], mask=inside)


@triton.jit
def marked_weights(
    s, marked, query_labels, negative_labels, log_normalizer, counts, row, valid, key, exists,
    L: tl.constexpr, LOSSES: tl.constexpr, ATTRACT: tl.constexpr, PULL_ALONE: tl.constexpr,
):  # fmt: skip
    """d loss / d s of the marked keys, those in F_l for some l, level by level: mean_l [k not in F_l] e^{s - lse_l}, or
    in attraction e^{s - lse} - mean_l [k in F_l] / (1 + |F_l|), of which `PULL_ALONE` leaves the second term. Rounded,
    a large lse may be below s: no exponential is more than 1."""
    weights = tl.zeros(s.shape, tl.float32)
    for level in range(LOSSES):
        here = loss_pairs(marked, query_labels, row, valid, negative_labels, key, exists, level, L, LOSSES)
        if not PULL_ALONE:
            lse = load_column(log_normalizer, row, valid, level, LOSSES, 0.0) * LOG2E
            if ATTRACT:
                weights += tl.exp2(tl.minimum(s - lse[:, None], 0.0))
            else:
                weights += tl.exp2(tl.where(here, float("-inf"), tl.minimum(s - lse[:, None], 0.0)))
        if ATTRACT:
            pull = 1.0 / (1.0 + load_column(counts, row, valid, level, LOSSES, 0))
            weights -= tl.where(here, pull[:, None], 0.0)
    return weights / LOSSES


@triton.jit(do_not_specialize=["B", "K", "split_keys", "tiles"])
def marked_grad_kernel(
    query, negatives, query_labels, negative_labels, query_ids, negative_ids,
    split_grad, split_factor, log_normalizer, counts, flags, B, K, split_keys, tiles, scale,
    D: tl.constexpr, L: tl.constexpr, LOSSES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    FLAG_KEYS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SHIFT: tl.constexpr, ATTRACT: tl.constexpr,
    ALL: tl.constexpr, HAS_IDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program, as in `pass_kernel`; split_grad becomes split_factor * split_grad + the marked keys' part."""
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    split, chunk = tl.program_id(1), tl.program_id(2)
    valid = rows < B
    end = tl.minimum(K, (split + 1) * split_keys)
    own = ids_of(query_ids, row, valid, HAS_IDS)
    grad = tl.zeros((ROWS, CHUNK), tl.float32)
    for first in range(split * split_keys, end, KEYS):
        if tl.load(flags + tl.program_id(0).to(tl.int64) * tiles + first // FLAG_KEYS) != 0:
            exists = first + tl.arange(0, KEYS) < end
            s = tl.zeros((ROWS, KEYS), tl.float32)
            if not ATTRACT:  # there the softmax of all keys is in the dense pass
                s = similarities(query, row, valid, negatives, first, exists, D, CHUNK, CHUNKS, PRECISION) * scale
            excluded = excluded_pairs(own, negative_ids, first, exists, HAS_IDS)
            marked = marked_pairs(query_labels, row, valid, negative_labels, first, exists, L, ALL) & ~excluded
            weights = marked_weights(
                s, marked, query_labels, negative_labels, log_normalizer, counts, row, valid, first, exists,
                L, LOSSES, ATTRACT, ATTRACT,
            )  # fmt: skip
            weights = tl.where(marked, weights, 0.0) * (1 << SHIFT)
            n = load_rows(negatives, first, exists, chunk, D, CHUNK)
            grad = tl.dot(weights.to(n.dtype), n, grad, input_precision=PRECISION)
    at = split.to(tl.int64) * B + rows
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    place = split_grad + at[:, None] * D + columns[None, :]
    inside = valid[:, None] & (columns < D)[None, :]
    factor = tl.load(split_factor + at, mask=valid, other=0.0)
    dense = tl.load(place, mask=inside, other=0.0) * factor[:, None]
    tl.store(place, dense + grad * (1.0 / (1 << SHIFT)), mask=inside)


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


@triton.jit(do_not_specialize=["B", "K"])
def negatives_grad_kernel(
    loss_grad, largest_loss_grad, query, negatives, query_labels, negative_labels, query_ids, negative_ids,
    log_normalizer, counts, negatives_grad, B, K, scale, inverse_temperature,
    D: tl.constexpr, L: tl.constexpr, LOSSES: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SHIFT: tl.constexpr,
    ATTRACT: tl.constexpr, ALL: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: KEYS negatives against all queries, one chunk of the gradient's columns.

    d_k = sum_i g_i (d loss_i / d s_ik) q_i / tau. For a key in no F_l the mean over levels is one exponential:
    mean_l e^{s - lse_l} = e^{s - a} mean_l e^{a - lse_l}, a = min_l lse_l >= s up to rounding, as in `marked_weights`.
    """
    key, chunk = tl.program_id(0) * KEYS, tl.program_id(1)
    exists = key + tl.arange(0, KEYS) < K
    largest = tl.maximum(tl.load(largest_loss_grad), SMALLEST_LOSS_GRAD)
    unit = (1 << SHIFT) / largest
    levels = tl.arange(0, PADDED)[None, :]
    grad = tl.zeros((KEYS, CHUNK), tl.float32)
    for row in range(0, B, ROWS):
        valid = row + tl.arange(0, ROWS) < B
        at = tl.arange(0, ROWS)[:, None] * LOSSES + levels
        inside = valid[:, None] & (levels < LOSSES)
        lse = tl.load(log_normalizer + tl.cast(row, tl.int64) * LOSSES + at, mask=inside, other=float("inf"))
        least = tl.where(valid, tl.min(lse, 1), 0.0)
        mean = tl.sum(tl.exp2((least[:, None] - lse) * LOG2E), 1) / LOSSES
        s = similarities(query, row, valid, negatives, key, exists, D, CHUNK, CHUNKS, PRECISION) * scale
        own = ids_of(query_ids, row, valid, HAS_IDS)
        s = tl.where(excluded_pairs(own, negative_ids, key, exists, HAS_IDS), float("-inf"), s)
        weights = tl.exp2(tl.minimum(s - (least * LOG2E)[:, None], 0.0)) * mean[:, None]
        if HAS_LABELS:
            y = labels_of(query_labels, row, valid, L)
            marked = marked_pairs_held(y, query_labels, row, valid, negative_labels, key, exists, L, ALL)
            marked &= s > float("-inf")
            if tl.max(tl.where(marked, s, float("-inf"))) > float("-inf"):
                exact = marked_weights(
                    s, marked, query_labels, negative_labels, log_normalizer, counts, row, valid, key, exists,
                    L, LOSSES, ATTRACT, False,
                )  # fmt: skip
                weights = tl.where(marked, exact, weights)
        weights *= (load_column(loss_grad, row, valid, 0, 1, 0.0) * unit)[:, None]
        q = load_rows(query, row, valid, chunk, D, CHUNK)
        grad = tl.dot(tl.trans(weights.to(q.dtype)), q, grad, input_precision=PRECISION)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    at = tl.arange(0, KEYS)[:, None] * D + columns[None, :]
    grad = grad * (largest * (1.0 / (1 << SHIFT))) * inverse_temperature
    place = negatives_grad + tl.cast(key, tl.int64) * D + at
    tl.store(place, grad, mask=exists[:, None] & (columns < D)[None, :])


class Plan(NamedTuple):
    """How one call is cut up."""

    splits: int
    split_keys: int  # a multiple of the tile's keys
    tiles: int  # of keys


def plan_of(B: int, K: int, tile: Tile, chunks: int, multiprocessors: int) -> Plan:
    """Splits of the queue so that even one block of queries fills the card."""
    tiles = max(1, triton.cdiv(K, tile.columns))
    programs = triton.cdiv(B, tile.rows) * chunks
    splits = min(tiles, triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, programs))
    split_tiles = triton.cdiv(tiles, splits)
    return Plan(triton.cdiv(tiles, split_tiles), split_tiles * tile.columns, tiles)


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
    """loss (B,), query_grad (B, D) or (0, D), positive_weight (B,), log_normalizer and counts (B, losses); counts
    are 0 where they aren't needed: one loss that eliminates."""
    query, positive, negatives = query.contiguous(), positive.contiguous(), negatives.contiguous()
    extra = [None if t is None else t.contiguous() for t in labels_and_ids]
    (B, D), K, L = query.shape, len(negatives), 1 if extra[0] is None else extra[0].shape[1]
    losses = L if level_combination == "mean" else 1
    has_labels, has_ids = extra[0] is not None and false_negatives != "keep", extra[2] is not None
    attract = false_negatives == "attract"
    flagged = has_labels and (attract or losses > 1)  # are visited again
    chunk, chunks = chunk_of(D)
    tile = tile_of("info_nce", query.dtype, capability_of(query.device), L)
    splits, split_keys, tiles = plan_of(B, K, tile, chunks, multiprocessors(query.device))

    def floats(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    split_max, split_sum, split_factor = floats(splits, B), floats(splits, B), floats(splits, B)
    split_grad = floats(splits if with_grad else 0, B, D)
    level_splits = splits if flagged else 0
    level_max, level_sum = floats(level_splits, B, losses), floats(level_splits, B, losses)
    level_count = query.new_empty((level_splits, B, losses), dtype=torch.int32)
    blocks = triton.cdiv(B, tile.rows)
    flags = query.new_empty((blocks, tiles if flagged else 0), dtype=torch.int8)
    loss, positive_weight, log_normalizer = floats(B), floats(B), floats(B, losses)
    query_grad = floats(B if with_grad else 0, D)
    counts = query.new_empty((B, losses), dtype=torch.int32)

    scale = LOG2E.value / temperature
    inputs = (query, negatives, *[loss if t is None else t for t in extra])  # the loss is never read
    cut = (B, K, split_keys, tiles, scale)
    shape = {"D": D, "CHUNK": chunk, "CHUNKS": chunks, "ATTRACT": attract}
    of_losses = {"LOSSES": losses, "PADDED": triton.next_power_of_2(losses)}
    products = {
        "ROWS": tile.rows, "KEYS": tile.columns, "L": L, "ALL": level_combination == "all", "HAS_IDS": has_ids,
        "PRECISION": "ieee", "num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers,
    }  # fmt: skip
    of_marked = {**products, "KEYS": tile.marked, "FLAG_KEYS": tile.columns}
    shift = shift_of(query.dtype)
    pass_kernel[blocks, splits, chunks if with_grad else 1](
        *inputs, split_max, split_sum, split_grad, flags, *cut,
        SHIFT=shift, WITH_GRAD=with_grad, HAS_LABELS=has_labels, FLAGS=flagged, **shape,
        **{**products, "maxnreg": tile.of_pass.registers},
    )  # fmt: skip
    if flagged:
        marked_sums_kernel[blocks, splits](
            *inputs, level_max, level_sum, level_count, flags, *cut, **of_losses, **shape, **of_marked
        )
    joined = ROWS_BY_SPLITS
    normalise_kernel[(triton.cdiv(B, joined.rows),)](
        query, positive, split_max, split_sum, level_max, level_sum, level_count,
        loss, log_normalizer, counts, positive_weight, split_factor, B, splits, scale,
        LOSSES=losses, ROWS=joined.rows, SPLITS=joined.columns, FLAGS=flagged, num_warps=joined.warps,
        maxnreg=joined.registers, **shape,
    )  # fmt: skip
    if with_grad:
        if flagged:
            marked_grad_kernel[blocks, splits, chunks](
                *inputs, split_grad, split_factor, log_normalizer, counts, flags, *cut,
                SHIFT=shift, LOSSES=losses, **shape, **of_marked,
            )  # fmt: skip
        joined = NUMBERS_BY_SPLITS
        add_splits_kernel[(triton.cdiv(B * D, joined.rows),)](
            positive, positive_weight, split_grad, split_factor, query_grad, B, splits, 1.0 / temperature,
            D=D, NUMBERS=joined.rows, SPLITS=joined.columns, SCALED=flagged, num_warps=joined.warps,
        )  # fmt: skip
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
    (B, D), K, L = query.shape, len(negatives), 1 if extra[0] is None else extra[0].shape[1]
    losses = log_normalizer.shape[1]
    negatives_grad = query.new_empty((K, D), dtype=torch.float32)
    if K == 0:
        return negatives_grad
    tile, (chunk, chunks) = tile_of("info_nce", query.dtype, capability_of(query.device), L), chunk_of(D)
    negatives_grad_kernel[(triton.cdiv(K, tile.negatives), chunks)](
        loss_grad, loss_grad.abs().amax(), query, negatives, *[loss_grad if t is None else t for t in extra],
        log_normalizer, counts, negatives_grad, B, K, LOG2E.value / temperature, 1.0 / temperature,
        D=D, L=L, LOSSES=losses, PADDED=triton.next_power_of_2(losses), ROWS=tile.rows, KEYS=tile.negatives,
        CHUNK=chunk, CHUNKS=chunks, SHIFT=shift_of(query.dtype), ATTRACT=false_negatives == "attract",
        ALL=level_combination == "all",
        HAS_LABELS=extra[0] is not None and false_negatives != "keep", HAS_IDS=extra[2] is not None,
        PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return negatives_grad


def shift_of(dtype: torch.dtype) -> int:
    return FLOAT16_SHIFT if dtype == torch.float16 else 0
