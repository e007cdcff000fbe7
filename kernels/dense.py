"""The dense pass of info_nce: one online softmax over the keys in no F_l, and their sum by its weights."""

from __future__ import annotations

import triton
import triton.language as tl

from ifnd_fast.kernels.pairs import excluded_pairs, ids_of, labels_of, marked_pairs_held
from ifnd_fast.kernels.products import load_parts, similarities


@triton.jit
def pass_tile(
    highest, total, grad, q, own, y, row, valid, query, negatives, query_labels, negative_labels, negative_ids,
    flags, first, end, chunk, tiles, scale,
    D: tl.constexpr, L: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    SHIFT: tl.constexpr, ATTRACT: tl.constexpr, ALL: tl.constexpr, WITH_GRAD: tl.constexpr, HAS_LABELS: tl.constexpr,
    HAS_MARKED_PASS: tl.constexpr, HAS_IDS: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The online softmax of each row with one tile of keys more; in a `WHOLE` tile all keys exist. Queries, keys and
    the gradient are in PARTS of their columns: a product with more columns than rows is shared out to the warps by
    columns, one with no more by rows, and only then does each warp reduce its rows alone."""
    exists = tl.full((KEYS,), True, tl.int1) if WHOLE else first + tl.arange(0, KEYS) < end
    if CHUNKS == 1:
        n = load_parts(negatives, first, exists, 0, D, CHUNK, PARTS)
        s = tl.dot(q[0], tl.trans(n[0]), input_precision=PRECISION)
        for part in tl.static_range(1, PARTS):
            s = tl.dot(q[part], tl.trans(n[part]), s, input_precision=PRECISION)
    else:
        s = similarities(query, row, valid, negatives, first, exists, D, CHUNK, CHUNKS, PRECISION)
        n = load_parts(negatives, first, exists, chunk, D, CHUNK, PARTS)
    excluded = excluded_pairs(own, negative_ids, first, exists, HAS_IDS)
    if HAS_LABELS:
        marked = marked_pairs_held(y, query_labels, row, valid, negative_labels, first, exists, L, ALL)
        kept = tl.where(marked, float("-inf"), s)
        if HAS_MARKED_PASS:
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
    weights = weights.to(n[0].dtype)
    added = ()
    for part in tl.static_range(PARTS if WITH_GRAD else 0):
        g = tl.dot(weights, n[part], grad[part] * rescale[:, None], input_precision=PRECISION)
        added = added + (g,)  # type: ignore[assignment]
    return raised, total, added


@triton.jit(do_not_specialize=["B", "K", "split_keys", "tiles"])
def pass_kernel(
    query, negatives, query_labels, negative_labels, query_ids, negative_ids,
    split_max, split_sum, split_grad, flags, B, K, split_keys, tiles, scale,
    D: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, SHIFT: tl.constexpr, ATTRACT: tl.constexpr, ALL: tl.constexpr, WITH_GRAD: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_MARKED_PASS: tl.constexpr, HAS_IDS: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries, one split of the keys, one chunk of the gradient's columns."""
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    split, chunk = tl.program_id(1), tl.program_id(2)
    valid = rows < B
    begin = split * split_keys
    end = tl.minimum(K, begin + split_keys)
    q = load_parts(query, row, valid, 0, D, CHUNK, PARTS)
    own, y = ids_of(query_ids, row, valid, HAS_IDS), labels_of(query_labels, row, valid, L if HAS_LABELS else 0)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    grad = ()
    for _ in tl.static_range(PARTS if WITH_GRAD else 0):
        grad = grad + (tl.zeros((ROWS, CHUNK // PARTS), tl.float32),)  # type: ignore[assignment]
    whole = begin + (end - begin) // KEYS * KEYS
    for first in range(begin, whole, KEYS):
        highest, total, grad = pass_tile(
            highest, total, grad, q, own, y, row, valid, query, negatives, query_labels, negative_labels, negative_ids,
            flags, first, end, chunk, tiles, scale,
            D, L, KEYS, CHUNK, CHUNKS, SHIFT, ATTRACT, ALL, WITH_GRAD, HAS_LABELS, HAS_MARKED_PASS, HAS_IDS, PRECISION,
            PARTS, True,
        )  # fmt: skip
    for first in tl.range(whole, end, KEYS, num_stages=1):  # one turn at most; as a branch it would spill registers
        highest, total, grad = pass_tile(
            highest, total, grad, q, own, y, row, valid, query, negatives, query_labels, negative_labels, negative_ids,
            flags, first, end, chunk, tiles, scale,
            D, L, KEYS, CHUNK, CHUNKS, SHIFT, ATTRACT, ALL, WITH_GRAD, HAS_LABELS, HAS_MARKED_PASS, HAS_IDS, PRECISION,
            PARTS, False,
        )  # fmt: skip

    at = split.to(tl.int64) * B + rows  # the maximum without the scale, the sum relative to it
    if chunk == 0:
        tl.store(split_max + at, highest, mask=valid)
        tl.store(split_sum + at, total * (1.0 / (1 << SHIFT)), mask=valid)
    for part in tl.static_range(PARTS if WITH_GRAD else 0):
        columns = (chunk * PARTS + part) * (CHUNK // PARTS) + tl.arange(0, CHUNK // PARTS)
        place = split_grad + at[:, None] * D + columns[None, :]
        tl.store(place, grad[part] * (1.0 / (1 << SHIFT)), mask=valid[:, None] & (columns < D)[None, :])
