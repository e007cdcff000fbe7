"""Nearest centroid of every row, D = 128: fused, faiss's exact search, and plain torch on chunks of rows.

Centroids are the rows' own dtype; faiss takes float32 only, and gives no confidence. faiss's index is built
beforehand, only the search is timed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ifnd_fast import assign_clusters

TEMPERATURE = 0.2
CHUNK = 4096
SIZES = [(100_000, 3_000), (50_000, 1_000)]

every_size = pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)


def points(size: tuple[int, int], small: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    n, c = (2_000, 100) if small else size
    return normalize(torch.randn(n, 128)).to(device), normalize(torch.randn(c, 128)).to(device)


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


@every_size
@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("name", ["fused", "faiss", "torch"])
def test_labels(name, metric, size, device, small, fused, measure, benchmark):
    benchmark.group = f"labels by {metric}: N={size[0]:,} C={size[1]:,} D=128, float32"
    x, c = points(size, small, device)
    if name == "fused":
        backend = fused("assign_clusters", torch.float32)
        how = {"metric": metric, "return_confidence": False, "backend": backend}
        labels = measure(lambda: assign_clusters(x, c, **how), backend=backend)
    elif name == "faiss":
        if device.type != "cpu":
            pytest.skip("faiss's index is on the CPU here")
        faiss = pytest.importorskip("faiss")
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = {"inner_product": faiss.IndexFlatIP, "l2": faiss.IndexFlatL2}[metric](128)
        index.add(c.numpy())
        labels = measure(lambda: index.search(x.numpy(), 1)[1], backend="faiss " + faiss.__version__)
    else:
        labels, _ = measure(lambda: torch_in_chunks(x, c, metric, False), backend="torch")
    if small:
        check(labels, x, c, metric)


@every_size
@pytest.mark.parametrize("name", ["fused", "fused_bfloat16", "torch"])
def test_labels_and_confidence(name, size, device, small, fused, measure, benchmark):
    benchmark.group = f"labels and confidence: N={size[0]:,} C={size[1]:,} D=128"
    x, c = points(size, small, device)
    if name == "fused_bfloat16":
        x, c = x.bfloat16(), c.bfloat16()
    if name == "torch":
        labels, confidence = measure(lambda: torch_in_chunks(x, c, "inner_product", True), backend="torch")
    else:
        backend = fused("assign_clusters", x.dtype)
        how = {"temperature": TEMPERATURE, "backend": backend}
        labels, confidence = measure(lambda: assign_clusters(x, c, **how), backend=backend)
    if small:
        check(labels, x, c, "inner_product")
        _, expected = assign_clusters(x, c, temperature=TEMPERATURE, backend="reference")
        torch.testing.assert_close(confidence, expected, rtol=1e-4, atol=1e-5)
