"""Where k-means starts: greedy k-means++ on a sample, in rounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ifnd_fast.clustering.distinct import TooFewDistinct, distinct, distinct_rows
from ifnd_fast.clustering.lloyd import assign
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.ops.chunks import chunk_buffer
from ifnd_fast.ops.cluster_sums import squared_distances

INIT_SAMPLE = 8_192  # k-means++ draws from a sample of this many rows, at least,
INIT_PAIRS = 1 << 21  # or of this many for all centroids together,
INIT_MOST = 1 << 16  # but no more for that;
INIT_ROWS_PER_CLUSTER = 8  # or of this many for each centroid, whichever is more,
INIT_SHARE = 8  # but no more than an 8th of the rows, unless that is less than
INIT_LEAST_PER_CLUSTER = 2  # rows for each centroid
INIT_SINGLE = 64  # so many centroids are drawn one after the other;
INIT_GROWTH = 4  # then a round adds a quarter of those there already are,
INIT_ROUND = 1_024  # at most this many


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
    """Centroids (C, D) float32 to start from: distinct rows of x, drawn as greedy k-means++ draws them.

    k-means++ (Arthur and Vassilvitskii, 2007) draws each centroid with probability proportional to D^2, the squared
    distance to the nearest one so far; greedy k-means++ draws several candidates for it (`trials_of`) and takes the
    one that lowers the sum of all D^2 most. Two economies make that affordable. It draws from a sample (see the
    constants above). And only the first INIT_SINGLE centroids are drawn one after the other; then rounds draw the
    candidates of many at once, without replacement, and take the best that don't serve the same rows (`best_apart`):
    the sample is compared with about 1 + trials_of(C) times C rows in all. Ranks all draw the same, from the whole
    sample. With weights (N,) float32, all above 0, rows count by them.

    Raises:
        ValueError: x has fewer distinct rows than clusters.
    """
    pool = _Pool(*_distinct_sample(x, n_clusters, generator, shards, weights))
    count, picks = 0, []
    while count < n_clusters:
        batch = min(count // INIT_GROWTH, INIT_ROUND, n_clusters - count) if count >= INIT_SINGLE else 1
        candidates = min(batch * (trials_of(n_clusters) if count else 1), len(pool.rows) - count)
        drawn = _draw(pool.odds(), candidates, generator)
        if candidates == batch:
            pick = drawn
        else:
            pick = pool.best(drawn) if batch == 1 else pool.best_apart(drawn, batch)
        pool.choose(pick)
        picks.append(pick)
        count += len(pick)
    return pool.rows[torch.cat(picks)]


def trials_of(n_clusters: int) -> int:
    """Candidates for each centroid: as many as scikit-learn's, and 8 at least, where they cost little."""
    return max(8, 2 + int(math.log(n_clusters)))


class _Pool:
    """Distinct rows (n, D) that centroids are chosen from, their weights, and D^2, their squared distances to those."""

    def __init__(self, rows: Tensor, weight: Tensor):
        self.rows, self.weight = rows, weight
        self.squared = torch.ones(len(rows), dtype=torch.float32, device=rows.device)  # drawn by weight alone
        self.chosen = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        self.squared_lengths = torch.linalg.vector_norm(rows, dim=1).square_()
        self.buffer = chunk_buffer(rows)

    def odds(self) -> Tensor:
        """Of each row to be drawn, (n,) float64; the floor keeps those eligible whose D^2 has underflowed."""
        return (self.weight * self.squared.double()).clamp_min(1e-300).masked_fill(self.chosen, 0)

    def best(self, drawn: Tensor) -> Tensor:
        """The one row, (1,), of those drawn that lowers the weighted sum of D^2 most."""
        candidates = self.rows[drawn]
        lowered = torch.addmm((self.squared - self.squared_lengths)[:, None], self.rows, candidates.T, alpha=2)
        lowered = lowered.sub_(self.squared_lengths[drawn]).clamp_min_(0)
        return drawn[(self.weight.float() @ lowered).argmax()][None]

    def best_apart(self, drawn: Tensor, n: int) -> Tensor:
        """Up to n rows of those drawn that lower that sum most, each by the rows to which it is the nearest.

        One that lies nearer to a better one than to the centroids so far is left out: it would serve rows that the
        better one serves. So where few clusters are left to find, rounds are small.
        """
        nearest, distances = self._to_nearest(drawn)
        lowered = self.weight * (self.squared - distances).clamp_min(0)
        lowered = torch.bincount(nearest.cpu(), lowered.cpu(), len(drawn))  # added up there in their order
        best = drawn[lowered.sort(descending=True, stable=True).indices[: 2 * n].to(drawn.device)]
        between = torch.cdist(self.rows[best], self.rows[best]).square_()
        served = (between < self.squared[best, None]).tril_(-1).any(dim=1)
        return best[~served][:n]

    def choose(self, pick: Tensor) -> None:
        distances = self._to_nearest(pick)[1]
        self.squared = torch.minimum(self.squared, distances) if self.chosen.any() else distances
        self.chosen[pick] = True

    def _to_nearest(self, pick: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest of these rows to each row, (n,) int32 from 0, and its squared distance, (n,)."""
        if len(pick) > 1:
            labels = assign(self.rows, self.rows[pick])
        else:
            labels = torch.zeros(len(self.rows), dtype=torch.int32, device=self.rows.device)
        return labels, squared_distances(self.rows, labels, self.rows[pick], self.buffer)


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
    size = max(INIT_SAMPLE, min(INIT_ROWS_PER_CLUSTER * n_clusters, most), min(INIT_PAIRS // n_clusters, INIT_MOST))
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
