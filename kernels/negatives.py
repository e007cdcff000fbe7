"""The gradient of the keys, by a pass of its own."""

from __future__ import annotations

import triton
import triton.language as tl

from ifnd_fast.kernels.marked import marked_weights
from ifnd_fast.kernels.pairs import excluded_pairs, ids_of, labels_of, marked_pairs_held
from ifnd_fast.kernels.products import LOG2E, LOG2E_REST, load_column, load_rows, similarities

SMALLEST_LOSS_GRAD = tl.constexpr(2.0**-100)  # of the largest: its inverse is finite


@triton.jit(do_not_specialize=["B", "K", "split_rows"])
def negatives_grad_kernel(
    loss_grad, largest_loss_grad, query, negatives, query_labels, negative_labels, query_ids, negative_ids,
    log_normalizer, false_negative_counts, split_grad, B, K, split_rows, scale, inverse_temperature,
    D: tl.constexpr, L: tl.constexpr, N_LOSSES: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SHIFT: tl.constexpr,
    ATTRACT: tl.constexpr, ALL: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: KEYS negatives against one split of the queries, one chunk of the gradient's columns.

    d_k = sum_i g_i (d loss_i / d s_ik) q_i / tau. For a key in no F_l the mean over levels is one exponential:
    mean_l e^{s - lse_l} = e^{s - a} mean_l e^{a - lse_l}, a = min_l lse_l >= s up to rounding, as in `marked_weights`.
    """
    key, split, chunk = tl.program_id(0) * KEYS, tl.program_id(1), tl.program_id(2)
    exists = key + tl.arange(0, KEYS) < K
    largest = tl.maximum(tl.load(largest_loss_grad), SMALLEST_LOSS_GRAD)
    unit = (1 << SHIFT) / largest
    levels = tl.arange(0, PADDED)[None, :]
    grad = tl.zeros((KEYS, CHUNK), tl.float32)
    for row in range(split * split_rows, tl.minimum(B, (split + 1) * split_rows), ROWS):
        valid = row + tl.arange(0, ROWS) < B
        at = tl.arange(0, ROWS)[:, None] * N_LOSSES + levels
        inside = valid[:, None] & (levels < N_LOSSES)
        lse = tl.load(log_normalizer + tl.cast(row, tl.int64) * N_LOSSES + at, mask=inside, other=float("inf"))
        least = tl.where(valid, tl.min(lse, 1), 0.0)
        mean = tl.sum(tl.exp2((least[:, None] - lse) * LOG2E), 1) / N_LOSSES
        # Of a moderate lse all goes into the factor, else all but an integer: a small logit's exponent is exact then.
        whole = tl.floor(least * LOG2E)
        rest = tl.fma(least, LOG2E_REST, tl.fma(least, LOG2E, -whole))
        moderate = tl.abs(whole) < 32.0
        mean *= tl.exp2(-rest) * tl.where(moderate, tl.exp2(-whole), 1.0)
        shift, most = tl.where(moderate, 0.0, whole), tl.where(moderate, whole + rest, rest)
        s = similarities(query, row, valid, negatives, key, exists, D, CHUNK, CHUNKS, PRECISION) * scale
        own = ids_of(query_ids, row, valid, HAS_IDS)
        s = tl.where(excluded_pairs(own, negative_ids, key, exists, HAS_IDS), float("-inf"), s)
        weights = tl.exp2(tl.minimum(s - shift[:, None], most[:, None])) * mean[:, None]
        if HAS_LABELS:
            y = labels_of(query_labels, row, valid, L)
            marked = marked_pairs_held(y, query_labels, row, valid, negative_labels, key, exists, L, ALL)
            marked &= s > float("-inf")
            if tl.max(tl.where(marked, s, float("-inf"))) > float("-inf"):
                exact = marked_weights(
                    s, marked, query_labels, negative_labels, log_normalizer, false_negative_counts, row, valid, key,
                    exists, L, N_LOSSES, ATTRACT, False,
                )  # fmt: skip
                weights = tl.where(marked, exact, weights)
        weights *= (load_column(loss_grad, row, valid, 0, 1, 0.0) * unit)[:, None]
        q = load_rows(query, row, valid, chunk, D, CHUNK)
        grad = tl.dot(tl.trans(weights.to(q.dtype)), q, grad, input_precision=PRECISION)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    at = tl.arange(0, KEYS)[:, None] * D + columns[None, :]
    grad = grad * (largest * (1.0 / (1 << SHIFT))) * inverse_temperature
    place = split_grad + (split.to(tl.int64) * K + key) * D + at
    tl.store(place, grad, mask=exists[:, None] & (columns < D)[None, :])
