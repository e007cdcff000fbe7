"""k-means by this package and its peers, each in a process of its own: `Engine` starts one and asks it for fits.

In one process several OpenMP runtimes would take the cores from each other, and some peers bring their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from tables import environment
from torch import Tensor
from torch.nn.functional import normalize

from ifnd_fast import KMeans
from ifnd_fast.ops.chunks import chunks


class Data(NamedTuple):
    """Features to cluster: (n, dim) unit rows around `clusters` random directions, in random order."""

    n: int
    clusters: int
    dim: int = 128
    noise: float = 1.6  # deviation of a feature from its cluster's direction, in that one's
    cosine: float = 1.0  # of the features, on average, to what they were before they moved

    def __str__(self) -> str:
        return f"N={self.n:,} C={self.clusters:,} D={self.dim}, noise {self.noise}"

    def features(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(self.clusters, self.dim, generator=generator)
        features = torch.empty(self.n, self.dim)
        for part in chunks(features):
            rows = features[part]
            own = torch.randint(self.clusters, (len(rows),), generator=generator)
            rows.copy_(normalize(centres[own] + self.noise * torch.randn(rows.shape, generator=generator)))
        if self.cosine < 1:
            away = normalize(torch.randn(features.shape, generator=generator))
            features = normalize(features + (1 / self.cosine**2 - 1) ** 0.5 * away)
        return features


class Fit(NamedTuple):
    """What came of a fit: how long it took and how good it is; of ours, the inertia that it had after how long."""

    seconds: float
    iterations: int
    inertia: float
    trail: list[tuple[float, float]]


Fitting = Callable[[], tuple[Tensor, int]]
"""Cluster; the centroids and how many iterations it took."""


# ---- who clusters: features and the most iterations in, a fit that is ready to be timed out ----


def ours(data: Data, x: Tensor, iterations: int) -> Fitting:
    def fit() -> tuple[Tensor, int]:
        model = KMeans(data.clusters, max_iter=iterations).fit(x)
        return model.cluster_centers_, model.n_iter_

    return fit


def ours_warm(data: Data, x: Tensor, iterations: int) -> Fitting:
    """From the centroids of the features before they moved."""
    before, _ = ours(data, data._replace(cosine=1.0).features(), iterations)()

    def fit() -> tuple[Tensor, int]:
        model = KMeans(data.clusters, max_iter=iterations, tol=1e-3, init=before).fit(x)
        return model.cluster_centers_, model.n_iter_

    return fit


def by_faiss(data: Data, x: Tensor, iterations: int, kind: str = "Kmeans") -> Fitting:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    rows, points = x.numpy(), {"min_points_per_centroid": 1, "max_points_per_centroid": data.n}

    def fit() -> tuple[Tensor, int]:
        model = getattr(faiss, kind)(data.dim, data.clusters, niter=iterations, **points)
        model.train(rows)
        return torch.from_numpy(model.centroids), len(model.obj)

    return fit


def by_faiss_super(data: Data, x: Tensor, iterations: int) -> Fitting:
    import faiss

    if not hasattr(faiss, "SuperKmeans"):
        raise ImportError("faiss is older")
    return by_faiss(data, x, iterations, "SuperKmeans")


def by_superkmeans(data: Data, x: Tensor, iterations: int) -> Fitting:
    """Of all points, no sample, with its early stop."""
    from superkmeans import SuperKMeans

    rows = x.numpy()
    settings = {"hierarchical": False, "sampling_fraction": 1.0, "max_points_per_cluster": data.n, "seed": 0}

    def fit() -> tuple[Tensor, int]:
        threads = torch.get_num_threads()
        model = SuperKMeans(data.clusters, data.dim, iters=iterations, n_threads=threads, **settings)
        return torch.from_numpy(model.train(rows)), len(model.iteration_stats)

    return fit


def by_sklearn(data: Data, x: Tensor, iterations: int, init: str = "random", kind: Any = None) -> Fitting:
    from sklearn.cluster import KMeans as SklearnKMeans

    rows, kind = x.numpy(), kind or SklearnKMeans
    settings = {"max_iter": iterations, "n_init": 1, "tol": 0, "init": init, "random_state": 0, "algorithm": "lloyd"}

    def fit() -> tuple[Tensor, int]:
        model = kind(data.clusters, **settings).fit(rows)
        return torch.from_numpy(model.cluster_centers_), model.n_iter_

    return fit


def by_intelex(data: Data, x: Tensor, iterations: int) -> Fitting:
    from daal4py import daalinit
    from sklearnex.cluster import KMeans

    daalinit(torch.get_num_threads())
    return by_sklearn(data, x, iterations, kind=KMeans)


OURS, WARM = "ifnd_fast", "ifnd_fast, warm"
ENGINES: dict[str, tuple[Callable[[Data, Tensor, int], Fitting], str]] = {  # and the package that brings it
    OURS: (ours, ""),
    WARM: (ours_warm, ""),
    "faiss.Kmeans": (by_faiss, "faiss-cpu"),
    "faiss.SuperKmeans": (by_faiss_super, "'faiss-cpu>=1.15'"),
    "superkmeans": (by_superkmeans, "superkmeans"),
    "scikit-learn, random rows": (by_sklearn, "scikit-learn"),
    "scikit-learn, k-means++": (partial(by_sklearn, init="k-means++"), "scikit-learn"),
    "scikit-learn-intelex": (by_intelex, "scikit-learn-intelex"),
}
PEERS = [name for name in ENGINES if name not in (OURS, WARM)]


# ---- a process of its own ----


class Missing(Exception):
    """The engine's package is not installed, or too old."""


class Engine:
    """A process that clusters by the engine of that name."""

    def __init__(self, name: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, name],
            env=environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def fit(self, data: Data, iterations: int, trail: bool = False) -> Fit:
        """Raises Missing."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([data, iterations, trail]), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        if isinstance(answer, str):
            raise Missing(answer)
        return Fit(*answer)


def inertia(x: Tensor, centroids: Tensor) -> float:
    return sum(float(torch.cdist(rows, centroids).min(1).values.double().square().sum()) for rows in x.split(4096))


def trail_of(data: Data, x: Tensor, iterations: int) -> list[tuple[float, float]]:
    """Of another fit of ours: seconds since its beginning, and the inertia after each iteration."""
    seen: list[tuple[float, float]] = []
    started = time.perf_counter()
    model = KMeans(data.clusters, max_iter=iterations)
    model.fit(x, callback=lambda _, found: seen.append((time.perf_counter() - started, float(found))))
    return [*seen, (time.perf_counter() - started, model.inertia_)]


def main(name: str) -> None:
    """A line of JSON in asks for a fit, a line out answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print
    make, package = ENGINES[name]
    last = None
    for line in sys.stdin:
        asked, iterations, trail = json.loads(line)
        answer: Fit | str
        try:
            if last != (asked, iterations):
                data = Data(*asked)
                x = data.features()
                fit, last = make(data, x, iterations), (asked, iterations)
            started = time.perf_counter()
            centroids, n = fit()
            seconds = time.perf_counter() - started
            answer = Fit(seconds, n, inertia(x, centroids), trail_of(data, x, iterations) if trail else [])
        except ImportError:
            answer = f"not installed: pip install {package}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
