"""k-means on the fused nearest-centroid operator (Lloyd's algorithm), or by faiss.

Nothing here is ever of size N x C, and temporaries of N x D are made a chunk at a time. The steps are
functions of their own: initial_centroids, assign, cluster_sums, update, repair; lloyd is their loop.
Ranks may share the rows (`distributed.Shards`): each assigns and adds up its own, and the sums are added.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ifnd_fast.ops import assign_clusters, backends, checks, cpu
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.distributed import Shards

Callback = Callable[[int, float], object]

ENGINES = ("auto", "fused", "faiss")
CHUNK_ELEMENTS = 1 << 18  # of a float32 temporary on the CPU: 1 MiB, of a core's own cache;
GPU_CHUNK_ELEMENTS = 1 << 26  # on a GPU: 256 MiB, worth the launches
SIMILARITY_ELEMENTS = 1 << 26  # at most, where only the reference operator runs: it makes (rows, C) tensors
BAG_ROWS = 256  # rows added up in float32 before float64 takes over
INIT_SAMPLE = 8_192  # k-means++ draws from a sample of this many rows,
INIT_ROWS_PER_CLUSTER = 8  # or of this many for each centroid, whichever is more,
INIT_SHARE = 8  # but no more than an 8th of the rows, unless that is less than
INIT_LEAST_PER_CLUSTER = 2  # rows for each centroid
INIT_GROWTH = 16  # a round of k-means++ adds a 16th of the centroids there already are
FEW_MOVED = 0.5  # of the centroids: then rows whose own stood still are compared with those that moved alone
MANY_UNDECIDED = 0.5  # of the rows: then bounds cost more than they save
SHIFT_RATIO = 1e3  # centroids this far from the origin (squared, in squared spreads) are centred to assign
LARGEST_NORM = 1e18  # squares stay finite in float32,
SMALLEST_NORM = 1e-12  # and squared differences stay above its smallest normal number


class Clustering(NamedTuple):
    """What one run found: centroids (C, D) float32, labels (N,) int32, and the iterations it took."""

    centroids: Tensor
    labels: Tensor
    n_iter: int


class KMeans:
    """k-means clustering, by scikit-learn's conventions.

    Minimises the inertia  sum_i |x_i - c_{y(i)}|^2  over centroids c and labels y by Lloyd's algorithm.
    Every cluster of the result has at least one point, as long as float32 can tell the points apart.

    Args:
        n_clusters: C, the number of centroids.
        max_iter: most Lloyd iterations of a run; it ends earlier once no label changes.
        n_init: runs from different initial centroids; the one of least inertia is kept.
        tol: also end a run once an iteration lowers the inertia by no more than this fraction of it
            (not scikit-learn's tol, which is about how far centroids move). 0: only when no label changes.
        seed: of the generator that every random number comes from.
        spherical: cluster directions: rows are scaled to unit length (in a copy, unless they have it) and
            so are the centroids after every iteration.
        engine: "fused", Lloyd on `ifnd_fast.assign_clusters`; "faiss", faiss.Kmeans on all points, on the
            GPUs that faiss sees, which knows no `tol`; "auto": see `pick_engine`. Both start from the same
            centroids, and the same function gives the final labels and inertia.
        device: where to compute; None is where x is.
        distributed: the rows given to `fit` are this rank's share of all rows, under torch.distributed; every rank
            has to call it, with at least one row. Shares join in rank order. Each rank assigns its own rows and
            float64 sums are added over the ranks, so that the result depends on the number of ranks by rounding
            alone. engine="faiss" brings all rows to every rank and computes on rank 0.

    Attributes:
        cluster_centers_: (C, D) float32 centroids.
        labels_: (N,) int32, the nearest centroid of each row given (the lowest index among equals).
        inertia_: of all rows, sum of squared distances to the labelled centroids (in spherical mode, of unit rows).
        n_iter_: iterations of the run that was kept.

    Half-precision rows are compared with centroids rounded to their dtype; sums, centroids and inertia are
    float32 or better. Same bits for the same input on one device and thread count.

    Example:
        >>> x = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> KMeans(2).fit(x).cluster_centers_.flatten().sort().values
        tensor([0.0500, 5.0500])
    """

    cluster_centers_: Tensor
    labels_: Tensor
    inertia_: float
    n_iter_: int

    def __init__(
        self,
        n_clusters: int,
        *,
        max_iter: int = 20,
        n_init: int = 1,
        tol: float = 0.0,
        seed: int = 0,
        spherical: bool = False,
        engine: str = "auto",
        device: torch.device | str | None = None,
        distributed: bool = False,
    ) -> None:
        self.n_clusters = n_clusters
        self.max_iter = max_iter
        self.n_init = n_init
        self.tol = tol
        self.seed = seed
        self.spherical = spherical
        self.engine = engine
        self.device = device
        self.distributed = distributed

    @torch.no_grad()
    def fit(
        self,
        x: Tensor | np.ndarray,
        init: Tensor | np.ndarray | None = None,
        callback: Callback | None = None,
    ) -> KMeans:
        """Cluster the rows of x.

        Args:
            x: (N, D), N >= C; a float tensor or array. float64 is computed in float32.
            init: (C, D) centroids to start from (a warm start; then there is one run, whatever n_init is).
            callback: called as callback(iteration, inertia) with iteration 1, 2, ... and the inertia of the
                centroids that the iteration began with. By faiss, only after the run.

        Returns:
            self.

        Raises:
            TypeError, ValueError: a parameter or x is unfit: not finite, fewer rows or fewer distinct rows
                than clusters, rows too large or too small for float32, zero rows in spherical mode.
        """
        with distributed.agreed(self.distributed):
            self._check_parameters()
            x = as_matrix("x", x, self.device)
        shards = Shards(len(x), x.device, self.distributed)
        with distributed.agreed(self.distributed):
            x = self._check_data(x, shards.total)
            warm = None if init is None else self._warm(init, x)
        generator = torch.Generator().manual_seed(self.seed)
        best = None
        for _ in range(self.n_init if warm is None else 1):
            start = initial_centroids(x, self.n_clusters, generator, shards) if warm is None else warm
            run = fill(x, self._cluster(x, start, callback, shards), shards)
            own = squared_distances(x, run.labels, run.centroids).sum(dtype=torch.float64)
            inertia = float(shards.sum(own))
            if best is None or inertia < self.inertia_:
                best, self.inertia_ = run, inertia
        self.cluster_centers_, self.labels_, self.n_iter_ = cast(Clustering, best)
        return self

    @torch.no_grad()
    def predict(self, x: Tensor | np.ndarray) -> Tensor:
        """Nearest centroid of every row of x (N, D), as (N,) int32.

        Raises:
            RuntimeError: not fitted yet.
            TypeError, ValueError: x is not a finite (N, D) float matrix of the D that was fitted, or has
                zero rows in spherical mode.
        """
        if not hasattr(self, "cluster_centers_"):
            raise RuntimeError("this KMeans is not fitted yet: call fit first")
        x = as_matrix("x", x, self.device)
        fitted = self.cluster_centers_.shape[1]
        if x.shape[1] != fitted:
            raise ValueError(f"x has {x.shape[1]} columns, but the data that was fitted had {fitted}")
        norms = check_rows("x", x)
        if self.spherical:  # in half precision, scaled rows are not quite parallel to what they were
            x = unit_rows("x", x, norms)
        return assign(x, self.cluster_centers_.to(x.device))

    def _check_data(self, x: Tensor, total: int) -> Tensor:
        """x, in spherical mode of unit rows."""
        if total < self.n_clusters:
            raise ValueError(
                f"x has {total} rows, fewer than n_clusters={self.n_clusters}: "
                f"lower n_clusters to at most {total} or give more rows"
            )
        norms = check_rows("x", x)
        return unit_rows("x", x, norms) if self.spherical else x

    def _check_parameters(self) -> None:
        for name, least in (("n_clusters", 1), ("max_iter", 1), ("n_init", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not 0 <= self.tol < 1:
            raise ValueError(f"tol must be a fraction from 0 to below 1, got {self.tol!r}")
        checks.choice("engine", self.engine, ENGINES)
        if self.engine == "faiss" and self.tol:
            raise ValueError(f"engine='faiss' knows no tol, got {self.tol}: use tol=0 or engine='fused'")

    def _warm(self, init: Tensor | np.ndarray, x: Tensor) -> Tensor:
        """The caller's centroids as (C, D) float32 beside x."""
        init = as_matrix("init", init, x.device).float()
        wanted = (self.n_clusters, x.shape[1])
        if init.shape != wanted:
            raise ValueError(f"init must have shape (n_clusters, D) = {wanted}, got {tuple(init.shape)}")
        norms = check_rows("init", init)
        return unit_rows("init", init, norms) if self.spherical else init

    def _cluster(self, x: Tensor, start: Tensor, callback: Callback | None, shards: Shards) -> Clustering:
        if self.engine == "faiss" or (self.engine == "auto" and pick_engine(x, self.tol) == "faiss"):
            return faiss_lloyd(x, start, self.max_iter, self.spherical, callback, shards)
        return lloyd(x, start, self.max_iter, self.tol, self.spherical, callback, shards)


def pick_engine(x: Tensor, tol: float = 0.0) -> str:
    """What engine="auto" takes: "fused"; where assignment has no kernel, "faiss", if it can compute where x is.

    The rule is measured: with a kernel, fused takes a third to a quarter of faiss's time (bench/results/clustering.md);
    without, plain torch takes 1.75 times faiss's (labels of 100,000 rows, 3,000 centroids, bench/results/cpu.md).
    """
    if tol or backends.choose("auto", "assign_clusters", x.device, x.dtype) != "reference":
        return "fused"
    try:
        faiss = _import_faiss()
    except ImportError:
        return "fused"
    return "faiss" if x.device.type == "cpu" or faiss.get_num_gpus() > 0 else "fused"


def lloyd(
    x: Tensor,
    centroids: Tensor,
    max_iter: int,
    tol: float = 0.0,
    spherical: bool = False,
    callback: Callback | None = None,
    shards: Shards | None = None,
) -> Clustering:
    """Lloyd's algorithm from the given centroids; the labels are those of the centroids returned.

    Clusters settle long before the last one does: `Nearest` finds the labels by what has moved.
    """
    shards = shards or Shards(len(x), x.device, together=False)
    nearest, distances = Nearest(x), None
    previous_labels, previous_inertia = None, torch.inf
    for iteration in range(1, max_iter + 1):
        labels = nearest.update(centroids, distances)
        sums, counts, distances = cluster_sums(x, labels, centroids)
        sums, counts, inertia = add_ranks(sums, counts, distances, shards)
        if callback is not None:
            callback(iteration, inertia)
        # The previous centroids came from these very labels (and refills, which change labels).
        same = previous_labels is not None and torch.equal(labels, previous_labels)
        if shards.every(same, x.device):
            return Clustering(centroids, labels, iteration)
        centroids = repair(x, distances, update(sums, counts, centroids, spherical), counts, shards)
        if tol > 0 and previous_inertia - inertia <= tol * previous_inertia < torch.inf:
            break
        previous_labels, previous_inertia = labels, inertia
    return Clustering(centroids, nearest.update(centroids, distances), iteration)


class Nearest:
    """Each row's nearest centroid, the labels of `assign` to the bit, kept up as centroids move.

    The kernel for float32 on the CPU keeps for every row less than its distance to all centroids but its own. That
    shrinks by no more than centroids move, so that most rows are soon compared with the few that move far alone.
    Elsewhere rows of centroids that stood still are compared with those that moved: see `reassign`.
    """

    def __init__(self, x: Tensor):
        self.x = x
        self.labels = torch.empty(0, dtype=torch.int32)
        self.centroids: Tensor | None = None
        kernel = backends.choose("auto", "assign_clusters", x.device, x.dtype) == "cpu" and x.dtype == torch.float32
        self.bounds = torch.empty(len(x)) if kernel else None

    def update(self, centroids: Tensor, distances: Tensor | None) -> Tensor:
        """(N,) int32. `distances` (N,): squared, of the rows to their nearest before; None the first time."""
        if not self._updated_by_bounds(centroids):
            if self.centroids is None:
                self.labels = assign(self.x, centroids)
            else:
                moved = (centroids != self.centroids).any(dim=1)
                self.labels = reassign(self.x, self.labels, cast(Tensor, distances), centroids, moved)
        self.centroids = centroids
        return self.labels

    def _updated_by_bounds(self, centroids: Tensor) -> bool:
        if self.bounds is None or _shift(centroids) is not None:
            self.bounds = None
            return False
        labels = torch.empty(len(self.x), dtype=torch.int32) if self.centroids is None else self.labels.clone()
        undecided = cpu.reassign(self.x, self.centroids, centroids, labels, self.bounds)
        if undecided < 0 or undecided > MANY_UNDECIDED * len(self.x):
            self.bounds = None
        if undecided >= 0:
            self.labels = labels
        return undecided >= 0


def reassign(x: Tensor, labels: Tensor, distances: Tensor, centroids: Tensor, moved: Tensor) -> Tensor:
    """`assign(x, centroids)`, (N,) int32, after some centroids have `moved` (C,), from the rows' nearest before.

    `labels` (N,) and squared `distances` (N,) are of those. A row whose own centroid stood still is nearest to it or
    to one that moved: to no other, as these were no nearer before either. Rows that rounding could decide otherwise
    are compared with all centroids, so that the labels are the same to the bit.
    """
    if x.dtype != torch.float32 or float(moved.float().mean()) >= FEW_MOVED or _shift(centroids) is not None:
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
    for part in unsure.split(chunk_rows(x)):
        nearest[part] = assign(x[part], centroids)
    return nearest


def add_ranks(sums: Tensor, counts: Tensor, distances: Tensor, shards: Shards) -> tuple[Tensor, Tensor, float]:
    """The sums (C, D) float64, counts (C,) and inertia of all ranks' rows, in one collective."""
    inertia = distances.sum(dtype=torch.float64)
    if not shards.together:
        return sums, counts, float(inertia)
    packed = shards.sum(torch.cat([sums.flatten(), counts.double(), inertia[None]]))
    added, numbers, inertia = packed.split([sums.numel(), len(counts), 1])
    return added.view_as(sums), numbers.long(), float(inertia)


def faiss_lloyd(
    x: Tensor,
    centroids: Tensor,
    max_iter: int,
    spherical: bool = False,
    callback: Callback | None = None,
    shards: Shards | None = None,
) -> Clustering:
    """faiss.Kmeans on every row from the given centroids, on all GPUs that faiss sees, else on the CPU.

    Under torch.distributed on rank 0, while the others wait.
    """
    shards = shards or Shards(len(x), x.device, together=False)
    everyones, n_iter = shards.gather(x), torch.zeros(1, dtype=torch.int64, device=x.device)
    centroids = centroids.clone()
    if not shards.together or distributed.rank() == 0:
        found, inertias = _faiss_kmeans(everyones, centroids, max_iter, spherical)
        centroids.copy_(found)
        n_iter += len(inertias)
        for iteration, inertia in enumerate(inertias if callback is not None else [], start=1):
            cast(Callback, callback)(iteration, inertia)
    centroids = shards.from_first(centroids)
    return Clustering(centroids, assign(x, centroids), int(shards.from_first(n_iter)))


def _faiss_kmeans(
    x: Tensor, centroids: Tensor, max_iter: int, spherical: bool
) -> tuple[Tensor, list[float]]:
    """Centroids, and the inertia of each iteration."""
    faiss = _import_faiss()
    n, d = x.shape
    kmeans = faiss.Kmeans(
        d,
        len(centroids),
        niter=max_iter,
        spherical=spherical,
        gpu=faiss.get_num_gpus() > 0,
        min_points_per_centroid=1,
        max_points_per_centroid=-(-n // len(centroids)),  # enough to take no subsample
    )
    kmeans.train(x.float().cpu().numpy(), init_centroids=centroids.cpu().numpy())
    # On unit rows faiss maximises the sum of cosines: |x - c|^2 = 2 - 2 x.c
    inertias = [float(2 * n - 2 * found if spherical else found) for found in kmeans.obj]
    return torch.from_numpy(kmeans.centroids), inertias


def _import_faiss() -> Any:
    try:
        return importlib.import_module("faiss")  # untyped, and slow to import: only when asked for
    except ImportError as error:
        raise ImportError("engine='faiss' needs faiss: install faiss-cpu, or use engine='fused'") from error


def initial_centroids(
    x: Tensor, n_clusters: int, generator: torch.Generator, shards: Shards | None = None
) -> Tensor:
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
    shards = shards or Shards(len(x), x.device, together=False)
    pool, weights = _distinct_sample(x, n_clusters, generator, shards)
    squared = torch.full((len(pool),), 1.0, device=x.device)  # the first is drawn by weight alone
    chosen = torch.zeros(len(pool), dtype=torch.bool, device=x.device)
    only = torch.zeros(len(pool), dtype=torch.int32, device=x.device)  # the label where there is one centroid
    buffer = chunk_buffer(pool)
    count, picks = 0, []
    while count < n_clusters:
        batch = min(max(1, count // INIT_GROWTH), n_clusters - count)
        # Exponential races won by log-weights (Gumbel top-k): `batch` draws without replacement. The floor
        # keeps distinct rows eligible whose squared distance has underflowed.
        race = torch.empty(len(pool), dtype=torch.float64).exponential_(generator=generator).to(x.device)
        log_weight = (weights * squared.double()).clamp_min(1e-300).log().masked_fill(chosen, -torch.inf)
        pick = (log_weight - race.log()).topk(batch).indices
        labels = assign(pool, pool[pick]) if batch > 1 else only
        nearest = squared_distances(pool, labels, pool[pick], buffer)
        squared = nearest if count == 0 else torch.minimum(squared, nearest)
        chosen[pick] = True
        picks.append(pick)
        count += batch
    return pool[torch.cat(picks)]


def _distinct_sample(
    x: Tensor, n_clusters: int, generator: torch.Generator, shards: Shards
) -> tuple[Tensor, Tensor]:
    """At least C distinct rows of a sample of x, in float32, and how often each occurs there, float64."""
    most = max(shards.total // INIT_SHARE, INIT_LEAST_PER_CLUSTER * n_clusters)
    size = max(INIT_SAMPLE, min(INIT_ROWS_PER_CLUSTER * n_clusters, most))
    sample = x
    if size < shards.total:
        index = torch.randperm(shards.total, generator=generator)[:size] - shards.first
        sample = x[index[(index >= 0) & (index < len(x))].to(x.device)]
    pool, counts = distinct(shards.gather(sample).float())
    if len(pool) < n_clusters:  # the sample is full of duplicates: look through every row
        pool = distinct_rows(x, size, shards)
        counts = torch.ones(len(pool), dtype=torch.int64, device=x.device)
        if len(pool) < n_clusters:
            raise _too_few_distinct(len(pool), n_clusters)
    return pool, counts.double()


def distinct_rows(x: Tensor, enough: int, shards: Shards) -> Tensor:
    """The distinct rows of x, in float32; the search ends once a rank has `enough`."""
    pool = x[:0].float()
    for part in chunks(x):
        pool = distinct(torch.cat([pool, x[part].float()]))[0]
        if len(pool) >= enough:
            break
    return distinct(shards.gather(pool))[0] if shards.together else pool


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows (n, D) of rows (N, D), in the order of their first occurrence, and how often each occurs,
    (n,) int64; `rows` itself where all differ."""
    first, counts = first_occurrences(rows)
    return (rows if len(first) == len(rows) else rows[first]), counts


def first_occurrences(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first of each set of equal float32 rows (N, D), ascending, and the size of the set, (n,) int64.

    Rows are told apart by a hash of 64 bits, as torch.unique of rows takes three times their memory: of a million
    different ones two are taken for the same with a chance of 3e-8.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (rows.shape[1],), generator=generator).to(rows.device) | 1
    hashes = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    for part in chunks(rows, max(1, chunk_rows(rows) // 4)):
        hashes[part] = _hash(rows[part], factors)
    group, counts = torch.unique(hashes, return_inverse=True, return_counts=True)[1:]
    numbers = torch.arange(len(rows), device=rows.device)
    first, order = torch.full_like(counts, len(rows)).scatter_reduce(0, group, numbers, "amin").sort()
    return first, counts[order]


def _hash(rows: Tensor, factors: Tensor) -> Tensor:
    words = (rows + 0.0).view(torch.int32) * factors  # -0 is 0
    words ^= words >> 32  # round numbers differ in their upper bits alone
    return words.sum(1)


def _too_few_distinct(distinct: int, n_clusters: int) -> ValueError:
    return ValueError(
        f"x has only {distinct} distinct rows, fewer than n_clusters={n_clusters}: "
        f"lower n_clusters to at most {distinct}"
    )


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of every row by Euclidean distance, (N,) int32; ties to the lowest index.

    The operator compares x.c - |c|^2 / 2, which loses digits when the data lie far from the origin. Distances
    don't change when both sides are shifted, so then rows are centred chunk by chunk, in float32.
    """
    shift = _shift(centroids)
    dtype = x.dtype if shift is None else torch.float32
    centroids = (centroids if shift is None else centroids - shift).to(dtype)

    labels = torch.empty(len(x), dtype=torch.int32, device=x.device)
    for part in operator_chunks(x, len(centroids), dtype, None if shift is None else chunk_rows(x)):
        features = x[part] if shift is None else x[part].float() - shift
        nearest = assign_clusters(features, centroids, metric="l2", return_confidence=False)
        labels[part] = cast(Tensor, nearest)
    return labels


def _shift(centroids: Tensor) -> Tensor | None:
    """Their mean (D,), where they lie so far from the origin that it has to be taken off."""
    shift = centroids.mean(0)
    spread = centroids.norm(dim=1).square().mean() - shift.square().sum()
    return shift if bool(shift.square().sum() > SHIFT_RATIO * spread) else None


def centroids_of(
    x: Tensor, labels: Tensor, n_clusters: int, spherical: bool = False, shards: Shards | None = None
) -> Tensor:
    """Means (C, D) float32 of the rows that bear each label; of labels no row bears, rows far from their own mean.

    What to start from when rows (N, D) have moved since they got their labels (N,) int32, -1 for none.
    """
    if bool((labels < 0).any()):
        x, labels = x[labels >= 0], labels[labels >= 0]
    shards = shards or Shards(len(x), x.device, together=False)
    nothing = torch.zeros(n_clusters, x.shape[1], device=x.device)
    sums, counts, _ = add_ranks(*cluster_sums(x, labels, nothing), shards)
    centroids = update(sums, counts, nothing, spherical)
    return repair(x, squared_distances(x, labels, centroids), centroids, counts, shards)


def squared_distances(x: Tensor, labels: Tensor, centroids: Tensor, buffer: Tensor | None = None) -> Tensor:
    """|x_i - c_{y(i)}|^2, (N,) float32, from the differences themselves: exactly 0 for equal rows.

    `buffer`: `chunk_buffer(x)`, of many calls the same, as freed ones scatter the heap.
    """
    distances = torch.empty(len(x), device=x.device)
    buffer = chunk_buffer(x) if buffer is None else buffer
    for part in chunks(x):
        difference = buffer[: part.stop - part.start]
        torch.index_select(centroids, 0, labels[part], out=difference)
        distances[part] = difference.sub_(x[part]).square_().sum(1)
    return distances


def cluster_sums(x: Tensor, labels: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of each cluster's rows (C, D) float64, their number (C,) int64, and `squared_distances` (N,) float32.

    No atomics, so the same bits every time. Where no kernel does it in one sweep, rows are sorted by cluster
    and added up in float32 in bags of at most BAG_ROWS, the bags in float64: rounding does not grow with a
    cluster's size.
    """
    backend = backends.choose("auto", "cluster_sums", x.device, x.dtype)
    if backend != "reference":
        with torch.cuda.device_of(x):
            return backends.module_of(backend, "cluster_sums").cluster_sums(x, labels, centroids)
    n_clusters = len(centroids)
    sums = torch.zeros(n_clusters, x.shape[1], dtype=torch.float64, device=x.device)
    for part in chunks(x):
        ordered, order = torch.sort(labels[part], stable=True)
        starts = torch.arange(len(ordered), device=x.device) % BAG_ROWS == 0
        starts[1:] |= ordered[1:] != ordered[:-1]
        bags = starts.nonzero().flatten()
        bag_sums = F.embedding_bag(order, x[part].float(), bags, mode="sum")
        present, bags_per_cluster = torch.unique_consecutive(ordered[bags].long(), return_counts=True)
        sums[present] += torch.segment_reduce(bag_sums.double(), "sum", lengths=bags_per_cluster)
    counts = torch.bincount(labels, minlength=n_clusters)
    return sums, counts, squared_distances(x, labels, centroids)


def update(sums: Tensor, counts: Tensor, centroids: Tensor, spherical: bool = False) -> Tensor:
    """Mean of each cluster, (C, D) float32, in spherical mode of unit length; computed in place of `sums`.

    A cluster without points, or whose unit rows cancel out, keeps its centroid.
    """
    means = sums.div_(counts.clamp_min(1)[:, None])
    kept = counts == 0
    if spherical:
        norms = means.norm(dim=1)
        kept |= norms < SMALLEST_NORM
        means.div_(norms.clamp_min(SMALLEST_NORM)[:, None])
    return torch.where(kept[:, None], centroids, means.float())


def repair(
    x: Tensor, distances: Tensor, centroids: Tensor, counts: Tensor, shards: Shards | None = None
) -> Tensor:
    """Put the centroid of each empty cluster on a point: the ones farthest from their own centroid.

    `distances` (N,) are the squared ones to the rows' own centroids, `counts` (C,) the clusters' sizes. Distinct
    points, the lowest index first among equals. Where too few differ from their centroid, the rest stay where
    they are.
    """
    shards = shards or Shards(len(x), x.device, together=False)
    empty = (counts == 0).nonzero().flatten()
    if len(empty) == 0:
        return centroids
    distances, order = distances.sort(descending=True, stable=True)
    order = order[distances > 0]
    movable = int(shards.sum(torch.tensor(len(order), device=x.device)))
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


def fill(x: Tensor, run: Clustering, shards: Shards) -> Clustering:
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
                raise _too_few_distinct(distinct, len(centroids))
            break  # rows that differ, but not to the operator
    return Clustering(centroids, labels, n_iter)


def chunk_rows(x: Tensor) -> int:
    """Rows of x in CHUNK_ELEMENTS (on a GPU, GPU_CHUNK_ELEMENTS), at least 1."""
    return max(1, (CHUNK_ELEMENTS if x.device.type == "cpu" else GPU_CHUNK_ELEMENTS) // x.shape[1])


def chunk_buffer(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """For a copy of any of `chunks(x)`."""
    return torch.empty(min(len(x), chunk_rows(x)), x.shape[1], dtype=dtype, device=x.device)


def chunks(x: Tensor, rows: int | None = None) -> Iterator[slice]:
    """Slices of that many rows of x each; by default `chunk_rows`."""
    rows = chunk_rows(x) if rows is None else rows
    for first in range(0, len(x), max(rows, 1)):
        yield slice(first, min(first + rows, len(x)))


def operator_chunks(
    x: Tensor, n_clusters: int, dtype: torch.dtype, rows: int | None = None
) -> Iterator[slice]:
    """Rows for each assign_clusters: `rows`, or all; fewer for the reference, which makes (rows, C)."""
    rows = len(x) if rows is None else rows
    if backends.choose("auto", "assign_clusters", x.device, dtype) == "reference":
        rows = min(rows, max(1, SIMILARITY_ELEMENTS // n_clusters))
    return chunks(x, rows)


def as_matrix(name: str, x: Tensor | np.ndarray, device: torch.device | str | None = None) -> Tensor:
    """x as a contiguous (N, D) float32, float16 or bfloat16 tensor, N >= 1, on the device."""
    x = torch.as_tensor(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
    checks.matrix(name, x)
    if len(x) == 0:
        raise ValueError(f"{name} must have at least one row, got shape {tuple(x.shape)}")
    dtype = torch.float32 if x.dtype == torch.float64 else x.dtype
    return x.detach().to(device=device, dtype=dtype).contiguous()


def check_rows(name: str, x: Tensor) -> Tensor:
    """Lengths of the rows, (N,) float64, which have to be finite and within float32's reach squared."""
    norms = torch.empty(len(x), dtype=torch.float64, device=x.device)
    buffer = chunk_buffer(x, torch.float64)
    for part in chunks(x):
        rows = buffer[: part.stop - part.start].copy_(x[part])
        torch.linalg.vector_norm(rows, dim=1, out=norms[part])
    if not bool(norms.isfinite().all()):
        bad = (~norms.isfinite()).nonzero()
        raise ValueError(f"{name} has NaN or infinite values in {len(bad)} rows, first in row {int(bad[0])}")
    largest = float(norms.max())
    if largest > LARGEST_NORM or 0 < largest < SMALLEST_NORM:
        raise ValueError(
            f"{name} has rows of length up to {largest:.3g}, wanted {SMALLEST_NORM} to {LARGEST_NORM}, "
            f"or float32 can't tell their squares apart: scale {name}"
        )
    return norms


def unit_rows(name: str, x: Tensor, norms: Tensor) -> Tensor:
    """x itself when its rows are of unit length up to rounding, else a copy scaled to that."""
    if bool((norms == 0).any()):
        first = int((norms == 0).nonzero()[0])
        raise ValueError(f"{name} has a zero vector in row {first}, which has no direction: leave it out")
    if float((norms - 1).abs().max()) <= 4 * torch.finfo(x.dtype).eps:
        return x
    unit = torch.empty_like(x)
    for part in chunks(x):
        unit[part] = (x[part] / norms[part, None]).to(x.dtype)
    return unit
