"""k-means on the fused nearest-centroid operator (Lloyd's algorithm), or by faiss.

Nothing here is ever of size N x C, and temporaries of N x D are made a chunk at a time. The steps are
functions of their own: initial_centroids, assign, cluster_sums, mean_centroids, repair; lloyd is their loop.
Ranks may share the rows (`distributed.Shards`): each assigns and adds up its own, and the sums are added.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ifnd_fast.clustering.estimator import Estimator
from ifnd_fast.clustering.faiss_engine import _import_faiss, faiss_lloyd
from ifnd_fast.clustering.frame import Frame, frame_of
from ifnd_fast.clustering.lloyd import Callback, KMeansRun, assign, fill, lloyd, weighted_sum
from ifnd_fast.clustering.rows import as_given, as_matrix, as_tensor, check_rows, single, unit_rows
from ifnd_fast.clustering.seeding import initial_centroids, random_centroids
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.clustering.weights import as_weights, relative_weights
from ifnd_fast.ops import backends, checks
from ifnd_fast.ops.chunks import chunks
from ifnd_fast.ops.cluster_sums import squared_distances
from ifnd_fast.runtime import distributed

ENGINES = ("auto", "fused", "faiss")
INITS = {"k-means++": initial_centroids, "random": random_centroids}


class Fitted(NamedTuple):
    """What a fit found, of all its runs the best."""

    centers: Tensor  # (C, D) in the rows' coordinates
    labels: Tensor  # (N,) int32
    inertia: float
    n_iter: int
    frame: Frame | None  # that it was found in


class KMeans(Estimator):
    """k-means clustering, as an estimator of scikit-learn's.

    Minimises the inertia  sum_i w_i |x_i - c_{y(i)}|^2  over centroids c and labels y by Lloyd's algorithm; the rows'
    weights w are 1, if `fit` is given none. Every cluster of the result has at least one point, as long as float32 can
    tell the points apart. Data that lie far from the origin, or whose size float32 can't square, are clustered in
    coordinates of their own, in a float32 copy: relative to their mean and by a power of 2 as large
    (`clustering.frame`). What is returned is in x's coordinates.

    Args:
        n_clusters: C, the number of centroids.
        init: where to start: "k-means++" or "random" rows, or centroids (C, D) (a warm start; then there is one run,
            whatever n_init is).
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
        inertia_: of all rows, sum of squared distances to the labelled centroids (in spherical mode, of unit rows),
            weighted.
        n_iter_: iterations of the run that was kept.
        n_features_in_: D. feature_names_in_: names of the columns, of a data frame that has them.

    Rows are a tensor, and so are results; or an array, or what NumPy makes one of (a list, a data frame), and results
    are arrays (of `transform`, data frames after `set_output`). Integers other than tensors are taken as float64.
    float64 rows are clustered in float32, relative to their mean where that is far. Half-precision rows are compared
    with centroids rounded to their dtype; sums, centroids and inertia are float32 or better. Same bits for the same
    input on one device and thread count.

    Example:
        >>> x = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> KMeans(2).fit(x).cluster_centers_.flatten().sort().values
        tensor([0.0500, 5.0500])
    """

    cluster_centers_: Any  # Tensor or np.ndarray, as the rows were
    labels_: Any
    inertia_: float
    n_iter_: int
    n_features_in_: int

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: str | Tensor | np.ndarray = "k-means++",
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
        self.init = init
        self.max_iter = max_iter
        self.n_init = n_init
        self.tol = tol
        self.seed = seed
        self.spherical = spherical
        self.engine = engine
        self.device = device
        self.distributed = distributed

    @torch.no_grad()
    def fit(self, x: Any, y: Any = None, sample_weight: Any = None, *, callback: Callback | None = None) -> KMeans:
        """Cluster the rows of x.

        Args:
            x: (N, D), N >= C; floats, or integers of an array, a list or a data frame.
            y: ignored; for scikit-learn's pipelines.
            sample_weight: (N,) numbers of at least 0, by which rows count in means, inertia and draws; a row of weight
                0 gets a label and decides nothing. None: 1. One number: of all rows.
            callback: called as callback(iteration, inertia) with iteration 1, 2, ... and the inertia of the
                centroids that the iteration began with. By faiss, only after the run.

        Returns:
            self.

        Raises:
            TypeError, ValueError: a parameter, x or sample_weight is unfit: not finite, fewer rows or fewer distinct
                rows of weight above 0 than clusters, rows too large or too small for float32, zero rows in spherical
                mode.
        """
        with distributed.raise_on_all_ranks(self.distributed):
            self.check_parameters()
            rows = as_matrix("x", x, self.device)
            self._refuse_centroids(y, sample_weight, rows)
            own_weights = as_weights(sample_weight, len(rows), rows.device)
        shards = Shards(len(rows), rows.device, self.distributed)
        weights, factor = relative_weights(own_weights, rows, shards)
        init = None if isinstance(self.init, str) else self.init
        report = None if callback is None else lambda i, found: callback(i, found * factor)
        if weights is None:
            found = self._fit(rows, shards, init, report)
        else:
            found = self._fit_weighted(rows, weights, init, report)
        self.cluster_centers_, self.labels_ = as_given(found.centers, x), as_given(found.labels, x)
        self.inertia_, self.n_iter_ = found.inertia * factor, found.n_iter
        self._found_in = self.cluster_centers_, found.frame
        self._fit_columns(x, rows.shape[1])
        return self

    def _fit_weighted(self, x: Tensor, weights: Tensor, init: Any, callback: Callback | None) -> Fitted:
        """`fit` of this rank's rows and weights; the rows of weight 0 are left out, and get their labels at last."""
        with distributed.raise_on_all_ranks(self.distributed):
            norms, counts = check_rows("x", x), weights > 0
            if self.spherical:
                unit_rows("x", x, norms)
            if not bool(counts.any()):
                raise ValueError("sample_weight has numbers 1e38 times as large on other ranks: leave these rows out")
        if not bool(counts.all()):
            heavy, weights = x[counts], weights[counts]
        else:
            heavy = x
        shards = Shards(len(heavy), x.device, self.distributed)
        found = self._fit(heavy, shards, init, callback, weights)
        labels = found.labels if heavy is x else self._nearest(x, norms, found.centers, found.frame)
        return found._replace(labels=labels)

    def _fit(
        self, x: Tensor, shards: Shards, init: Any, callback: Callback | None, weights: Tensor | None = None
    ) -> Fitted:
        """`fit` of a matrix, this rank's share of `shards`, by checked parameters and weights above 0."""
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
            if warm is None:
                start = INITS[str(self.init)](rows, int(self.n_clusters), generator, shards, weights)
            else:
                start = warm
            run = fill(rows, self._cluster(rows, start, report, shards, weights), shards)
            inertia = inertia_of(rows, run, shards, weights)
            if best is None or inertia < least:
                best, least = run, inertia
        best = cast(KMeansRun, best)
        centers = best.centroids.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if frame is not None:
            centers, best = outside(rows, best, frame, x.dtype, shards)
            least = inertia_of(rows, best, shards, weights)
        return Fitted(centers, best.labels, least / unit, best.n_iter, frame)

    def fit_predict(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """`fit`, and its `labels_`."""
        return self.fit(x, y, sample_weight).labels_

    def fit_transform(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """`fit`, and `transform` of the same rows."""
        return self.fit(x, y, sample_weight).transform(x)

    @torch.no_grad()
    def predict(self, x: Any) -> Any:
        """Nearest centroid of every row of x (N, D), as (N,) int32.

        Raises:
            NotFittedError: scikit-learn's (a ValueError): not fitted yet.
            TypeError, ValueError: x is not a finite (N, D) float matrix of the D that was fitted, has zero rows in
                spherical mode, or rows out of float32's reach of the data that was fitted.
        """
        rows, norms = self._rows(x)
        return as_given(self._nearest(rows, norms, self._centers(rows), self._frame()), x)

    @torch.no_grad()
    def transform(self, x: Any) -> Any:
        """Distance of every row of x (N, D) to every centroid, (N, C), float64 for float64 rows, else float32; in
        spherical mode, of unit rows. Raises what `predict` raises."""
        rows, norms = self._rows(x)
        rows = unit_rows("x", rows, norms) if self.spherical else rows
        centers = self._centers(rows).double()
        origin = centers.mean(0)  # near it, products have the digits of differences
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        distances = torch.empty(len(rows), len(centers), dtype=dtype, device=rows.device)
        for part in chunks(distances):
            distances[part] = torch.cdist(rows[part].double() - origin, centers - origin)
        return self._contained(as_given(distances, x), x)

    @torch.no_grad()
    def score(self, x: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the inertia of rows x (N, D) under the fitted centroids. Raises what `predict` raises."""
        rows, norms = self._rows(x)
        weights, centers, frame = as_weights(sample_weight, len(rows), rows.device), self._centers(rows), self._frame()
        labels = self._nearest(rows, norms, centers, frame)
        if frame is not None:
            rows, centers = frame.enter("x", rows), frame.enter("cluster_centers_", centers)
        elif self.spherical:
            rows = unit_rows("x", rows, norms)
        distances = squared_distances(single(rows), labels, centers.float())
        return -float(weighted_sum(distances, weights)) / (1.0 if frame is None else frame.scale**2)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of `transform`'s columns: kmeans0, kmeans1, ..."""
        if not hasattr(self, "cluster_centers_"):
            raise self._not_fitted()
        return np.array([f"kmeans{number}" for number in range(len(self.cluster_centers_))], object)

    def _rows(self, x: Any) -> tuple[Tensor, Tensor]:
        """Checked rows of the width that was fitted, and their lengths."""
        if not hasattr(self, "cluster_centers_"):
            raise self._not_fitted()
        rows = as_matrix("x", x, self.device)
        self._check_columns(x, rows.shape[1], self.cluster_centers_.shape[1])
        return rows, check_rows("x", rows)

    def _centers(self, x: Tensor) -> Tensor:
        """cluster_centers_ as a tensor beside x."""
        return as_tensor(self.cluster_centers_).to(x.device)

    def _nearest(self, x: Tensor, norms: Tensor, centers: Tensor, frame: Frame | None) -> Tensor:
        if self.spherical:  # in half precision, scaled rows are not quite parallel to what they were
            x = unit_rows("x", x, norms)
        if frame is None:
            return assign(single(x), centers.float())
        return assign(frame.enter("x", x), frame.enter("cluster_centers_", centers))

    def _frame(self) -> Frame | None:
        """That of the fit; of centroids that came otherwise, their own."""
        centers, frame = getattr(self, "_found_in", (None, None))
        found = as_tensor(self.cluster_centers_)
        if self.spherical or (centers is not None and torch.equal(as_tensor(centers), found)):
            return frame
        found = found.double()
        return frame_of(found, found.sum(0), found.square().sum(), Shards.alone(found))

    def _check_data(self, x: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, in spherical mode of unit rows; the sum of the rows (D,) and of their squared lengths (), in float64."""
        if total < self.n_clusters:
            raise ValueError(
                f"x has {total} rows, fewer than n_clusters={self.n_clusters} (n_samples={total}): "
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
        if isinstance(self.init, str):
            checks.choice("init", self.init, tuple(INITS))
        elif callable(self.init) or self.init is None:
            call = ": call it, and pass what it gives" if callable(self.init) else ""
            raise TypeError(f"init must be one of {tuple(INITS)} or centroids (C, D), got {self.init!r}{call}")
        if self.engine == "faiss" and self.tol:
            raise ValueError(f"engine='faiss' knows no tol, got {self.tol}: use tol=0 or engine='fused'")

    def _refuse_centroids(self, y: Any, sample_weight: Any, x: Tensor) -> None:
        """`init` and `callback` were arguments of `fit` once, at the places of y and sample_weight."""
        try:
            shape = tuple(np.shape(y))
        except (TypeError, ValueError):  # a list of what makes no array
            shape = ()
        if len(shape) == 2 and (shape[0] != len(x) or shape == (self.n_clusters, x.shape[1])):
            raise TypeError(
                f"y, of shape {shape}, looks like centroids to start from, which fit doesn't take any more: "
                "pass KMeans(n_clusters, init=centroids)"
            )
        if callable(sample_weight):
            raise TypeError("sample_weight must be numbers, got a function: pass fit(x, callback=function)")

    def _warm(self, init: Any, x: Tensor, frame: Frame | None) -> Tensor:
        """The caller's centroids as (C, D) float32 beside x, in x's frame."""
        init = as_matrix("init", init, x.device)
        wanted = (self.n_clusters, x.shape[1])
        if init.shape != wanted:
            raise ValueError(f"init must have shape (n_clusters, D) = {wanted}, got {tuple(init.shape)}")
        norms = check_rows("init", init)
        init = unit_rows("init", init, norms) if self.spherical else init
        return init.float() if frame is None else frame.enter("init", init)

    def _cluster(
        self, x: Tensor, start: Tensor, callback: Callback | None, shards: Shards, weights: Tensor | None
    ) -> KMeansRun:
        if self.engine == "faiss" or (self.engine == "auto" and pick_engine(x, self.tol) == "faiss"):
            return faiss_lloyd(x, start, shards, int(self.max_iter), self.spherical, callback, weights)
        return lloyd(x, start, shards, int(self.max_iter), self.tol, self.spherical, callback, weights)


def outside(rows: Tensor, run: KMeansRun, frame: Frame, dtype: torch.dtype, shards: Shards) -> tuple[Tensor, KMeansRun]:
    """The centroids in the coordinates that the data came in, rounded to their dtype (float32 for half precision), and
    the run with the labels of those, as `KMeans.predict` finds them."""
    centers = frame.leave(run.centroids).to(torch.float64 if dtype == torch.float64 else torch.float32)
    rounded = frame.enter("cluster_centers_", centers)
    run = fill(rows, KMeansRun(rounded, assign(rows, rounded), run.n_iter), shards)
    moved = (run.centroids != rounded).any(dim=1)  # onto a row
    centers[moved] = frame.leave(run.centroids[moved]).to(centers.dtype)
    return centers, run


def inertia_of(x: Tensor, run: KMeansRun, shards: Shards, weights: Tensor | None) -> float:
    """Of all ranks' rows: the weighted sum of squared distances to the labelled centroids."""
    return float(shards.sum(weighted_sum(squared_distances(x, run.labels, run.centroids), weights)))


def pick_engine(x: Tensor, tol: float = 0.0) -> str:
    """What engine="auto" takes: "fused"; where assignment has no kernel, "faiss", if it can compute where x is.

    The rule is measured: with a kernel, fused takes at most two thirds of faiss's time (bench/results/clustering-*.md);
    without, plain torch takes 1.75 times faiss's (labels of 100,000 rows, 3,000 centroids, bench/results/cpu-*.md).
    """
    if tol or backends.choose("auto", "assign_clusters", x.device, x.dtype, x.shape[1]) != "reference":
        return "fused"
    try:
        faiss = _import_faiss()
    except ImportError:
        return "fused"
    return "faiss" if x.device.type == "cpu" or faiss.get_num_gpus() > 0 else "fused"
