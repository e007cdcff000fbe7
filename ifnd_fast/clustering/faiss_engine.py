"""k-means by faiss, from the same start."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ifnd_fast.clustering.lloyd import Callback, KMeansRun, assign
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.runtime import distributed


def faiss_lloyd(
    x: Tensor,
    centroids: Tensor,
    shards: Shards,
    max_iter: int,
    spherical: bool = False,
    callback: Callback | None = None,
    weights: Tensor | None = None,
) -> KMeansRun:
    """faiss.Kmeans on every row from the given centroids, on all GPUs that faiss sees, else on the CPU.

    Under torch.distributed on rank 0, while the others wait.
    """
    gathered_weights = None if weights is None else shards.gather(weights)
    gathered, n_iter = shards.gather(x), torch.zeros(1, dtype=torch.int64, device=x.device)
    centroids = centroids.clone()
    if not shards.together or distributed.rank() == 0:
        found, inertias = _faiss_kmeans(gathered, gathered_weights, centroids, max_iter, spherical)
        centroids.copy_(found)
        n_iter += len(inertias)
        if callback is not None:
            for iteration, inertia in enumerate(inertias, start=1):
                callback(iteration, inertia)
    centroids = shards.from_first(centroids)
    return KMeansRun(centroids, assign(x, centroids), int(shards.from_first(n_iter)))


def _faiss_kmeans(
    x: Tensor, weights: Tensor | None, centroids: Tensor, max_iter: int, spherical: bool
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
    weight = None if weights is None else weights.cpu().numpy()
    kmeans.train(x.float().cpu().numpy(), weights=weight, init_centroids=centroids.cpu().numpy())
    # On unit rows faiss maximises the sum of cosines: |x - c|^2 = 2 - 2 x.c
    total = n if weights is None else float(weights.sum(dtype=torch.float64))
    inertias = [float(2 * total - 2 * found if spherical else found) for found in kmeans.obj]
    return torch.from_numpy(kmeans.centroids), inertias


def _import_faiss() -> Any:
    try:
        return importlib.import_module("faiss")  # untyped, and slow to import: only when asked for
    except ImportError as error:
        raise ImportError("engine='faiss' needs faiss: install faiss-cpu, or use engine='fused'") from error
