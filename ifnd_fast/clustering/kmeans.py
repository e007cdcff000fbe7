"""k-means on the fused nearest-centroid operator (Lloyd's algorithm), or by faiss.

Nothing here is ever of size N x C, and temporaries of N x D are made a chunk at a time. The steps are
functions of their own: initial_centroids, assign, cluster_sums, mean_centroids, repair; lloyd is their loop.
Ranks may share the rows (`distributed.Shards`): each assigns and adds up its own, and the sums are added.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ifnd_fast.clustering.faiss_engine import _import_faiss, faiss_lloyd
from ifnd_fast.clustering.frame import Frame, frame_of
from ifnd_fast.clustering.lloyd import Callback, KMeansRun, assign, fill, lloyd
from ifnd_fast.clustering.rows import as_matrix, check_rows, single, unit_rows
from ifnd_fast.clustering.seeding import initial_centroids
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.ops import backends, checks
from ifnd_fast.ops.cluster_sums import squared_distances
from ifnd_fast.runtime import distributed

ENGINES = ("auto", "fused", "faiss")


class KMeans:
    """k-means clustering, by scikit-learn's conventions.

    Minimises the inertia  sum_i |x_i - c_{y(i)}|^2  over centroids c and labels y by Lloyd's algorithm.
    Every cluster of the result has at least one point, as long as float32 can tell the points apart. Data that lie far
    from the origin, or whose size float32 can't square, are clustered in coordinates of their own, in a float32 copy:
    relative to their mean and by a power of 2 as large (`clustering.frame`). What is returned is in x's coordinates.

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
        cluster_centers_: (C, D) centroids, float64 for float64 rows, else float32.
        labels_: (N,) int32, the nearest centroid of each row given (the lowest index among equals).
        inertia_: of all rows, sum of squared distances to the labelled centroids (in spherical mode, of unit rows).
        n_iter_: iterations of the run that was kept.

    float64 rows are clustered in float32, relative to their mean where that is far. Half-precision rows are compared
    with centroids rounded to their dtype; sums, centroids and inertia are float32 or better. Same bits for the same
    input on one device and thread count.

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
            x: (N, D), N >= C; a float tensor or array.
            init: (C, D) centroids to start from (a warm start; then there is one run, whatever n_init is).
            callback: called as callback(iteration, inertia) with iteration 1, 2, ... and the inertia of the
                centroids that the iteration began with. By faiss, only after the run.

        Returns:
            self.

        Raises:
            TypeError, ValueError: a parameter or x is unfit: not finite, fewer rows or fewer distinct rows
                than clusters, rows too large or too small for float32, zero rows in spherical mode.
        """
        with distributed.raise_on_all_ranks(self.distributed):
            self.check_parameters()
            x = as_matrix("x", x, self.device)
        return self._fit(x, Shards(len(x), x.device, self.distributed), init, callback)

    def _fit(self, x: Tensor, shards: Shards, init: Tensor | np.ndarray | None, callback: Callback | None) -> KMeans:
        """`fit` of a matrix, this rank's share of `shards`, by parameters that were checked."""
        with distributed.raise_on_all_ranks(self.distributed):
            rows, sums, squares = self._check_data(x, shards.total)
        frame = None if self.spherical else frame_of(rows, sums, squares, shards)
        with distributed.raise_on_all_ranks(self.distributed):
            rows = single(rows) if frame is None else frame.enter("x", rows)
            warm = None if init is None else self._warm(init, x, frame)
        unit = 1.0 if frame is None else frame.scale**2  # of an inertia
        report = None if callback is None else lambda i, found: callback(i, found / unit)
        generator = torch.Generator().manual_seed(int(self.seed))
        best, least = None, math.inf
        for _ in range(self.n_init if warm is None else 1):
            start = initial_centroids(rows, self.n_clusters, generator, shards) if warm is None else warm
            run = fill(rows, self._cluster(rows, start, report, shards), shards)
            inertia = inertia_of(rows, run, shards)
            if best is None or inertia < least:
                best, least = run, inertia
        best = cast(KMeansRun, best)
        centers = best.centroids.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if frame is not None:
            centers, best = outside(rows, best, frame, x.dtype, shards)
            least = inertia_of(rows, best, shards)
        self.cluster_centers_, self.labels_, self.n_iter_ = centers, best.labels, best.n_iter
        self.inertia_, self._found_in = least / unit, (centers, frame)
        return self

    @torch.no_grad()
    def predict(self, x: Tensor | np.ndarray) -> Tensor:
        """Nearest centroid of every row of x (N, D), as (N,) int32.

        Raises:
            RuntimeError: not fitted yet.
            TypeError, ValueError: x is not a finite (N, D) float matrix of the D that was fitted, has zero rows in
                spherical mode, or rows out of float32's reach of the data that was fitted.
        """
        if not hasattr(self, "cluster_centers_"):
            raise RuntimeError("this KMeans is not fitted yet: call fit first")
        x = as_matrix("x", x, self.device)
        fitted = self.cluster_centers_.shape[1]
        if x.shape[1] != fitted:
            raise ValueError(f"x has {x.shape[1]} columns, but the data that was fitted had {fitted}")
        norms = check_rows("x", x)
        centers, frame = self.cluster_centers_, self._frame()
        if self.spherical:  # in half precision, scaled rows are not quite parallel to what they were
            x = unit_rows("x", x, norms)
        if frame is None:
            return assign(single(x), centers.to(x.device, torch.float32))
        return assign(frame.enter("x", x), frame.enter("cluster_centers_", centers).to(x.device))

    def _frame(self) -> Frame | None:
        """That of the fit; of centroids that came otherwise, their own."""
        centers, frame = getattr(self, "_found_in", (None, None))
        if self.spherical or centers is self.cluster_centers_:
            return frame
        found = self.cluster_centers_.double()
        alone = Shards.alone(self.cluster_centers_)
        return frame_of(self.cluster_centers_, found.sum(0), found.square().sum(), alone)

    def _check_data(self, x: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, in spherical mode of unit rows; the sum of the rows (D,) and of their squared lengths (), in float64."""
        if total < self.n_clusters:
            raise ValueError(
                f"x has {total} rows, fewer than n_clusters={self.n_clusters}: "
                f"lower n_clusters to at most {total} or give more rows"
            )
        sums = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        norms = check_rows("x", x, sums)
        return (unit_rows("x", x, norms) if self.spherical else x), sums, norms.square().sum()

    def check_parameters(self) -> None:
        """Raises TypeError or ValueError for one that is unfit; `fit` does it first."""
        for name, least in (("n_clusters", 1), ("max_iter", 1), ("n_init", 1), ("seed", 0)):
            checks.integer(name, getattr(self, name), least)
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2^64, got {self.seed}")
        if not 0 <= checks.number("tol", self.tol) < 1:
            raise ValueError(f"tol must be a fraction from 0 to below 1, got {self.tol!r}")
        checks.flag("spherical", self.spherical)
        checks.flag("distributed", self.distributed)
        checks.choice("engine", self.engine, ENGINES)
        if self.engine == "faiss" and self.tol:
            raise ValueError(f"engine='faiss' knows no tol, got {self.tol}: use tol=0 or engine='fused'")

    def _warm(self, init: Tensor | np.ndarray, x: Tensor, frame: Frame | None) -> Tensor:
        """The caller's centroids as (C, D) float32 beside x, in x's frame."""
        init = as_matrix("init", init, x.device)
        wanted = (self.n_clusters, x.shape[1])
        if init.shape != wanted:
            raise ValueError(f"init must have shape (n_clusters, D) = {wanted}, got {tuple(init.shape)}")
        norms = check_rows("init", init)
        init = unit_rows("init", init, norms) if self.spherical else init
        return init.float() if frame is None else frame.enter("init", init)

    def _cluster(self, x: Tensor, start: Tensor, callback: Callback | None, shards: Shards) -> KMeansRun:
        if self.engine == "faiss" or (self.engine == "auto" and pick_engine(x, self.tol) == "faiss"):
            return faiss_lloyd(x, start, shards, self.max_iter, self.spherical, callback)
        return lloyd(x, start, shards, self.max_iter, self.tol, self.spherical, callback)


def outside(rows: Tensor, run: KMeansRun, frame: Frame, dtype: torch.dtype, shards: Shards) -> tuple[Tensor, KMeansRun]:
    """The centroids in the coordinates that the data came in, rounded to their dtype (float32 for half precision), and
    the run with the labels of those, as `KMeans.predict` finds them."""
    centers = frame.leave(run.centroids).to(torch.float64 if dtype == torch.float64 else torch.float32)
    rounded = frame.enter("cluster_centers_", centers)
    run = fill(rows, KMeansRun(rounded, assign(rows, rounded), run.n_iter), shards)
    moved = (run.centroids != rounded).any(dim=1)  # onto a row
    centers[moved] = frame.leave(run.centroids[moved]).to(centers.dtype)
    return centers, run


def inertia_of(x: Tensor, run: KMeansRun, shards: Shards) -> float:
    """Of all ranks' rows: the sum of squared distances to the labelled centroids."""
    return float(shards.sum(squared_distances(x, run.labels, run.centroids).sum(dtype=torch.float64)))


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
