"""Lloyd's algorithm: nearest centroids kept up as centroids move, means, empty clusters refilled."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ifnd_fast.clustering.distinct import TooFewDistinct, distinct_rows, first_occurrences
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.ops import backends
from ifnd_fast.ops.assign_clusters import assign_clusters, is_far
from ifnd_fast.ops.chunks import chunk_rows, chunks
from ifnd_fast.ops.cluster_sums import cluster_sums, squared_distances

Callback = Callable[[int, float], object]
FEW_MOVED = 0.5  # of the centroids: then rows whose own stood still are compared with those that moved alone
MANY_UNDECIDED = 0.5  # of the rows: then bounds cost more than they save


class KMeansRun(NamedTuple):
    """What one run found: centroids (C, D) float32, labels (N,) int32, and the iterations it took."""

    centroids: Tensor
    labels: Tensor
    n_iter: int


def lloyd(
    x: Tensor,
    centroids: Tensor,
    shards: Shards,
    max_iter: int,
    tol: float = 0.0,
    spherical: bool = False,
    callback: Callback | None = None,
    weights: Tensor | None = None,
) -> KMeansRun:
    """Lloyd's algorithm from the given centroids; the labels are those of the centroids returned.

    Means and inertia are weighted by weights (N,) float32, all above 0, where there are any. Clusters settle long
    before the last one does: `Nearest` finds the labels by what has moved.
    """
    nearest, distances = Nearest(x), None
    previous_labels, previous_inertia = None, torch.inf
    for iteration in range(1, max_iter + 1):
        labels = nearest.update(centroids, distances)
        sums, counts, distances = cluster_sums(x, labels, centroids, weights)
        sums, counts, inertia = add_ranks(sums, counts, weighted_sum(distances, weights), shards)
        if callback is not None:
            callback(iteration, inertia)
        # The previous centroids came from these very labels (and refills, which change labels).
        same = previous_labels is not None and torch.equal(labels, previous_labels)
        if shards.every(same, x.device):
            return KMeansRun(centroids, labels, iteration)
        centroids = repair(x, distances, mean_centroids(sums, counts, centroids, spherical), counts, shards)
        if tol > 0 and previous_inertia - inertia <= tol * previous_inertia < torch.inf:
            break
        previous_labels, previous_inertia = labels, inertia
    return KMeansRun(centroids, nearest.update(centroids, distances), iteration)


class Nearest:
    """Each row's nearest centroid, the labels of `assign` to the bit, kept up as centroids move.

    Where a kernel reassigns (float32 on the CPU), it keeps for every row less than its distance to all centroids but
    its own. That shrinks by no more than centroids move, so that most rows are soon compared with the few that move
    far alone. Elsewhere rows of centroids that stood still are compared with those that moved: see
    `reassign_by_movement`.
    """

    def __init__(self, x: Tensor):
        self.x = x
        self.labels = torch.empty(0, dtype=torch.int32, device=x.device)
        self.centroids: Tensor | None = None
        assigns, reassigns = (
            backends.choose("auto", operator, x.device, x.dtype, x.shape[1])
            for operator in ("assign_clusters", "reassign")
        )
        self.bounds: Tensor | None = None
        if assigns == reassigns != "reference":  # to the same bits
            self.reassign_by_bounds = backends.module_of(reassigns, "reassign").reassign_by_bounds
            self.bounds = torch.empty(len(x), dtype=torch.float32, device=x.device)

    def update(self, centroids: Tensor, distances: Tensor | None) -> Tensor:
        """(N,) int32. `distances` (N,): squared, of the rows to their nearest before; None the first time."""
        if not self._updated_by_bounds(centroids):
            if self.centroids is None:
                self.labels = assign(self.x, centroids)
            else:
                moved = (centroids != self.centroids).any(dim=1)
                self.labels = reassign_by_movement(self.x, self.labels, cast(Tensor, distances), centroids, moved)
        self.centroids = centroids
        return self.labels

    def _updated_by_bounds(self, centroids: Tensor) -> bool:
        if self.bounds is None or is_far(centroids):
            self.bounds = None
            return False
        first = self.centroids is None
        labels = self.labels.new_empty(len(self.x)) if first else self.labels.clone()
        undecided = self.reassign_by_bounds(self.x, self.centroids, centroids, labels, self.bounds)
        if undecided < 0 or undecided > MANY_UNDECIDED * len(self.x):
            self.bounds = None
        if undecided >= 0:
            self.labels = labels
        return undecided >= 0


def reassign_by_movement(x: Tensor, labels: Tensor, distances: Tensor, centroids: Tensor, moved: Tensor) -> Tensor:
    """`assign(x, centroids)`, (N,) int32, after some centroids have `moved` (C,), from the rows' nearest before.

    `labels` (N,) and squared `distances` (N,) are of those. A row whose own centroid stood still is nearest to it or
    to one that moved: to no other, as these were no nearer before either. Rows that rounding could decide otherwise
    are compared with all centroids, so that the labels are the same to the bit.
    """
    if x.dtype != torch.float32 or float(moved.float().mean()) >= FEW_MOVED or is_far(centroids):
        return assign(x, centroids)
    movers = moved.nonzero().flatten()
    if len(movers) == 0:
        return labels
    nearest = movers.int()[assign(x, centroids[movers])]
    to_nearest = squared_distances(x, nearest, centroids)
    # |x|, |c| <= |x - c| + max |c|, and a sum of D products is off by at most D eps |x| |c|.
    length = torch.maximum(distances, to_nearest).sqrt_().add_(centroids.norm(dim=1).max())
    rounding = length.square_().mul_(4 * x.shape[1] * torch.finfo(torch.float32).eps)
    unsure = (moved[labels] | ((to_nearest - distances).abs() <= rounding)).nonzero().flatten()
    nearest = torch.where(to_nearest < distances, nearest, labels)
    for part in unsure.split(chunk_rows(x)) if len(unsure) else ():  # of none, split makes one part
        nearest[part] = assign(x[part], centroids)
    return nearest


def weighted_sum(distances: Tensor, weights: Tensor | None) -> Tensor:
    """The inertia, () float64, of squared distances (N,) and weights (N,)."""
    return (distances if weights is None else distances.double() * weights).sum(dtype=torch.float64)


def add_ranks(sums: Tensor, counts: Tensor, inertia: Tensor, shards: Shards) -> tuple[Tensor, Tensor, float]:
    """The sums (C, D) float64, counts (C,) and inertia () float64 of all ranks' rows, in one collective."""
    if not shards.together:
        return sums, counts, float(inertia)
    packed = shards.sum(torch.cat([sums.flatten(), counts.double(), inertia[None]]))
    added, numbers, inertia = packed.split([sums.numel(), len(counts), 1])
    return added.view_as(sums), numbers.to(counts.dtype), float(inertia)


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of every row by Euclidean distance, (N,) int32; ties to the lowest index.

    Half-precision rows are compared with centroids rounded to their dtype, unless those lie so far from the origin
    that the operator takes both relative to a point in their midst, in float32, chunk by chunk.
    """
    if x.dtype == torch.float32 or not is_far(centroids):
        return assign_clusters(x, centroids.to(x.dtype), metric="l2", return_confidence=False)
    labels = torch.empty(len(x), dtype=torch.int32, device=x.device)
    for part in chunks(x):
        labels[part] = assign_clusters(x[part].float(), centroids, metric="l2", return_confidence=False)
    return labels


def centroids_of(x: Tensor, labels: Tensor, n_clusters: int, shards: Shards, spherical: bool = False) -> Tensor:
    """Means (C, D) float32 of the rows that bear each label; of labels no row bears, rows far from their own mean.

    What to start from when rows (N, D) have moved since they got their labels (N,) int32, -1 for none.
    """
    if bool((labels < 0).any()):
        x, labels = x[labels >= 0], labels[labels >= 0]
    nothing = torch.zeros(n_clusters, x.shape[1], dtype=torch.float32, device=x.device)
    sums, counts, distances = cluster_sums(x, labels, nothing)
    sums, counts, _ = add_ranks(sums, counts, distances.sum(dtype=torch.float64), shards)
    centroids = mean_centroids(sums, counts, nothing, spherical)
    return repair(x, squared_distances(x, labels, centroids), centroids, counts, shards)


def mean_centroids(sums: Tensor, counts: Tensor, centroids: Tensor, spherical: bool = False) -> Tensor:
    """Mean of each cluster, (C, D) float32, in spherical mode of unit length; computed in place of `sums`.

    A cluster without points, or whose unit rows cancel out, keeps its centroid.
    """
    kept = counts == 0
    means = sums.div_(counts.masked_fill(kept, 1)[:, None])
    if spherical:
        norms = means.norm(dim=1)
        kept |= norms < SMALLEST_MEAN
        means.div_(norms.clamp_min(SMALLEST_MEAN)[:, None])
    return torch.where(kept[:, None], centroids, means.float())


def repair(x: Tensor, distances: Tensor, centroids: Tensor, counts: Tensor, shards: Shards) -> Tensor:
    """Put the centroid of each empty cluster on a point: the ones farthest from their own centroid.

    `distances` (N,) are the squared ones to the rows' own centroids, `counts` (C,) the clusters' sizes. Distinct
    points, the lowest index first among equals. Where too few differ from their centroid, the rest stay where
    they are.
    """
    empty = (counts == 0).nonzero().flatten()
    if len(empty) == 0:
        return centroids
    distances, order = distances.sort(descending=True, stable=True)
    order = order[distances > 0]
    movable = int(shards.sum(torch.tensor(len(order), dtype=torch.int64, device=x.device)))
    look = len(empty)
    while True:  # look further down the order until enough of the rows are distinct
        rows, far = shards.gather(x[order[:look]]), shards.gather(distances[: min(look, len(order))])
        # The ranks' rows follow one another, so that among equals the stable sort keeps the lowest index first.
        rows = rows[far.sort(descending=True, stable=True).indices[:look]].float()
        first = first_occurrences(rows)[0]
        if len(first) >= len(empty) or look >= movable:
            break
        look *= 4
    chosen = rows[first[: len(empty)]]
    return centroids.index_copy(0, empty[: len(chosen)], chosen)


def fill(x: Tensor, run: KMeansRun, shards: Shards) -> KMeansRun:
    """The run with its last empty clusters filled, other centroids unmoved.

    A centroid on a point keeps that point, so C rounds are enough; more than one or two are rare.

    Raises:
        ValueError: x has fewer distinct rows than clusters.
    """
    centroids, labels, n_iter = run
    for _ in range(len(centroids)):
        counts = shards.sum(torch.bincount(labels, minlength=len(centroids)))
        if bool(counts.all()):
            break
        centroids = repair(x, squared_distances(x, labels, centroids), centroids, counts, shards)
        previous, labels = labels, assign(x, centroids)
        if shards.every(torch.equal(labels, previous), x.device):
            distinct = len(distinct_rows(x, len(centroids), shards))
            if distinct < len(centroids):
                raise TooFewDistinct(distinct, len(centroids))
            break  # rows that differ, but not to the operator
    return KMeansRun(centroids, labels, n_iter)


SMALLEST_MEAN = 1e-12  # of unit rows that is not a sum of rounding
