"""Clustering at all levels in one call."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from ifnd_fast import KMeans, PseudoLabels, assign_clusters
from ifnd_fast.clustering.distinct import TooFewDistinct
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


@pytest.mark.parametrize("fit", [cluster_levels, lambda z, levels: PseudoLabels(levels).fit(z)])
def test_too_few_distinct_rows_say_which_levels_there_can_be(fit):
    """Duplicated images: what the message says to pass is what can be clustered."""
    z, levels = features(6).repeat(20, 1), (5, 20, 40)
    with pytest.raises(ValueError, match=r"features has only 6 distinct rows.*\(5, 20, 40\): pass .*\(levels, 6\)"):
        fit(z, levels)
    assert scale_levels(levels, 6) == (2, 3, 6)
    fit(z, scale_levels(levels, 6))
    with pytest.raises(ValueError, match=r"features has 120 rows, fewer than .*: pass levels=scale_levels\(levels, N"):
        fit(z, (5, 121))


def test_too_few_distinct_rows_tell_how_many():
    with pytest.raises(TooFewDistinct) as caught:
        KMeans(7).fit(features(6).repeat(20, 1))
    assert caught.value.distinct == 6


@pytest.mark.parametrize(
    ("previous", "error", "message"),
    [
        (torch.zeros(300, 1, dtype=torch.int32), ValueError, r"previous must have shape \(300, 2\), got \(300, 1\)"),
        (torch.zeros(300, 2), TypeError, "previous must be torch.int32, got torch.float32"),
        (torch.full((300, 2), 4, dtype=torch.int32), ValueError, "previous has label 4 at level 0, .* 4 clusters"),
        ([[0, 1]], TypeError, "previous must be a torch.Tensor"),
    ],
)
def test_previous_labels_that_do_not_fit(previous, error, message):
    with pytest.raises(error, match=message):
        cluster_levels(features(), (4, 9), previous=previous)


def test_numbers_of_levels():
    z = features()
    same = cluster_levels(z, np.array([4, 9]), max_iter=np.int32(3), seed=np.int64(2), temperature=np.float32(0.2))
    for a, b in zip(same, cluster_levels(z, [4, 9], max_iter=3, seed=2), strict=True):
        assert torch.equal(a.labels, b.labels)
    assert scale_levels(np.array([4, 9]), np.int64(3)) == (2, 3)
    assert all(type(level) is int for level in scale_levels(np.array([4, 9]), np.int64(3)))
    for bad in ((True,), (3, None), ("4",), (float("nan"),), "45"):
        with pytest.raises(ValueError, match="levels must be positive integers"):
            cluster_levels(z, bad)
    for bad in (3, None, torch.tensor([2, 3])):
        with pytest.raises(TypeError, match="levels must be a sequence of integers"):
            cluster_levels(z, bad)
    for bad in (True, 2.5, None, float("nan")):
        with pytest.raises(ValueError, match="n must be an integer"):
            scale_levels((3,), bad)


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
