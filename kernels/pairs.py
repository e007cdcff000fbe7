"""Which keys are false negatives of which queries, and which are of their own images."""

from __future__ import annotations

import triton
import triton.language as tl

from ifnd_fast.kernels import tiles
from ifnd_fast.kernels.products import load_column

HELD_LEVELS = tl.constexpr(tiles.HELD_LEVELS)


@triton.jit
def label_of(query_labels, row, valid, level, L: tl.constexpr):
    """The queries' labels at a level, (rows,). None is -2 here and -1 in `key_labels`, so that one comparison for each
    pair says that both are accepted and equal."""
    label = load_column(query_labels, row, valid, level, L, -1)
    return tl.where(label < 0, -2, label)


@triton.jit
def key_labels(negative_labels, key, exists, level, L: tl.constexpr):
    """The keys' labels at a level, (keys,); -1 for none."""
    return tl.maximum(load_column(negative_labels, key, exists, level, L, None), -1)


@triton.jit
def labels_of(query_labels, row, valid, L: tl.constexpr):
    """`label_of` of each level, or of none where they are too many to be held."""
    y = ()
    if L <= HELD_LEVELS:
        for level in tl.static_range(L):
            y = y + (label_of(query_labels, row, valid, level, L),)  # type: ignore[assignment]
    return y


@triton.jit
def ids_of(query_ids, row, valid, HAS_IDS: tl.constexpr):
    """The queries' image numbers (rows,), below every key's where unknown; without them an unused tensor."""
    if HAS_IDS:
        own = load_column(query_ids, row, valid, 0, 1, 0)
        return tl.where(own < 0, -(2**63), own)
    else:
        return valid


@triton.jit
def excluded_pairs(own, negative_ids, key, exists, HAS_IDS: tl.constexpr):
    """(rows, keys): the key is in no sum at any level, as it is of the query's own image or past the last key."""
    excluded = tl.broadcast_to(~exists[None, :], (own.shape[0], exists.shape[0]))
    if HAS_IDS:
        other = load_column(negative_ids, key, exists, 0, 1, None)
        high = tl.maximum((other >> 32).to(tl.int32), -1)  # where negative; by this half alone it takes a quarter
        other = (high.to(tl.int64) << 32) | (other & 0xFFFFFFFF)
        excluded |= own[:, None] == other[None, :]
    return excluded


@triton.jit
def level_pairs(label, negative_labels, key, exists, level, L: tl.constexpr):
    """(rows, keys): the key is in the F_l of the query, whose label at level l this is."""
    return label[:, None] == key_labels(negative_labels, key, exists, level, L)[None, :]


@triton.jit
def marked_pairs(query_labels, row, valid, negative_labels, key, exists, L: tl.constexpr, ALL: tl.constexpr):
    """(rows, keys): the key is in F_l at any level l, or at all levels, or would be if it were not excluded."""
    marked = tl.full((valid.shape[0], exists.shape[0]), ALL, tl.int1)
    for level in range(L):
        label = label_of(query_labels, row, valid, level, L)
        here = level_pairs(label, negative_labels, key, exists, level, L)
        marked = (marked & here) if ALL else (marked | here)
    return marked


@triton.jit
def marked_pairs_held(
    y, query_labels, row, valid, negative_labels, key, exists, L: tl.constexpr, ALL: tl.constexpr
):  # fmt: skip
    """The same by labels that are held, y of `labels_of`, and without a loop: one that holds another is not pipelined.
    Many levels take a loop all the same, else registers run out."""
    if L > HELD_LEVELS:
        return marked_pairs(query_labels, row, valid, negative_labels, key, exists, L, ALL)
    else:
        marked = level_pairs(y[0], negative_labels, key, exists, 0, L)
        for level in tl.static_range(1, L):
            here = level_pairs(y[level], negative_labels, key, exists, level, L)
            marked = (marked & here) if ALL else (marked | here)
        return marked


@triton.jit
def loss_pairs(
    marked, query_labels, row, valid, negative_labels, key, exists, loss, L: tl.constexpr, N_LOSSES: tl.constexpr
):  # fmt: skip
    """(rows, keys): of the marked keys, those in this loss's F: a level's, or the only one's, which holds them all."""
    if N_LOSSES == 1:
        return marked
    else:
        label = label_of(query_labels, row, valid, loss, L)
        return level_pairs(label, negative_labels, key, exists, loss, L)
