"""The steps of Lloyd's algorithm: labels kept up as centroids move, means, empty clusters refilled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from ifnd_fast.clustering.lloyd import Nearest, assign, centroids_of, lloyd, reassign_by_movement, repair
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.ops import backends
from ifnd_fast.ops.cluster_sums import squared_distances
from tests.clustering.data import blobs, moving


def test_repair_takes_the_farthest_distinct_points():
    x = torch.tensor([[0.0], [1.0], [9.0], [9.0], [7.0], [-8.0]])
    centroids = torch.tensor([[0.0], [50.0], [60.0], [70.0]])
    distances = (x - centroids[0]).square().sum(1)
    repaired = repair(x, distances, centroids, torch.tensor([6, 0, 0, 0]), Shards.alone(x))
    assert repaired.flatten().tolist() == [0.0, 9.0, -8.0, 7.0]


def test_repair_leaves_centroids_alone_when_no_point_is_off_its_own():
    x, centroids = torch.ones(3, 1), torch.tensor([[1.0], [5.0]])
    repaired = repair(x, torch.zeros(3), centroids, torch.tensor([3, 0]), Shards.alone(x))
    assert torch.equal(repaired, centroids)


@pytest.mark.parametrize("built", [False, True])
def test_rows_without_a_nearest_centroid_index_nothing(built, monkeypatch):
    """`assign` gives them -1, which is the last one to an index."""
    if not built:
        monkeypatch.setattr(backends, "_cpu", None)
    x = torch.randn(30, 4)
    x[7] = float("nan")
    with pytest.raises(ValueError, match="labels must be 0 to C - 1"):
        lloyd(x, x[:5].clone(), Shards.alone(x), 3)
    labels = (torch.arange(30) % 3).int()
    labels[7] = -1
    centroids = centroids_of(x, labels, 3, Shards.alone(x))
    for j in range(3):
        torch.testing.assert_close(centroids[j], x[labels == j].mean(0))


def test_centroids_of_labels_are_means_and_fill_the_empty():
    x = blobs(300, 4, 6)
    labels = (torch.arange(300) % 5).int()
    centroids = centroids_of(x, labels, 7, Shards.alone(x))
    for label in range(5):
        torch.testing.assert_close(centroids[label], x[labels == label].mean(0))
    for added in centroids[5:]:
        assert (x == added).all(1).any()


@pytest.mark.parametrize("spherical", [False, True])
def test_settled_clusters_change_nothing_but_the_time(spherical, monkeypatch):
    x, calls = normalize(blobs(2000, 8, 40)), []
    start = x[:60].clone()
    monkeypatch.setattr("ifnd_fast.clustering.lloyd.FEW_MOVED", 0.0)
    plain = lloyd(x, start, Shards.alone(x), 50, spherical=spherical)
    monkeypatch.setattr("ifnd_fast.clustering.lloyd.FEW_MOVED", 1.0)
    monkeypatch.setattr(
        "ifnd_fast.clustering.lloyd.reassign_by_movement",
        lambda *given: calls.append(given[-1]) or reassign_by_movement(*given),
    )
    quick = lloyd(x, start, Shards.alone(x), 50, spherical=spherical)
    calls = [moved for moved in calls if not moved.all()]
    assert len(calls) > 5 and any(0 < moved.sum() < 30 for moved in calls)
    assert torch.equal(quick.labels, plain.labels) and torch.equal(quick.centroids, plain.centroids)
    assert quick.n_iter == plain.n_iter


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.floats(0, 1))
def test_reassigning_by_movement_is_assigning(seed, k, share):  # on a grid, where ties abound and are exact
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (50, 2), generator=generator).float()
    before = torch.randint(-2, 3, (k, 2), generator=generator).float()
    after = before + torch.randint(-1, 2, (k, 2), generator=generator) * (torch.rand(k, 1, generator=generator) < share)
    labels = assign(x, before)
    distances = squared_distances(x, labels, before)
    found = reassign_by_movement(x, labels, distances, after, (before != after).any(dim=1))
    assert torch.equal(found, assign(x, after))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 1000), st.integers(64, 200), st.sampled_from([32, 33, 50, 64, 100, 131]),
    st.sampled_from(["unit", "grid", "duplicates", "lengths", "far"]), st.floats(1e-4, 1), st.floats(0, 1),
)  # fmt: skip
def test_bounds_leave_out_nothing_that_matters(seed, k, dim, kind, step, share):
    generator = torch.Generator().manual_seed(seed)
    x, c = moving(kind, 300 + seed % 7, k, dim, generator)
    x[seed % 300] = 0
    nearest = Nearest(x)
    for _ in range(5):
        labels = nearest.update(c, squared_distances(x, nearest.labels, c) if len(nearest.labels) else None)
        assert torch.equal(labels, assign(x, c))
        if nearest.bounds is not None:
            distance = torch.cdist(x.double(), c.double(), compute_mode="donot_use_mm_for_euclid_dist")
            others = distance.scatter(1, labels.long()[:, None], torch.inf).min(1).values
            assert (nearest.bounds.double() <= others).all()
        goes = torch.rand(k, 1, generator=generator) < share
        c = c + goes * step * c.norm(dim=1, keepdim=True) * normalize(torch.randn(k, dim, generator=generator))


def test_settling_rows_are_compared_with_few_centroids():
    extension = backends.extension()
    if extension is None or not extension.isa().startswith(("avx512vnni", "avx512bf16", "amx")):
        pytest.skip("no 8-bit dot products")
    x, c = moving("unit", 3000, 300, 64, torch.Generator().manual_seed(0))
    nearest = Nearest(x)
    nearest.update(c, None)
    c = c.clone()
    c[5] *= 0.99
    nearest.update(c, None)
    assert nearest.bounds is not None and (nearest.bounds > 0).float().mean() > 0.9
