"""Rows of different weight: as scikit-learn's KMeans from the same centroids, and as rows repeated or left out."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.cluster
import torch

from ifnd_fast import KMeans
from ifnd_fast.clustering.seeding import initial_centroids, random_centroids
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.ops.cluster_sums import cluster_sums
from tests.clustering.data import blobs

X = blobs(600, 5, 12, spread=1.5)
WEIGHTS = torch.rand(600, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e30])
@pytest.mark.parametrize("zeros", [0, 400])
def test_same_as_scikit_learn_from_the_same_centroids(dtype, scale, zeros):
    x, weights = X.to(dtype).numpy(), scale * WEIGHTS.numpy()
    weights[:zeros] = 0
    start = x[-12:].copy()
    seen: list[float] = []
    ours = KMeans(12, max_iter=300, init=start).fit(x, None, weights, callback=lambda _, found: seen.append(found))
    theirs = sklearn.cluster.KMeans(12, init=start, n_init=1, max_iter=300, tol=0).fit(x, sample_weight=weights)
    assert (ours.labels_ == theirs.labels_).all()
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-5, atol=1e-5)
    assert ours.score(x, sample_weight=weights) == pytest.approx(-ours.inertia_, rel=1e-5)
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in zip(seen, seen[1:], strict=False))
    assert seen[-1] == pytest.approx(ours.inertia_, rel=1e-5)


def test_equal_weights_change_nothing():
    plain = KMeans(12).fit(X)
    for weights in (3, torch.full((600,), 3.0), [3] * 600):
        fitted = KMeans(12).fit(X, sample_weight=weights)
        assert torch.equal(fitted.labels_, plain.labels_)
        assert fitted.inertia_ == 3 * plain.inertia_


@pytest.mark.parametrize("settings", [{}, {"spherical": True}, {"engine": "faiss"}, {"n_init": 3}])
def test_rows_of_weight_0_decide_nothing(settings):
    weights = WEIGHTS.clone()
    weights[::3] = 0
    with_them = KMeans(12, **settings).fit(X, sample_weight=weights)
    without = KMeans(12, **settings).fit(X[weights > 0], sample_weight=weights[weights > 0])
    assert torch.equal(with_them.cluster_centers_, without.cluster_centers_)
    assert torch.equal(with_them.labels_[weights > 0], without.labels_)
    assert torch.equal(with_them.labels_, with_them.predict(X))
    assert with_them.inertia_ == without.inertia_


@pytest.mark.parametrize("draw", [initial_centroids, random_centroids])
def test_draws_are_weighted(draw):
    x, weights = torch.arange(40.0)[:, None], torch.ones(40)
    weights[:4] = 1e6
    chosen = [draw(x, 2, torch.Generator().manual_seed(s), Shards.alone(x), weights).max() for s in range(10)]
    assert max(chosen) < 4


def test_sums_of_weighted_rows_are_those_of_repeated_ones():
    repeats = torch.arange(600) % 4
    labels = (torch.arange(600) % 5).int()
    sums, total, distances = cluster_sums(X, labels, X[:5].clone(), repeats.float())
    again, counts, _ = cluster_sums(X.repeat_interleave(repeats, 0), labels.repeat_interleave(repeats), X[:5].clone())
    torch.testing.assert_close(sums, again, rtol=1e-6, atol=1e-4)
    assert total.tolist() == counts.tolist() and total.dtype == torch.float64
    torch.testing.assert_close(distances, cluster_sums(X, labels, X[:5].clone())[2])


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.ones(3), ValueError, r"shape \(N,\) = \(600,\), got \(3,\)"),
        (torch.ones(600, 1), ValueError, r"shape \(N,\)"),
        (-torch.ones(600), ValueError, "finite numbers of at least 0"),
        (torch.full((600,), float("nan")), ValueError, "finite numbers of at least 0"),
        (0, ValueError, "all are zero"),
        ("heavy", TypeError, "sample_weight must be numbers"),
    ],
)
def test_unfit_weights(weights, error, message):
    with pytest.raises(error, match=message):
        KMeans(3).fit(X, sample_weight=weights)
