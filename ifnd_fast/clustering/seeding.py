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


def random_centroids(
    x: Tensor, n_clusters: int, generator: torch.Generator, shards: Shards, weights: Tensor | None = None
) -> Tensor:
    """Centroids (C, D) float32 to start from: distinct rows of x, each as likely as it is often and heavy.

    Raises:
        ValueError: x has fewer distinct rows than clusters.
    """
    pool, weight = _distinct_sample(x, n_clusters, generator, shards, weights)
    return pool[_draw(weight, n_clusters, generator)]


def initial_centroids(
    x: Tensor, n_clusters: int, generator: torch.Generator, shards: Shards, weights: Tensor | None = None
) -> Tensor:
    """Centroids (C, D) float32 to start from: distinct rows of x, drawn as k-means++ draws them.

    k-means++ (Arthur and Vassilvitskii, 2007) draws each centroid with probability proportional to D^2, the
    squared distance to the nearest one so far. Two economies make that affordable: it draws from a sample of
    max(INIT_SAMPLE, INIT_ROWS_PER_CLUSTER * C) rows (of many clusters, from an 8th of all rows), and in rounds:
    one centroid a round up to the 32nd, later a 16th of those there are, without replacement. All rounds
    together compare each row of the sample with each of the C centroids once. Ranks all draw the same, from the
    whole sample. With weights (N,) float32, all above 0, the probability is proportional to them too.

    Raises:
        ValueError: x has fewer distinct rows than clusters.
    """
    pool, weight = _distinct_sample(x, n_clusters, generator, shards, weights)
    squared = torch.ones(len(pool), dtype=torch.float32, device=x.device)  # the first is drawn by weight alone
    chosen = torch.zeros(len(pool), dtype=torch.bool, device=x.device)
    only = torch.zeros(len(pool), dtype=torch.int32, device=x.device)  # the label where there is one centroid
    buffer = chunk_buffer(pool)
    count, picks = 0, []
    while count < n_clusters:
        batch = min(max(1, count // INIT_GROWTH), n_clusters - count)
        # The floor keeps distinct rows eligible whose squared distance has underflowed.
        pick = _draw((weight * squared.double()).clamp_min(1e-300).masked_fill(chosen, 0), batch, generator)
        labels = assign(pool, pool[pick]) if batch > 1 else only
        nearest = squared_distances(pool, labels, pool[pick], buffer)
        squared = nearest if count == 0 else torch.minimum(squared, nearest)
        chosen[pick] = True
        picks.append(pick)
        count += batch
    return pool[torch.cat(picks)]


def _draw(weight: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Indices of n draws without replacement, with probabilities proportional to weight (N,) float64."""
    # Exponential races won by log-weights (Gumbel top-k).
    race = torch.empty(len(weight), dtype=torch.float64, device=generator.device).exponential_(generator=generator)
    return (weight.log() - race.to(weight.device).log()).topk(n).indices


def _distinct_sample(
    x: Tensor, n_clusters: int, generator: torch.Generator, shards: Shards, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """At least C distinct rows of a sample of x, in float32, and how often each occurs there or its weight, float64."""
    most = max(shards.total // INIT_SHARE, INIT_LEAST_PER_CLUSTER * n_clusters)
    size = max(INIT_SAMPLE, min(INIT_ROWS_PER_CLUSTER * n_clusters, most))
    sample = x
    if size < shards.total:
        index = torch.randperm(shards.total, dtype=torch.int64, generator=generator, device=generator.device)
        index = index[:size] - shards.first
        index = index[(index >= 0) & (index < len(x))].to(x.device)
        sample, weights = x[index], None if weights is None else weights[index]
    gathered = None if weights is None else shards.gather(weights)
    pool, counts = distinct(shards.gather(sample).float(), gathered)
    if len(pool) < n_clusters:  # the sample is full of duplicates: look through every row
        pool = distinct_rows(x, size, shards)
        counts = torch.ones(len(pool), dtype=torch.int64, device=x.device)
        if len(pool) < n_clusters:
            raise TooFewDistinct(len(pool), n_clusters)
    return pool, counts.double()
