"""Ten iterations of Lloyd's algorithm on N=50,000 C=500 D=128 from the same centroids: fused, faiss, scikit-learn; on a
GPU flash-kmeans (https://github.com/svg-project/flash-kmeans) where it is installed, and faiss where it has a GPU's.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ifnd_fast import KMeans

ITERATIONS = 10


def inertia(x: Tensor, centroids: Tensor) -> float:
    return sum(float(torch.cdist(rows, centroids).min(1).values.square().sum()) for rows in x.split(4096))


@pytest.mark.parametrize("name", ["fused", "faiss", "flash_kmeans", "sklearn"])
@pytest.mark.benchmark(group=f"k-means: N=50,000 C=500 D=128, {ITERATIONS} iterations, float32")
def test_kmeans(name, device, small, fused, measure, benchmark):
    torch.manual_seed(0)
    n, c = (2_000, 20) if small else (50_000, 500)
    x = normalize(torch.randn(n, 128) + 2 * torch.randn(c, 128).repeat(n // c, 1)).to(device)
    start = x[torch.randperm(n)[:c]].clone()
    if name == ("sklearn" if device.type == "cuda" else "flash_kmeans"):
        pytest.skip(f"{name} does not compute on this device")
    if name == "fused":
        backend = fused("assign_clusters", torch.float32)
        model = measure(lambda: KMeans(c, max_iter=ITERATIONS, init=start).fit(x), name, backend=backend)
        centroids = model.cluster_centers_
    elif name == "faiss":
        faiss = pytest.importorskip("faiss")
        faiss.omp_set_num_threads(torch.get_num_threads())
        gpu = device.type == "cuda"
        if gpu and not hasattr(faiss, "StandardGpuResources"):
            pytest.skip("this faiss has no GPU index")
        rows, first = x.cpu().numpy(), start.cpu().numpy()  # what its k-means takes, on a GPU too
        points = {"min_points_per_centroid": 1, "max_points_per_centroid": n}

        def faiss_kmeans():
            model = faiss.Kmeans(128, c, niter=ITERATIONS, gpu=gpu, **points)
            model.train(rows, init_centroids=first)
            model.index.search(rows, 1)  # the others give labels too
            return model.centroids

        centroids = torch.from_numpy(measure(faiss_kmeans, name, backend="faiss " + faiss.__version__)).to(x)
    elif name == "flash_kmeans":
        peer = pytest.importorskip("flash_kmeans", reason="flash-kmeans is not installed (pip install flash-kmeans)")

        def lloyd():  # it may write to its initial centroids
            how = {"max_iters": ITERATIONS, "tol": -1.0, "init_centroids": start[None].clone()}
            return peer.batch_kmeans_Euclid(x[None], c, **how)[1][0]

        expected = inertia(x, KMeans(c, max_iter=ITERATIONS, init=start).fit(x).cluster_centers_)
        assert inertia(x, lloyd()) == pytest.approx(expected, 0.02)
        centroids = measure(lloyd, name)
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
        expected = inertia(x, KMeans(c, max_iter=ITERATIONS, init=start).fit(x).cluster_centers_)
        assert found < inertia(x, start) and found == pytest.approx(expected, 0.02)
