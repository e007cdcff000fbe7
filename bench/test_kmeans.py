"""Ten iterations of Lloyd's algorithm on N=50,000 C=500 D=128 from the same centroids: fused, faiss, scikit-learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ifnd_fast import KMeans

ITERATIONS = 10


def inertia(x: Tensor, centroids: Tensor) -> float:
    return sum(float(torch.cdist(rows, centroids).min(1).values.square().sum()) for rows in x.split(4096))


@pytest.mark.parametrize("name", ["fused", "faiss", "sklearn"])
@pytest.mark.benchmark(group=f"k-means: N=50,000 C=500 D=128, {ITERATIONS} iterations, float32")
def test_kmeans(name, device, small, fused, measure, benchmark):
    torch.manual_seed(0)
    n, c = (2_000, 20) if small else (50_000, 500)
    x = normalize(torch.randn(n, 128) + 2 * torch.randn(c, 128).repeat(n // c, 1)).to(device)
    start = x[torch.randperm(n)[:c]].clone()
    if device.type != "cpu" and name != "fused":
        pytest.skip(f"{name} computes on the CPU here")
    if name == "fused":
        backend = fused("assign_clusters", torch.float32)
        model = measure(lambda: KMeans(c, max_iter=ITERATIONS).fit(x, init=start), name, backend=backend)
        centroids = model.cluster_centers_
    elif name == "faiss":
        faiss = pytest.importorskip("faiss")
        faiss.omp_set_num_threads(torch.get_num_threads())

        def faiss_kmeans():
            model = faiss.Kmeans(128, c, niter=ITERATIONS, min_points_per_centroid=1, max_points_per_centroid=n)
            model.train(x.numpy(), init_centroids=start.numpy())
            model.index.search(x.numpy(), 1)  # the others give labels too
            return model.centroids

        centroids = torch.from_numpy(measure(faiss_kmeans, name, backend="faiss " + faiss.__version__))
    else:
        sklearn = pytest.importorskip("sklearn")
        from sklearn.cluster import KMeans as SklearnKMeans

        settings = {"max_iter": ITERATIONS, "n_init": 1, "tol": 0, "algorithm": "lloyd"}
        model = measure(
            lambda: SklearnKMeans(c, init=start.numpy(), **settings).fit(x.numpy()),
            name,
            backend="scikit-learn " + sklearn.__version__,
        )
        centroids = torch.from_numpy(model.cluster_centers_).to(x)
    benchmark.extra_info["inertia"] = found = inertia(x, centroids)
    if small:
        expected = inertia(x, KMeans(c, max_iter=ITERATIONS).fit(x, init=start).cluster_centers_)
        assert found < inertia(x, start) and found == pytest.approx(expected, 0.02)
