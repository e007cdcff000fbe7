"""Clustering of data far from the origin, and of extreme sizes: what float64 tells apart clearly is told apart."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from torch import Tensor

import ifnd_fast
from ifnd_fast import KMeans
from ifnd_fast.clustering.frame import frame_of
from ifnd_fast.clustering.lloyd import lloyd
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.ops.assign_clusters import is_far

K = 20
GENERATOR = torch.Generator().manual_seed(0)
CENTRES = 2 * torch.randn(K, 12, generator=GENERATOR, dtype=torch.float64)
BLOBS = CENTRES[torch.arange(1200) % K] + 0.3 * torch.randn(1200, 12, generator=GENERATOR, dtype=torch.float64)
COLUMNS = 10.0 ** torch.linspace(-3, 5, 12, dtype=torch.float64)
SINGLE, HALVES = [torch.float32, torch.float64], [torch.float16, torch.bfloat16]

PLACES = {
    "here": (lambda x: x, [*SINGLE, *HALVES]),
    "100 away": (lambda x: x + 100, [*SINGLE, *HALVES]),
    "1000 away": (lambda x: x - 1000, [*SINGLE, torch.float16]),
    "1e5 away": (lambda x: x + 1e5, SINGLE),
    "1e5 away in one direction": (lambda x: x + 1e5 * (torch.arange(12) == 3), SINGLE),
    "1e8 away": (lambda x: x - 1e8, [torch.float64]),
    "1e12 away": (lambda x: x + 1e12, [torch.float64]),
    "columns of all sizes": (lambda x: x * COLUMNS, SINGLE),
    "columns of all sizes, away": (lambda x: (x + 1e4) * COLUMNS, SINGLE),
    "a constant column": (lambda x: torch.cat([x, torch.full((len(x), 1), 1e5, dtype=x.dtype)], 1), SINGLE),
    "1e-20": (lambda x: 1e-20 * x, SINGLE),
    "1e-20, away": (lambda x: 1e-20 * (x + 1e4), SINGLE),
    "1e18": (lambda x: 1e18 * x, SINGLE),
    "1e18, away": (lambda x: 1e18 * (x - 1e4), SINGLE),
    "float16's subnormals": (lambda x: 1e-6 * x, [torch.float16, torch.bfloat16]),
    "float16's largest": (lambda x: 5e3 * x, HALVES),
}
CASES = [pytest.param(move, dtype, id=f"{name}-{dtype}") for name, (move, dtypes) in PLACES.items() for dtype in dtypes]
places = pytest.mark.parametrize(("move", "dtype"), CASES)


def distances(x: Tensor, c: Tensor) -> Tensor:
    """By subtraction, in float64."""
    return torch.stack([(x.double() - centre).norm(dim=1) for centre in c.double()], dim=1)


def check_labels(labels: Tensor, x: Tensor, c: Tensor) -> None:
    """Right for every row whose nearest centroid is clearly the nearest: by 1e-3 of its distance."""
    two = distances(x, c).topk(2, largest=False)
    clear = two.values[:, 1] - two.values[:, 0] > 1e-3 * two.values[:, 1]
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear].long(), two.indices[clear, 0])


@places
def test_k_means(move, dtype):
    """As on the same data in float64 around the origin, from the same start; everything in the data's coordinates."""
    x = move(BLOBS).to(dtype)
    near = x.double() - x.double().mean(0)
    spread = float(near.square().sum(1).mean().sqrt())
    expected = KMeans(K, max_iter=50, init=near[:K] / spread).fit(near / spread)
    seen: list[float] = []
    fitted = KMeans(K, max_iter=50, init=x[:K]).fit(x, callback=lambda _, inertia: seen.append(inertia))
    assert torch.equal(fitted.labels_, expected.labels_)
    assert fitted.cluster_centers_.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    means = torch.stack([x[fitted.labels_ == j].double().mean(0) for j in range(K)])
    rounding = torch.finfo(fitted.cluster_centers_.dtype).eps * means.abs()
    assert ((fitted.cluster_centers_ - means).abs() <= 2 * rounding + 2e-6 * spread).all()
    assert fitted.inertia_ == pytest.approx(float(distances(x, means).min(1).values.square().sum()), rel=1e-3)
    assert seen[-1] == pytest.approx(fitted.inertia_, rel=1e-3) and fitted.n_iter_ == len(seen)
    check_labels(fitted.labels_, x, fitted.cluster_centers_)
    assert torch.equal(fitted.predict(x), fitted.labels_)
    assert torch.equal(fitted.predict(x[:7]), fitted.labels_[:7])


@places
def test_k_means_from_its_own_draws(move, dtype):
    x = move(BLOBS).to(dtype)
    fitted = KMeans(K, n_init=3, seed=1).fit(x)
    check_labels(fitted.labels_, x, fitted.cluster_centers_)
    assert torch.bincount(fitted.labels_, minlength=K).min() > 0
    assert torch.equal(fitted.predict(x), fitted.labels_)


@places
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_assign_clusters(move, dtype, backend):
    x = move(BLOBS).to(dtype)
    if dtype == torch.float64 and backend == "cpu" or not 1e-12 < float(x.double().norm(dim=1).max()) < 1e15:
        return  # products of float32 have to be float32s, as the docstring says
    c = move(CENTRES).to(dtype)
    labels, confidence = ifnd_fast.assign_clusters(x, c, metric="l2", temperature=5.0, backend=backend)
    check_labels(labels, x, c)
    assert torch.equal(ifnd_fast.assign_clusters(x, c, metric="l2", return_confidence=False, backend=backend), labels)
    right = (-distances(x, c).square() / 2 / 5.0).softmax(1).max(1).values
    scale = float(distances(x, c).max()) ** 2 / 5.0  # of the exponents
    assert (confidence.double() - right).abs().max() <= 4e-7 * (12 + scale)


@pytest.mark.parametrize("dtype", [*SINGLE, *HALVES])
def test_where_it_matters_centroids_are_far(dtype):
    c = CENTRES.to(dtype)
    assert not is_far(c) and is_far(c + 100) and not is_far(torch.cat([c, c[:1] + 1e4]))
    assert not is_far(torch.zeros(3, 4, dtype=dtype)) and not is_far(torch.full((3, 4), torch.nan, dtype=dtype))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_outlier_or_a_nan_among_far_centroids(backend):
    x, c = (BLOBS + 1e5).float(), (CENTRES + 1e5).float()
    expected = ifnd_fast.assign_clusters(x, c, metric="l2", return_confidence=False)
    for odd in (0.0, -1e7):
        with_odd = torch.cat([c, torch.full((1, 12), odd)])
        assert torch.equal(
            ifnd_fast.assign_clusters(x, with_odd, metric="l2", return_confidence=False, backend=backend), expected
        )


def test_centroids_of_float64_keep_their_digits():
    x = torch.tensor([[0.0], [0.25], [10.0], [10.25]], dtype=torch.float64) + 1e8
    fitted = KMeans(2).fit(x)
    assert sorted(fitted.cluster_centers_.flatten().tolist()) == [1e8 + 0.125, 1e8 + 10.125]
    assert fitted.inertia_ == pytest.approx(4 * 0.125**2)


def test_where_data_can_stay_nothing_is_copied_or_changed():
    x = BLOBS.float()
    assert frame_of(x, x.double().sum(0), x.double().square().sum(), Shards.alone(x)) is None
    fitted = KMeans(K, max_iter=4, init=x[:K]).fit(x)
    run = lloyd(x, x[:K].clone(), Shards.alone(x), 4)
    assert torch.equal(fitted.cluster_centers_, run.centroids) and torch.equal(fitted.labels_, run.labels)


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_chunks_of_a_frame(rows, monkeypatch):
    whole = KMeans(K, max_iter=8).fit(BLOBS + 1e8)
    monkeypatch.setattr("ifnd_fast.clustering.frame.CHUNK_ELEMENTS", 12 * rows)
    operator = importlib.import_module("ifnd_fast.ops.assign_clusters")  # the function of that name hides it
    monkeypatch.setattr(operator, "SHIFTED_ELEMENTS", 12 * rows)
    parts = KMeans(K, max_iter=8).fit(BLOBS + 1e8)
    assert torch.equal(parts.labels_, whole.labels_)
    torch.testing.assert_close(parts.cluster_centers_, whole.cluster_centers_, rtol=1e-14, atol=1e-5)
    x, c = (BLOBS + 1e5).float(), (CENTRES + 1e5).float()
    check_labels(ifnd_fast.assign_clusters(x, c, metric="l2", return_confidence=False), x, c)


def test_a_warm_start_far_away():
    x = (BLOBS + 1e5).float()
    first = KMeans(K, max_iter=50).fit(x)
    again = KMeans(K, max_iter=50, init=first.cluster_centers_).fit(x)
    assert again.n_iter_ <= 2 and torch.equal(again.labels_, first.labels_)
    with pytest.raises(ValueError, match="init has rows of length up to"):
        KMeans(K, init=x[:K] * 1e30).fit(x)


def test_duplicates_far_away_are_duplicates():
    x = (BLOBS[:5] + 1e5).float().repeat(9, 1)
    assert KMeans(5).fit(x).inertia_ == 0
    with pytest.raises(ValueError, match="only 5 distinct rows.*at most 5"):
        KMeans(6).fit(x)
    assert KMeans(1).fit(torch.full((9, 3), 1e7)).inertia_ == 0


def test_spherical_k_means_of_any_length():
    for scale in (1e-20, 1.0, 1e20):
        fitted = KMeans(K, spherical=True).fit(scale * BLOBS)
        assert torch.equal(fitted.labels_, KMeans(K, spherical=True).fit(BLOBS).labels_)
        assert torch.equal(fitted.predict(scale * BLOBS), fitted.labels_)


def test_predict_follows_the_centroids_that_there_are():
    """Copied, pickled, moved, or set by hand."""
    x = (BLOBS + 1e5).float()
    fitted = KMeans(K).fit(x)
    for other in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        assert torch.equal(other.predict(x), fitted.labels_)
    fitted.cluster_centers_ = fitted.cluster_centers_.clone()
    check_labels(fitted.predict(x), x, fitted.cluster_centers_)
    by_hand = KMeans(K)
    by_hand.cluster_centers_ = CENTRES - 1e8
    check_labels(by_hand.predict(BLOBS - 1e8), BLOBS - 1e8, by_hand.cluster_centers_)


def test_predict_of_rows_out_of_reach():
    fitted = KMeans(2).fit(1e-20 * BLOBS)
    with pytest.raises(ValueError, match="x has rows that are .* away from the data that was fitted"):
        fitted.predict(1e25 * BLOBS)
    assert (fitted.predict(BLOBS) >= 0).all()


def test_one_cluster_and_one_row():
    x = 1e8 + torch.arange(3.0, dtype=torch.float64)[:, None]
    assert KMeans(1).fit(x).cluster_centers_.tolist() == [[1e8 + 1]]
    assert KMeans(1).fit(x[:1]).cluster_centers_.tolist() == [[1e8]]
    assert KMeans(3).fit(x).inertia_ == 0
