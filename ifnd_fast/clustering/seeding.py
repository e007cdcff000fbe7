"""Where k-means starts: k-means++ on a sample, in rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from ifnd_fast.clustering.distinct import TooFewDistinct, distinct, distinct_rows
from ifnd_fast.clustering.lloyd import assign
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.ops.chunks import chunk_buffer
from ifnd_fast.ops.cluster_sums import squared_distances

INIT_SAMPLE = 8_192  # k-means++ draws from a sample of this many rows,
INIT_ROWS_PER_CLUSTER = 8  # or of this many for each centroid, whichever is more,
INIT_SHARE = 8  # but no more than an 8th of the rows, unless that is less than
INIT_LEAST_PER_CLUSTER = 2  # rows for each centroid
INIT_GROWTH = 16  # a round of k-means++ adds a 16th of the centroids there already are


def initial_centroids(x: Tensor, n_clusters: int, generator: torch.Generator, shards: Shards) -> Tensor:
    """Centroids (C, D) float32 to start from: distinct rows of x, drawn as k-means++ draws them.

    k-means++ (Arthur and Vassilvitskii, 2007) draws each centroid with probability proportional to D^2, the
    squared distance to the nearest one so far. Two economies make that affordable: it draws from a sample of
    max(INIT_SAMPLE, INIT_ROWS_PER_CLUSTER * C) rows (of many clusters, from an 8th of all rows), and in rounds:
    one centroid a round up to the 32nd, later a 16th of those there are, without replacement. All rounds
    together compare each row of the sample with each of the C centroids once. Ranks all draw the same, from the
    whole sample.

    Raises:
        ValueError: x has fewer distinct rows than clusters.
    """
    pool, weights = _distinct_sample(x, n_clusters, generator, shards)
    squared = torch.ones(len(pool), dtype=torch.float32, device=x.device)  # the first is drawn by weight alone
    chosen = torch.zeros(len(pool), dtype=torch.bool, device=x.device)
    only = torch.zeros(len(pool), dtype=torch.int32, device=x.device)  # the label where there is one centroid
    buffer = chunk_buffer(pool)
    count, picks = 0, []
    while count < n_clusters:
        batch = min(max(1, count // INIT_GROWTH), n_clusters - count)
        # Exponential races won by log-weights (Gumbel top-k): `batch` draws without replacement. The floor
        # keeps distinct rows eligible whose squared distance has underflowed.
        race = torch.empty(len(pool), dtype=torch.float64, device=generator.device)
        race = race.exponential_(generator=generator).to(x.device)
        log_weight = (weights * squared.double()).clamp_min(1e-300).log().masked_fill(chosen, -torch.inf)
        pick = (log_weight - race.log()).topk(batch).indices
        labels = assign(pool, pool[pick]) if batch > 1 else only
        nearest = squared_distances(pool, labels, pool[pick], buffer)
        squared = nearest if count == 0 else torch.minimum(squared, nearest)
        chosen[pick] = True
        picks.append(pick)
        count += batch
    return pool[torch.cat(picks)]


def _distinct_sample(x: Tensor, n_clusters: int, generator: torch.Generator, shards: Shards) -> tuple[Tensor, Tensor]:
    """At least C distinct rows of a sample of x, in float32, and how often each occurs there, float64."""
    most = max(shards.total // INIT_SHARE, INIT_LEAST_PER_CLUSTER * n_clusters)
    size = max(INIT_SAMPLE, min(INIT_ROWS_PER_CLUSTER * n_clusters, most))
    sample = x
    if size < shards.total:
        index = torch.randperm(shards.total, dtype=torch.int64, generator=generator, device=generator.device)
        index = index[:size] - shards.first
        sample = x[index[(index >= 0) & (index < len(x))].to(x.device)]
    pool, counts = distinct(shards.gather(sample).float())
    if len(pool) < n_clusters:  # the sample is full of duplicates: look through every row
        pool = distinct_rows(x, size, shards)
        counts = torch.ones(len(pool), dtype=torch.int64, device=x.device)
        if len(pool) < n_clusters:
            raise TooFewDistinct(len(pool), n_clusters)
    return pool, counts.double()
