"""The keys in some F_l, in the flagged tiles alone: each level's sums over them, and their part of the gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from ifnd_fast.kernels.pairs import excluded_pairs, ids_of, loss_pairs, marked_pairs
from ifnd_fast.kernels.products import LOG2E, load_column, load_rows, similarities


@triton.jit(do_not_specialize=["B", "K", "split_keys", "tiles"])
def marked_sums_kernel(
    query, negatives, query_labels, negative_labels, query_ids, negative_ids,
    level_max, level_sum, level_count, flags, B, K, split_keys, tiles, scale,
    D: tl.constexpr, L: tl.constexpr, N_LOSSES: tl.constexpr, PADDED: tl.constexpr,
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
            for level in range(N_LOSSES):
                here = loss_pairs(marked, query_labels, row, valid, negative_labels, first, exists, level, L, N_LOSSES)
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
    at = (split.to(tl.int64) * B + rows)[:, None] * N_LOSSES + levels
    real = valid[:, None] & (levels < N_LOSSES)
    tl.store(level_max + at, own_max, mask=real)
    tl.store(level_sum + at, own_sum, mask=real)
    tl.store(level_count + at, count, mask=real)


@triton.jit
def marked_weights(
    s, marked, query_labels, negative_labels, log_normalizer, false_negative_counts, row, valid, key, exists,
    L: tl.constexpr, N_LOSSES: tl.constexpr, ATTRACT: tl.constexpr, PULL_ALONE: tl.constexpr,
):  # fmt: skip
    """d loss / d s of the marked keys, those in F_l for some l, level by level: mean_l [k not in F_l] e^{s - lse_l}, or
    in attraction e^{s - lse} - mean_l [k in F_l] / (1 + |F_l|), of which `PULL_ALONE` leaves the second term. Rounded,
    a large lse may be below s: no exponential is more than 1."""
    weights = tl.zeros(s.shape, tl.float32)
    for level in range(N_LOSSES):
        here = loss_pairs(marked, query_labels, row, valid, negative_labels, key, exists, level, L, N_LOSSES)
        if not PULL_ALONE:
            lse = load_column(log_normalizer, row, valid, level, N_LOSSES, 0.0) * LOG2E
            if ATTRACT:
                weights += tl.exp2(tl.minimum(s - lse[:, None], 0.0))
            else:
                weights += tl.exp2(tl.where(here, float("-inf"), tl.minimum(s - lse[:, None], 0.0)))
        if ATTRACT:
            pull = 1.0 / (1.0 + load_column(false_negative_counts, row, valid, level, N_LOSSES, 0))
            weights -= tl.where(here, pull[:, None], 0.0)
    return weights / N_LOSSES


@triton.jit(do_not_specialize=["B", "K", "split_keys", "tiles"])
def marked_grad_kernel(
    query, negatives, query_labels, negative_labels, query_ids, negative_ids,
    split_grad, split_factor, log_normalizer, false_negative_counts, flags, B, K, split_keys, tiles, scale,
    D: tl.constexpr, L: tl.constexpr, N_LOSSES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
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
                s, marked, query_labels, negative_labels, log_normalizer, false_negative_counts, row, valid, first,
                exists, L, N_LOSSES, ATTRACT, ATTRACT,
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
