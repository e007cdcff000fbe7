"""KMeans against scikit-learn and brute force, its properties and its parameters."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.cluster
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn.functional import normalize

from ifnd_fast.clustering.kmeans import KMeans
from tests.clustering.data import blobs, inertia


@pytest.mark.parametrize("k", [1, 2, 7, 40])
@pytest.mark.parametrize("max_iter", [1, 3, 300])
def test_same_as_scikit_learn_from_the_same_centroids(k, max_iter):
    x = blobs(500, 6, 10, spread=2.0)
    init = x[:k].clone()
    ours = KMeans(k, max_iter=max_iter, init=init).fit(x)
    theirs = sklearn.cluster.KMeans(k, init=init.numpy(), n_init=1, max_iter=max_iter, tol=0).fit(x.numpy())
    assert (ours.labels_.numpy() == theirs.labels_).all()
    assert ours.n_iter_ == theirs.n_iter_
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=1e-5)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
    assert ours.inertia_ == pytest.approx(inertia(x, ours.cluster_centers_), rel=1e-5)


def test_spherical_maximises_cosines():
    x = blobs(400, 5, 6) * torch.rand(400, 1).add(0.1)
    fitted = KMeans(6, spherical=True, max_iter=100).fit(x)
    unit = torch.nn.functional.normalize(x)
    torch.testing.assert_close(fitted.cluster_centers_.norm(dim=1), torch.ones(6))
    assert (fitted.labels_ == (unit @ fitted.cluster_centers_.T).argmax(1)).all()
    for j in range(6):  # converged: each centroid is its members' mean direction
        mean = torch.nn.functional.normalize(unit[fitted.labels_ == j].sum(0), dim=0)
        torch.testing.assert_close(fitted.cluster_centers_[j], mean, atol=1e-5, rtol=0)
    assert fitted.inertia_ == pytest.approx(inertia(unit, fitted.cluster_centers_), rel=1e-5)
    assert (fitted.predict(x) == fitted.labels_).all()


def test_spherical_predict_rounds_half_precision_as_fit_does():
    x = (blobs(500, 3, 6, spread=1.0) * 37).bfloat16()
    fitted = KMeans(100, spherical=True).fit(x)
    assert (fitted.predict(x) == fitted.labels_).all()
    with pytest.raises(ValueError, match="x has a zero vector in row 0"):
        fitted.predict(torch.zeros(1, 3))


def test_spherical_cluster_that_cancels_out_keeps_its_centroid():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    fitted = KMeans(1, spherical=True, init=torch.tensor([[0.0, 2.0]])).fit(x)
    assert fitted.cluster_centers_.tolist() == [[0.0, 1.0]]


small = st.sampled_from([0.0, 1.0, 2.0, -1.0, 0.5])


matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 30), st.integers(1, 3)), elements=small)


@settings(max_examples=150, deadline=None)
@given(matrices, st.integers(1, 8), st.integers(0, 5), st.booleans())
def test_degenerate_data(x, k, seed, use_init):
    distinct = len(np.unique(x, axis=0))
    init = np.zeros((k, x.shape[1]), np.float32) if use_init else "k-means++"  # all clusters but one start empty
    if min(len(x), distinct) < k:
        with pytest.raises(ValueError, match="fewer"):
            KMeans(k, seed=seed, init=init).fit(x)
        return
    t = torch.from_numpy(x)
    fitted = KMeans(k, seed=seed, init=init).fit(t)
    assert fitted.labels_.dtype == torch.int32
    assert torch.bincount(fitted.labels_, minlength=k).min() >= 1
    assert fitted.inertia_ == pytest.approx(inertia(t, fitted.cluster_centers_), rel=1e-5, abs=1e-9)
    assert (fitted.predict(t) == fitted.labels_).all()
    if k == distinct and not use_init:
        assert fitted.inertia_ < 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100), st.integers(1, 300), st.integers(1, 9))
def test_chunking_does_not_change_the_result(seed, chunk, k):
    x = blobs(200, 4, 6, seed=seed)
    whole = KMeans(k, seed=seed).fit(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ifnd_fast.ops.chunks.CHUNK_ELEMENTS", chunk)
        parts = KMeans(k, seed=seed).fit(x)
    torch.testing.assert_close(parts.cluster_centers_, whole.cluster_centers_, atol=1e-5, rtol=1e-5)
    assert (parts.labels_ == whole.labels_).all()


def test_no_cluster_is_empty_however_early_the_run_ends():
    x = blobs(300, 4, 5)
    init = torch.cat([x[:1], x[:1] + 1e3 + torch.arange(19)[:, None]])
    for max_iter in (1, 2, 20):
        fitted = KMeans(20, max_iter=max_iter, init=init).fit(x)
        assert torch.bincount(fitted.labels_, minlength=20).min() >= 1


def test_data_far_from_the_origin():
    x = blobs(300, 4, 3, spread=0.1)
    near = KMeans(3).fit(x)
    far = KMeans(3, init=near.cluster_centers_ + 1e4).fit(x + 1e4)  # x.c: 4e8, in steps of 32
    assert (far.labels_ == near.labels_).all()
    assert (far.predict(x + 1e4) == near.labels_).all()


def test_inertia_never_rises_and_the_callback_counts():
    x = blobs(1000, 8, 30, spread=2.0)
    seen: list[tuple[int, float]] = []
    fitted = KMeans(30, max_iter=15).fit(x, callback=lambda *args: seen.append(args))
    assert [iteration for iteration, _ in seen] == list(range(1, fitted.n_iter_ + 1))
    values = [value for _, value in seen] + [fitted.inertia_]
    assert all(b <= a * (1 + 1e-6) for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("dim", [161, 176, 200, 224, 272, 337, 384, 400, 513, 600, 672, 768, 1024])
def test_rows_of_every_width_go_to_the_nearest_centroid(dim):
    x = normalize(torch.randn(500, dim, generator=torch.Generator().manual_seed(dim)))
    fitted = KMeans(70, max_iter=3).fit(x)
    distance = torch.cdist(x.double(), fitted.cluster_centers_.double(), compute_mode="donot_use_mm_for_euclid_dist")
    own = distance.gather(1, fitted.labels_.long()[:, None])[:, 0]
    assert (own - distance.min(1).values <= 1e-6).all()


def test_tol_is_the_relative_fall_of_the_inertia():
    x = blobs(1000, 8, 30, spread=2.0)
    seen: list[float] = []
    full = KMeans(30, max_iter=100).fit(x, callback=lambda _, value: seen.append(value))
    falls = [(a - b) / a for a, b in zip(seen, seen[1:], strict=False)]
    expected = next(i for i, fall in enumerate(falls, start=2) if fall <= 0.01)
    early = KMeans(30, max_iter=100, tol=0.01).fit(x)
    assert early.n_iter_ == expected < full.n_iter_


def test_the_best_of_several_runs_is_kept():
    x = blobs(500, 3, 12, spread=0.5)
    one = KMeans(12, n_init=1, max_iter=50).fit(x)
    ten = KMeans(12, n_init=10, max_iter=50).fit(x)
    runs: list[int] = []
    KMeans(12, n_init=3).fit(x, callback=lambda iteration, _: runs.append(iteration))
    assert runs.count(1) == 3
    assert ten.inertia_ <= one.inertia_
    assert ten.inertia_ == pytest.approx(inertia(x, ten.cluster_centers_), rel=1e-5)


def test_seeded_by_its_own_generator_only():
    x = blobs(300, 4, 8)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = KMeans(8, seed=5).fit(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    b = KMeans(8, seed=5).fit(x)
    assert torch.equal(a.cluster_centers_, b.cluster_centers_) and torch.equal(a.labels_, b.labels_)
    assert a.inertia_ == b.inertia_


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    x = blobs(300, 8, 5, spread=0.1).to(dtype)
    fitted = KMeans(5, n_init=3).fit(x)
    reference = KMeans(5, n_init=3).fit(x.float())
    assert fitted.cluster_centers_.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (fitted.labels_ == reference.labels_).all()
    assert fitted.inertia_ == pytest.approx(reference.inertia_, rel=1e-3)


def test_numpy_layouts_and_gradients_do_not_matter():
    x = blobs(100, 4, 3)
    expected = KMeans(3).fit(x).labels_
    assert (KMeans(3).fit(np.asfortranarray(x.numpy())).labels_ == expected.numpy()).all()
    assert torch.equal(KMeans(3).fit(x.T.contiguous().T).labels_, expected)
    assert not KMeans(3).fit(x.clone().requires_grad_()).cluster_centers_.requires_grad


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_clusters": 0}, "n_clusters must be an integer of at least 1, got 0"),
        ({"n_clusters": 2.0}, "n_clusters must be an integer"),
        ({"max_iter": 0}, "max_iter must be"),
        ({"n_init": 0}, "n_init must be"),
        ({"seed": -1}, "seed must be"),
        ({"tol": -0.1}, "tol must be"),
        ({"tol": float("nan")}, "tol must be"),
        ({"engine": "magic"}, "engine must be one of"),
        ({"engine": "faiss", "tol": 0.1}, "engine='faiss' knows no tol"),
    ],
)
def test_unfit_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        KMeans(**{"n_clusters": 1, **parameters}).fit(torch.ones(4, 2))
