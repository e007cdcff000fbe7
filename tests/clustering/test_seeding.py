"""Where k-means starts: as good as scikit-learn's k-means++, and distinct."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.cluster
import torch

from ifnd_fast.clustering.kmeans import KMeans
from ifnd_fast.clustering.seeding import initial_centroids
from ifnd_fast.clustering.shards import Shards
from tests.clustering.data import blobs, inertia


@pytest.mark.parametrize("k", [60, 150])
def test_initial_centroids_are_as_good_as_scikit_learns(k):
    x = blobs(1000, 8, 60)
    ours, theirs, random = [], [], []
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        ours.append(inertia(x, initial_centroids(x, k, generator, Shards.alone(x))))
        picked, _ = sklearn.cluster.kmeans_plusplus(x.numpy(), k, n_local_trials=1, random_state=seed)
        theirs.append(inertia(x, torch.from_numpy(picked)))
        random.append(inertia(x, x[torch.randperm(len(x), generator=generator)[:k]]))
    assert np.mean(ours) < 1.2 * np.mean(theirs)
    assert np.mean(ours) < 0.85 * np.mean(random)


def test_initial_centroids_are_distinct_rows_of_a_sample(monkeypatch):
    monkeypatch.setattr("ifnd_fast.clustering.seeding.INIT_SAMPLE", 64)
    x = blobs(1000, 3, 5).repeat(2, 1)
    chosen = initial_centroids(x, 30, torch.Generator().manual_seed(3), Shards.alone(x))
    assert len(torch.unique(chosen, dim=0)) == 30
    assert (torch.cdist(chosen, x, compute_mode="donot_use_mm_for_euclid_dist") == 0).any(1).all()


@pytest.mark.parametrize("seed", range(5))
def test_initial_centroids_are_distinct_even_where_squares_underflow(seed):
    x = torch.tensor([[1.0], [0.0], [1e-30], [2e-30], [3e-30]])
    chosen = initial_centroids(x, 5, torch.Generator().manual_seed(seed), Shards.alone(x))
    assert torch.equal(chosen.sort(dim=0).values, x.sort(dim=0).values)


def test_initial_centroids_look_beyond_a_sample_of_duplicates(monkeypatch):
    monkeypatch.setattr("ifnd_fast.clustering.seeding.INIT_SAMPLE", 16)
    monkeypatch.setattr("ifnd_fast.clustering.seeding.INIT_ROWS_PER_CLUSTER", 1)
    x = torch.zeros(5000, 2)
    x[[17, 1234, 4321], 0] = torch.tensor([1.0, 2.0, 3.0])
    assert KMeans(4).fit(x).inertia_ == 0
    with pytest.raises(ValueError, match="only 4 distinct rows.*n_clusters=5.*at most 4"):
        KMeans(5).fit(x)
