"""Rows that differ: which, how many, and where each occurs first."""

from __future__ import annotations

import torch
from torch import Tensor

from ifnd_fast.clustering.shards import Shards
from ifnd_fast.ops.chunks import chunk_rows, chunks


def distinct_rows(x: Tensor, enough: int, shards: Shards) -> Tensor:
    """The distinct rows of x, in float32; the search ends once a rank has `enough`."""
    pool = x[:0].float()
    for part in chunks(x):
        pool = distinct(torch.cat([pool, x[part].float()]))[0]
        if len(pool) >= enough:
            break
    return distinct(shards.gather(pool))[0] if shards.together else pool


def distinct(rows: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The distinct rows (n, D) of rows (N, D), in the order of their first occurrence, and how often each occurs,
    (n,) int64, or its weight, (n,) float64; `rows` itself where all differ."""
    first, counts = first_occurrences(rows, weights)
    return (rows if len(first) == len(rows) else rows[first]), counts


def first_occurrences(rows: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Index of the first of each set of equal float32 rows (N, D), ascending, and the size of the set, (n,) int64, or
    the sum of its weights (N,), (n,) float64.

    Rows are told apart by a hash of 64 bits, as torch.unique of rows takes three times their memory: of a million
    different ones two are taken for the same with a chance of 3e-8.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.empty(rows.shape[1], dtype=torch.int64, device=generator.device)
    factors = factors.random_(-(2**63), 2**63 - 1, generator=generator).to(rows.device) | 1
    hashes = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    for part in chunks(rows, max(1, chunk_rows(rows) // 4)):
        hashes[part] = _hash(rows[part], factors)
    group, counts = torch.unique(hashes, return_inverse=True, return_counts=True)[1:]
    if weights is not None:
        weights = weights.double()[group.argsort(stable=True)]
        counts = torch.segment_reduce(weights, "sum", lengths=counts)
    numbers = torch.arange(len(rows), dtype=torch.int64, device=rows.device)
    first, order = (
        torch.full_like(counts, len(rows), dtype=torch.int64).scatter_reduce(0, group, numbers, "amin").sort()
    )
    return first, counts[order]


def _hash(rows: Tensor, factors: Tensor) -> Tensor:
    words = (rows + 0.0).view(torch.int32) * factors  # -0 is 0
    words ^= words >> 32  # round numbers differ in their upper bits alone
    return words.sum(1)


class TooFewDistinct(ValueError):
    """There are only `distinct` different rows, fewer than clusters."""

    def __init__(self, distinct: int, n_clusters: int) -> None:
        super().__init__(
            f"x has only {distinct} distinct rows, fewer than n_clusters={n_clusters}: "
            f"lower n_clusters to at most {distinct}"
        )
        self.distinct = distinct


STEPS = 2.0**12
"""of 1, to which features are rounded first: copies of an image differ by the rounding of batches of other sizes"""
ROWS = 1 << 14  # at a time


@torch.no_grad()
def count_distinct(rows: Tensor, shards: Shards) -> int:
    """The number of different rows (N, D) of unit length, over all ranks, told apart by a hash of 64 bits.

    Args:
        shards: how all rows are dealt out.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (rows.shape[1],), generator=generator).to(rows.device) | 1
    hashes = [rows.new_empty(0, dtype=torch.int64)]
    for part in rows.split(ROWS):
        hashes.append(((part.float() * STEPS).round().long() * factors).sum(1))
    own = torch.cat(hashes).unique()
    return len(shards.gather(own).unique())
