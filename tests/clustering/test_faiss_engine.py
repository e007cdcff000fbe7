"""faiss instead of our own loop: the same clusters, and where "auto" takes it."""

from __future__ import annotations

import sys

import pytest
import torch

from ifnd_fast.clustering import kmeans
from ifnd_fast.clustering.faiss_engine import faiss_lloyd
from ifnd_fast.clustering.kmeans import KMeans
from tests.clustering.data import blobs


def test_faiss_agrees_with_fused_from_the_same_centroids():
    x = blobs(2000, 16, 20, spread=2.0)  # wide: the engines refill empty clusters differently
    init = x[:20].clone()
    seen: list[float] = []
    fused = KMeans(20, max_iter=50, init=init).fit(x)
    faiss = KMeans(20, max_iter=50, engine="faiss", init=init).fit(x, callback=lambda i, v: seen.append(v))
    assert faiss.inertia_ == pytest.approx(fused.inertia_, rel=1e-5)
    torch.testing.assert_close(faiss.cluster_centers_, fused.cluster_centers_, atol=1e-4, rtol=1e-4)
    assert len(seen) == faiss.n_iter_
    assert seen[-1] == pytest.approx(faiss.inertia_, rel=1e-4)


def test_faiss_uses_every_point_and_reports_the_spherical_inertia():
    x = blobs(600, 4, 3)  # its default subsample would be 256 points for each of 2 clusters
    faiss = KMeans(2, engine="faiss", max_iter=50).fit(x)
    means = torch.stack([x[faiss.labels_ == j].mean(0) for j in range(2)])
    torch.testing.assert_close(faiss.cluster_centers_, means, atol=1e-4, rtol=1e-4)
    seen: list[float] = []
    spherical = KMeans(3, engine="faiss", spherical=True).fit(x, callback=lambda i, v: seen.append(v))
    assert seen[-1] == pytest.approx(spherical.inertia_, rel=1e-3, abs=1e-3)


def test_auto_is_faiss_only_where_assignment_has_no_kernel(monkeypatch):
    x = blobs(300, 8, 10)
    assert kmeans.pick_engine(x) == "fused"
    fused = KMeans(10).fit(x).cluster_centers_
    monkeypatch.setattr(kmeans.backends, "choose", lambda *_: "reference")
    assert kmeans.pick_engine(x) == "faiss" and kmeans.pick_engine(x, tol=0.1) == "fused"
    called = []
    monkeypatch.setattr(kmeans, "faiss_lloyd", lambda *given: called.append(1) or faiss_lloyd(*given))
    torch.testing.assert_close(KMeans(10).fit(x).cluster_centers_, fused, atol=1e-3, rtol=1e-3)
    assert called
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert kmeans.pick_engine(x) == "fused"
