"""Clustering at all levels in one call."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from ifnd_fast import KMeans, assign_clusters
from ifnd_fast.clustering.levels import cluster_levels, scale_levels


def features(n: int = 300, d: int = 8) -> torch.Tensor:
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("spherical", [False, True])
def test_each_level_is_a_k_means_of_its_own_seed(spherical):
    z, steps = features(), []
    started = time.perf_counter()
    found = cluster_levels(
        z, (5, 20, 7), max_iter=4, spherical=spherical, seed=3, progress=lambda *step: steps.append(step)
    )
    assert 0 < sum(level.seconds for level in found) < time.perf_counter() - started
    for number, (clusters, level) in enumerate(zip((5, 20, 7), found, strict=True)):
        kmeans = KMeans(clusters, max_iter=4, spherical=spherical, seed=3 + number).fit(z)
        assert torch.equal(level.centroids, normalize(kmeans.cluster_centers_))
        labels, confidence = assign_clusters(z, level.centroids, temperature=0.2)
        assert torch.equal(level.labels, labels) and torch.equal(level.confidence, confidence)
        assert (level.n_iter, level.inertia) == (kmeans.n_iter_, kmeans.inertia_)
        assert level.bytes == 4 * 8 * clusters + 8 * 300
        of_level = [step for step in steps if step[0] == number]
        assert [iteration for _, iteration, _ in of_level] == list(range(1, level.n_iter + 1))
        assert of_level[-1][2] >= level.inertia > 0


@settings(max_examples=100)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=4), st.integers(1, 10**6))
def test_scale_levels(levels, n):
    scaled = scale_levels(levels, n)
    if max(levels) <= n:
        assert scaled == tuple(levels)
    else:
        assert max(scaled) == n and min(scaled) >= min(2, n)
        for level, now in zip(levels, scaled, strict=True):
            assert now <= max(2, level * n / max(levels)) < now + 1 or now == min(2, n)


@pytest.mark.parametrize("levels", [(), (0,), (3, -1), (2.5,)])
def test_unfit_levels(levels):
    with pytest.raises(ValueError, match="levels must be positive integers"):
        cluster_levels(features(), levels)
    with pytest.raises(ValueError, match="levels must be positive integers"):
        scale_levels(levels, 10)
    with pytest.raises(ValueError, match="n must be"):
        scale_levels((3,), 0)
