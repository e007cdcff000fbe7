"""k-means on the fused nearest-centroid operator (Lloyd's algorithm), or by faiss.

Nothing here is ever of size N x C, and temporaries of N x D are made a chunk at a time. The steps are
functions of their own: initial_centroids, assign, cluster_sums, update, repair; lloyd is their loop.
Ranks may share the rows (`distributed.Shards`): each assigns and adds up its own, and the sums are added.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from ifnd_fast.clustering.faiss_engine import _import_faiss, faiss_lloyd
from ifnd_fast.clustering.lloyd import Callback, Clustering, assign, fill, lloyd
from ifnd_fast.clustering.rows import as_matrix, check_rows, unit_rows
from ifnd_fast.clustering.seeding import initial_centroids
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.ops import backends, checks
from ifnd_fast.ops.cluster_sums import squared_distances
from ifnd_fast.runtime import distributed

ENGINES = ("auto", "fused", "faiss")


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
