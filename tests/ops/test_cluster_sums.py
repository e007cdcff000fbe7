"""Sums and sizes of clusters, and the rows' distances to their centroids, by the kernel and in plain torch."""

from __future__ import annotations

import pytest
import torch

from ifnd_fast.ops import backends
from ifnd_fast.ops.cluster_sums import cluster_sums


@pytest.fixture(params=["cpu", "reference"])
def sums_backend(request, monkeypatch):
    """The kernel, and the torch operations that a GPU takes."""
    if request.param == "reference":
        monkeypatch.setattr(backends, "_cpu", None)
    elif backends.extension() is None:
        pytest.skip("extension not built")
    assert backends.choose("auto", "cluster_sums", torch.device("cpu"), torch.float32) == request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("dim", [1, 5, 70])
def test_cluster_sums(dim, dtype, chunk, sums_backend, monkeypatch):
    monkeypatch.setattr("ifnd_fast.ops.chunks.CHUNK_ELEMENTS", chunk)
    x, centroids = torch.randn(1000, dim).to(dtype), torch.randn(7, dim)
    labels = torch.randint(3, (1000,), dtype=torch.int32) * 2  # clusters 1, 3, 5 and 6 stay empty
    sums, counts, distances = cluster_sums(x, labels, centroids)
    expected = torch.zeros(7, dim, dtype=torch.float64).index_add(0, labels.long(), x.double())
    torch.testing.assert_close(sums, expected, atol=1e-4, rtol=1e-5)
    assert counts.tolist() == torch.bincount(labels, minlength=7).tolist()
    expected = (x.double() - centroids[labels.long()].double()).square().sum(1)
    torch.testing.assert_close(distances, expected.float(), rtol=1e-5, atol=0)


def test_sums_of_a_large_cluster_keep_their_digits(sums_backend):  # float32 throughout is off by 3e-3
    x = torch.full((300_000, 1), 0.1)
    sums, _, distances = cluster_sums(x, torch.zeros(len(x), dtype=torch.int32), x[:1])
    assert float(sums) == pytest.approx(300_000 * float(x[0, 0].double()), rel=1e-5)
    assert not distances.any()


@pytest.mark.parametrize("label", [-1, 3, -(2**31), 2**31 - 1])
def test_sums_refuse_labels_out_of_range(label, sums_backend):
    with pytest.raises(ValueError, match="labels must be 0 to C - 1"):
        cluster_sums(torch.ones(2, 1), torch.tensor([0, label], dtype=torch.int32), torch.ones(3, 1))


def test_cluster_sums_do_not_depend_on_the_number_of_threads():
    x, centroids = torch.randn(5000, 33), torch.randn(40, 33)
    labels = (torch.rand(5000) ** 4 * 40).int()  # the first clusters hold most rows
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(cluster_sums(x, labels, centroids))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
