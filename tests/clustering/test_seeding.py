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
        picked, _ = sklearn.cluster.kmeans_plusplus(x.numpy(), k, random_state=seed)
        theirs.append(inertia(x, torch.from_numpy(picked)))
        random.append(inertia(x, x[torch.randperm(len(x), generator=generator)[:k]]))
    assert np.mean(ours) < 1.05 * np.mean(theirs)
    assert np.mean(ours) < 0.85 * np.mean(random)


TIGHT = {
    "equal": ([100] * 20, 8, 0.02),
    "plane": ([200] * 20, 2, 0.01),
    "many rows": ([600] * 20, 4, 0.05),  # more than the sample has
    "of every size": ([20 * 2 ** (i // 5) for i in range(20)], 6, 0.02),
    "many clusters": ([10] * 100, 8, 0.02),  # drawn in rounds
}


@pytest.mark.parametrize("name", TIGHT)
def test_one_run_finds_all_tight_clusters(name, monkeypatch):
    if name == "many rows":
        monkeypatch.setattr("ifnd_fast.clustering.seeding.INIT_PAIRS", 1)
    sizes, dim, spread = TIGHT[name]
    generator = torch.Generator().manual_seed(5)
    which = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centres = torch.rand(len(sizes), dim, generator=generator)
    x = centres[which] + spread / 4 * torch.randn(len(which), dim, generator=generator)
    found = 0  # all clusters, of 20 seeds; scikit-learn's KMeans with n_init=1 does so 18 to 20 times
    for seed in range(20):
        labels = KMeans(len(sizes), seed=seed, max_iter=4).fit(x).labels_
        pairs = torch.stack([which, labels.long()]).unique(dim=1)
        found += pairs.shape[1] == len(sizes)
    assert found >= 18, found


def test_initial_centroids_are_distinct_rows_of_a_sample(monkeypatch):
    monkeypatch.setattr("ifnd_fast.clustering.seeding.INIT_SAMPLE", 64)
    monkeypatch.setattr("ifnd_fast.clustering.seeding.INIT_PAIRS", 1)
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
    monkeypatch.setattr("ifnd_fast.clustering.seeding.INIT_PAIRS", 1)
    monkeypatch.setattr("ifnd_fast.clustering.seeding.INIT_ROWS_PER_CLUSTER", 1)
    x = torch.zeros(5000, 2)
    x[[17, 1234, 4321], 0] = torch.tensor([1.0, 2.0, 3.0])
    assert KMeans(4).fit(x).inertia_ == 0
    with pytest.raises(ValueError, match="only 4 distinct rows.*n_clusters=5.*at most 4"):
        KMeans(5).fit(x)
