"""Sums and sizes of clusters, and the rows' distances to their centroids."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ifnd_fast.ops import backends
from ifnd_fast.ops.chunks import chunk_buffer, chunks

BAG_ROWS = 256  # rows added up in float32 before float64 takes over


def squared_distances(x: Tensor, labels: Tensor, centroids: Tensor, buffer: Tensor | None = None) -> Tensor:
    """|x_i - c_{y(i)}|^2, (N,) float32, from the differences themselves: exactly 0 for equal rows.

    `buffer`: `chunk_buffer(x)`, of many calls the same, as freed ones scatter the heap.
    """
    distances = torch.empty(len(x), dtype=torch.float32, device=x.device)
    buffer = chunk_buffer(x) if buffer is None else buffer
    for part in chunks(x):
        difference = buffer[: part.stop - part.start]
        torch.index_select(centroids, 0, labels[part], out=difference)
        distances[part] = difference.sub_(x[part]).square_().sum(1)
    return distances


def cluster_sums(
    x: Tensor, labels: Tensor, centroids: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of each cluster's rows (C, D) float64, their number (C,) int64, and `squared_distances` (N,) float32.

    With weights (N,) float32 each row counts that many times: the sum is of w x, and the number one of w, in float64.

    Labels (N,) are int32 from 0 to C - 1: ValueError for others, but on a GPU with the cuda backend, where such rows
    are in no sum and at distance NaN.

    No atomics, so the same bits every time. Where no kernel does it in one sweep (none takes weights), rows are sorted
    by cluster and added up in float32 in bags of at most BAG_ROWS, the bags in float64: rounding does not grow with a
    cluster's size.
    """
    backend = "reference"
    if weights is None:
        backend = backends.choose("auto", "cluster_sums", x.device, x.dtype, x.shape[1])
    if backend != "reference":
        with torch.cuda.device_of(x):
            return backends.module_of(backend, "cluster_sums").cluster_sums(x, labels, centroids)
    n_clusters = len(centroids)
    if not bool(((labels >= 0) & (labels < n_clusters)).all()):
        raise ValueError("labels must be 0 to C - 1")
    sums = torch.zeros(n_clusters, x.shape[1], dtype=torch.float64, device=x.device)
    weight = torch.zeros(n_clusters, dtype=torch.float64, device=x.device)
    for part in chunks(x):
        ordered, order = torch.sort(labels[part], stable=True)
        starts = torch.arange(len(ordered), dtype=torch.int64, device=x.device) % BAG_ROWS == 0
        starts[1:] |= ordered[1:] != ordered[:-1]
        bags = starts.nonzero().flatten()
        rows = x[part].float() if weights is None else x[part].double() * weights[part, None]
        bag_sums = F.embedding_bag(order, rows, bags, mode="sum")
        present, bags_per_cluster = torch.unique_consecutive(ordered[bags].long(), return_counts=True)
        sums[present] += torch.segment_reduce(bag_sums.double(), "sum", lengths=bags_per_cluster)
        if weights is not None:
            present, sizes = torch.unique_consecutive(ordered.long(), return_counts=True)
            weight[present] += torch.segment_reduce(weights[part][order].double(), "sum", lengths=sizes)
    counts = torch.bincount(labels, minlength=n_clusters) if weights is None else weight
    return sums, counts, squared_distances(x, labels, centroids)
