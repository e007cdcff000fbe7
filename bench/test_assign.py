"""Nearest centroid of every row: fused, faiss's exact search, and plain torch on chunks of rows; on a GPU also
flash-kmeans (https://github.com/svg-project/flash-kmeans) where it is installed.

Centroids are the rows' own dtype; faiss takes float32 only, and gives no confidence. faiss's index is built
beforehand, only the search is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ifnd_fast import assign_clusters

TEMPERATURE = 0.2
CHUNK = 4096
Size = tuple[int, int, int]
FUSED = ("fused", "cuda", "triton") if torch.cuda.is_available() else ("fused",)
HALF = tuple(f"{name}, bfloat16" for name in FUSED)
SIZES: tuple[Size, ...] = ((100_000, 3_000, 128), (50_000, 1_000, 128))
OTHER_SIZES: tuple[Size, ...] = (
    (40_000, 3_000, 64), (20_000, 3_000, 256), (10_000, 2_000, 768), (2_000, 3_000, 2048), (20_000, 25_000, 128)
)  # fmt: skip
ODD_SIZES: tuple[Size, ...] = ((10_007, 999, 100), (9_984, 992, 96), (10_240, 1_024, 112))


def title(size: Size) -> str:
    return "N={:,} C={:,} D={}".format(*size)


def points(size: Size, small: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    n, c = (2_000, 100) if small else size[:2]
    return normalize(torch.randn(n, size[2])).to(device), normalize(torch.randn(c, size[2])).to(device)


def operations(size: Size) -> int:
    n, c, d = size
    return 2 * n * c * d


def torch_in_chunks(x: Tensor, c: Tensor, metric: str, return_confidence: bool) -> tuple[Tensor, Tensor]:
    """At most (CHUNK, C) similarities at a time."""
    half_norms = c.square().sum(1) / 2
    labels, confidences = [], []
    for rows in x.split(CHUNK):
        similarity = rows @ c.t()
        if metric == "l2":
            similarity -= half_norms
        best = similarity.max(1)
        labels.append(best.indices)
        if return_confidence:
            confidences.append((best.values / TEMPERATURE - torch.logsumexp(similarity / TEMPERATURE, 1)).exp())
    return torch.cat(labels), torch.cat(confidences or [x.new_empty(0)])


def check(labels: Tensor | np.ndarray, x: Tensor, c: Tensor, metric: str) -> None:
    expected, _ = assign_clusters(x, c, metric=metric, backend="reference")
    same = torch.eq(torch.as_tensor(labels, device=x.device).flatten(), expected)
    assert same.float().mean() > 0.999


def flash_kmeans_search(x: Tensor, c: Tensor, metric: str) -> Callable[[], Tensor]:
    """Its labels of one problem; the rows' squares that it wants are computed beforehand, as it does for Lloyd."""
    if x.device.type == "cpu":
        pytest.skip("flash-kmeans computes on a GPU")
    why = "flash-kmeans is not installed (pip install flash-kmeans)"
    kernels = pytest.importorskip("flash_kmeans.assign_euclid_triton", reason=why)
    if metric == "inner_product":
        return lambda: kernels.cosine_assign_triton(x[None], c[None])[0]
    squares = x.square().sum(1)
    return lambda: kernels.euclid_assign_triton(x[None], c[None], squares[None])[0]


def run_fused(size, return_confidence, device, small, fused, measure, row="fused", dtype=torch.float32, **how) -> None:
    x, c = (t.to(dtype) for t in points(size, small, device))
    name = row.partition(",")[0]
    backend = fused("assign_clusters", dtype, name if name in FUSED[1:] else "auto")
    how |= {"return_confidence": return_confidence, "temperature": TEMPERATURE, "backend": backend}
    work = {"operations": operations(size), "dtype": str(dtype), "backend": backend}
    result = measure(lambda: assign_clusters(x, c, **how), row, **work)
    if small:
        labels, confidence = result if return_confidence else (result, None)
        check(labels, x, c, how.get("metric", "inner_product"))
        if return_confidence:
            _, expected = assign_clusters(x, c, temperature=TEMPERATURE, backend="reference")
            torch.testing.assert_close(confidence, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES + OTHER_SIZES, ids=title)
@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("name", [*FUSED, *HALF, "faiss", "flash_kmeans", "torch"])
def test_labels(name, metric, size, device, small, fused, measure, benchmark):
    benchmark.group = f"labels by {metric}: {title(size)}"
    if name in FUSED + HALF:
        dtype = torch.bfloat16 if name in HALF else torch.float32
        return run_fused(size, False, device, small, fused, measure, name, dtype, metric=metric)
    x, c = points(size, small, device)
    work = {"operations": operations(size), "dtype": "torch.float32"}
    if name == "faiss":
        faiss = pytest.importorskip("faiss")
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = {"inner_product": faiss.IndexFlatIP, "l2": faiss.IndexFlatL2}[metric](size[2])
        rows: Tensor | np.ndarray = x.numpy() if device.type == "cpu" else x
        if device.type == "cuda":
            if not hasattr(faiss, "StandardGpuResources"):
                pytest.skip("this faiss has no GPU index")
            import faiss.contrib.torch_utils  # noqa: F401 (its search takes tensors on the GPU)

            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        index.add(c.cpu().numpy())
        work["backend"] = "faiss " + faiss.__version__
        labels = measure(lambda: index.search(rows, 1)[1], name, **work)
    elif name == "flash_kmeans":
        search = flash_kmeans_search(x, c, metric)
        nearest, _ = assign_clusters(x, c, metric=metric, backend="reference")
        farther = (x * (c[nearest.long()] - c[search().long()])).sum(1)
        assert farther.max() <= 2**-9  # of 1: it may multiply in TF32
        labels = nearest
        labels = measure(search, name, **work)
    else:
        labels, _ = measure(lambda: torch_in_chunks(x, c, metric, False), name, **work)
    if small:
        check(labels, x, c, metric)


@pytest.mark.parametrize("size", SIZES + OTHER_SIZES, ids=title)
@pytest.mark.parametrize("name", [*FUSED, *HALF, "torch"])
def test_labels_and_confidence(name, size, device, small, fused, measure, benchmark):
    benchmark.group = f"labels and confidence: {title(size)}"
    if name == "torch":
        x, c = points(size, small, device)
        work = {"operations": operations(size), "dtype": "torch.float32"}
        labels, _ = measure(lambda: torch_in_chunks(x, c, "inner_product", True), name, **work)
        if small:
            check(labels, x, c, "inner_product")
    else:
        dtype = torch.bfloat16 if name in HALF else torch.float32
        run_fused(size, True, device, small, fused, measure, name, dtype)


@pytest.mark.parametrize("return_confidence", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_threads(n, return_confidence, device, small, fused, measure, threads, benchmark):
    if device.type != "cpu":
        pytest.skip("threads are the CPU's")
    what = "labels and confidence" if return_confidence else "labels by inner_product"
    benchmark.group = f"{what}, number of threads: {title(SIZES[0])}, float32"
    threads(n)
    run_fused(SIZES[0], return_confidence, device, small, fused, measure, row=f"{n} threads")


@pytest.mark.parametrize("return_confidence", [True, False])
@pytest.mark.parametrize("size", ODD_SIZES, ids=title)
def test_odd_sizes(size, return_confidence, device, small, fused, measure, benchmark):
    what = "labels and confidence" if return_confidence else "labels by inner_product"
    benchmark.group = f"{what}, odd sizes, float32"
    run_fused(size, return_confidence, device, small, fused, measure, row=title(size))
