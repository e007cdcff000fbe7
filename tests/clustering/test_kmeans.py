from __future__ import annotations

import sys

import numpy as np
import pytest
import sklearn.cluster
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn.functional import normalize

from ifnd_fast.clustering import kmeans
from ifnd_fast.clustering.faiss_engine import faiss_lloyd
from ifnd_fast.clustering.kmeans import KMeans
from ifnd_fast.clustering.lloyd import Nearest, assign, centroids_of, lloyd, reassign_by_movement, repair
from ifnd_fast.clustering.seeding import initial_centroids
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.ops.cluster_sums import cluster_sums, squared_distances


def blobs(n: int, d: int, k: int, seed: int = 0, spread: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=generator) * 3
    which = torch.randint(k, (n,), generator=generator)
    return centres[which] + spread * torch.randn(n, d, generator=generator)


def inertia(x: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(torch.cdist(x.double(), centroids.double()).min(1).values.square().sum())


# --- against scikit-learn and brute force -----------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7, 40])
@pytest.mark.parametrize("max_iter", [1, 3, 300])
def test_same_as_scikit_learn_from_the_same_centroids(k, max_iter):
    x = blobs(500, 6, 10, spread=2.0)
    init = x[:k].clone()
    ours = KMeans(k, max_iter=max_iter).fit(x, init=init)
    theirs = sklearn.cluster.KMeans(k, init=init.numpy(), n_init=1, max_iter=max_iter, tol=0).fit(x.numpy())
    assert (ours.labels_.numpy() == theirs.labels_).all()
    assert ours.n_iter_ == theirs.n_iter_
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=1e-5)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
    assert ours.inertia_ == pytest.approx(inertia(x, ours.cluster_centers_), rel=1e-5)


def test_faiss_agrees_with_fused_from_the_same_centroids():
    x = blobs(2000, 16, 20, spread=2.0)  # wide: the engines refill empty clusters differently
    init = x[:20].clone()
    seen: list[float] = []
    fused = KMeans(20, max_iter=50).fit(x, init=init)
    faiss = KMeans(20, max_iter=50, engine="faiss").fit(x, init=init, callback=lambda i, v: seen.append(v))
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
    fitted = KMeans(1, spherical=True).fit(x, init=torch.tensor([[0.0, 2.0]]))
    assert fitted.cluster_centers_.tolist() == [[0.0, 1.0]]


# --- initial centroids ------------------------------------------------------------------------------------


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


# --- properties -------------------------------------------------------------------------------------------

small = st.sampled_from([0.0, 1.0, 2.0, -1.0, 0.5])
matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 30), st.integers(1, 3)), elements=small)


@settings(max_examples=150, deadline=None)
@given(matrices, st.integers(1, 8), st.integers(0, 5), st.booleans())
def test_degenerate_data(x, k, seed, use_init):
    distinct = len(np.unique(x, axis=0))
    init = np.zeros((k, x.shape[1]), np.float32) if use_init else None  # all clusters but one start empty
    if min(len(x), distinct) < k:
        with pytest.raises(ValueError, match="fewer"):
            KMeans(k, seed=seed).fit(x, init=init)
        return
    fitted = KMeans(k, seed=seed).fit(x, init=init)
    t = torch.from_numpy(x)
    assert fitted.labels_.dtype == torch.int32
    assert torch.bincount(fitted.labels_, minlength=k).min() >= 1
    assert fitted.inertia_ == pytest.approx(inertia(t, fitted.cluster_centers_), rel=1e-5, abs=1e-9)
    assert (fitted.predict(x) == fitted.labels_).all()
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


@pytest.fixture(params=["cpu", "reference"])
def sums_backend(request, monkeypatch):
    """The kernel, and the torch operations that a GPU takes."""
    if request.param == "reference":
        monkeypatch.setattr(kmeans.backends, "_cpu", None)
    elif kmeans.backends._cpu is None:
        pytest.skip("extension not built")
    assert kmeans.backends.choose("auto", "cluster_sums", torch.device("cpu"), torch.float32) == request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("dim", [1, 5, 70])
def test_cluster_sums(dim, dtype, chunk, sums_backend, monkeypatch):
    monkeypatch.setattr("ifnd_fast.ops.chunks.CHUNK_ELEMENTS", chunk)
    x, centroids = torch.randn(1000, dim).to(dtype), torch.randn(7, dim)
    labels = torch.randint(3, (1000,), dtype=torch.int32) * 2  # clusters 1, 3, 5 and 6 stay empty
    sums, counts, distances = cluster_sums(x, labels, centroids)
    expected = torch.zeros(7, dim, dtype=torch.float64).index_add(0, labels.long(), x.double())
    torch.testing.assert_close(sums, expected, atol=1e-4, rtol=1e-5)
    assert counts.tolist() == torch.bincount(labels, minlength=7).tolist()
    expected = (x.double() - centroids[labels.long()].double()).square().sum(1)
    torch.testing.assert_close(distances, expected.float(), rtol=1e-5, atol=0)


def test_sums_of_a_large_cluster_keep_their_digits(sums_backend):  # float32 throughout is off by 3e-3
    x = torch.full((300_000, 1), 0.1)
    sums, _, distances = cluster_sums(x, torch.zeros(len(x), dtype=torch.int32), x[:1])
    assert float(sums) == pytest.approx(300_000 * float(x[0, 0].double()), rel=1e-5)
    assert not distances.any()


@pytest.mark.parametrize("label", [-1, 3, -(2**31), 2**31 - 1])
def test_sums_refuse_labels_out_of_range(label, sums_backend):
    with pytest.raises(ValueError, match="labels must be 0 to C - 1"):
        cluster_sums(torch.ones(2, 1), torch.tensor([0, label], dtype=torch.int32), torch.ones(3, 1))


def test_rows_without_a_nearest_centroid_index_nothing(sums_backend):
    """`assign` gives them -1, which is the last one to an index."""
    x = torch.randn(30, 4)
    x[7] = float("nan")
    with pytest.raises(ValueError, match="labels must be 0 to C - 1"):
        lloyd(x, x[:5].clone(), Shards.alone(x), 3)
    labels = (torch.arange(30) % 3).int()
    labels[7] = -1
    centroids = centroids_of(x, labels, 3, Shards.alone(x))
    for j in range(3):
        torch.testing.assert_close(centroids[j], x[labels == j].mean(0))


def test_cluster_sums_do_not_depend_on_the_number_of_threads():
    x, centroids = torch.randn(5000, 33), torch.randn(40, 33)
    labels = (torch.rand(5000) ** 4 * 40).int()  # the first clusters hold most rows
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(cluster_sums(x, labels, centroids))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


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


def test_no_cluster_is_empty_however_early_the_run_ends():
    x = blobs(300, 4, 5)
    init = torch.cat([x[:1], x[:1] + 1e3 + torch.arange(19)[:, None]])
    for max_iter in (1, 2, 20):
        fitted = KMeans(20, max_iter=max_iter).fit(x, init=init)
        assert torch.bincount(fitted.labels_, minlength=20).min() >= 1


def test_data_far_from_the_origin():
    x = blobs(300, 4, 3, spread=0.1)
    near = KMeans(3).fit(x)
    far = KMeans(3).fit(x + 1e4, init=near.cluster_centers_ + 1e4)  # x.c: 4e8, in steps of 32
    assert (far.labels_ == near.labels_).all()
    assert (far.predict(x + 1e4) == near.labels_).all()


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


def test_inertia_never_rises_and_the_callback_counts():
    x = blobs(1000, 8, 30, spread=2.0)
    seen: list[tuple[int, float]] = []
    fitted = KMeans(30, max_iter=15).fit(x, callback=lambda *args: seen.append(args))
    assert [iteration for iteration, _ in seen] == list(range(1, fitted.n_iter_ + 1))
    values = [value for _, value in seen] + [fitted.inertia_]
    assert all(b <= a * (1 + 1e-6) for a, b in zip(values, values[1:], strict=False))


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


def moving(kind: str, n: int, k: int, dim: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and centroids among which ties, duplicates and extremes abound."""
    x, c = (torch.randn(rows, dim, generator=generator) for rows in (n, k))
    if kind == "grid":
        return (2 * x).round(), (2 * c).round()
    if kind == "duplicates":
        return x, x[:1].repeat(k, 1) + c * (torch.arange(k) % 7 == 0)[:, None]
    if kind == "lengths":
        return x * 10.0 ** torch.linspace(-15, 8, n)[:, None], c * 10.0 ** torch.linspace(-9, 6, k)[:, None]
    if kind == "far":  # from the origin, but not so far that `assign` centres them
        return x + 5, c + 5
    return normalize(c[torch.arange(n) % k] + 0.5 * x), normalize(c)


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


@pytest.mark.parametrize("dim", [161, 176, 200, 224, 272, 337, 384, 400, 513, 600, 672, 768, 1024])
def test_rows_of_every_width_go_to_the_nearest_centroid(dim):
    x = normalize(torch.randn(500, dim, generator=torch.Generator().manual_seed(dim)))
    fitted = KMeans(70, max_iter=3).fit(x)
    distance = torch.cdist(x.double(), fitted.cluster_centers_.double(), compute_mode="donot_use_mm_for_euclid_dist")
    own = distance.gather(1, fitted.labels_.long()[:, None])[:, 0]
    assert (own - distance.min(1).values <= 1e-6).all()


def test_settling_rows_are_compared_with_few_centroids():
    if kmeans.backends._cpu is None or not kmeans.backends._cpu.isa().startswith(("avx512vnni", "avx512bf16")):
        pytest.skip("no 8-bit dot products")
    x, c = moving("unit", 3000, 300, 64, torch.Generator().manual_seed(0))
    nearest = Nearest(x)
    nearest.update(c, None)
    c = c.clone()
    c[5] *= 0.99
    nearest.update(c, None)
    assert nearest.bounds is not None and (nearest.bounds > 0).float().mean() > 0.9


def test_centroids_of_labels_are_means_and_fill_the_empty():
    x = blobs(300, 4, 6)
    labels = (torch.arange(300) % 5).int()
    centroids = centroids_of(x, labels, 7, Shards.alone(x))
    for label in range(5):
        torch.testing.assert_close(centroids[label], x[labels == label].mean(0))
    for added in centroids[5:]:
        assert (x == added).all(1).any()


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
    assert torch.equal(KMeans(3).fit(np.asfortranarray(x.numpy())).labels_, expected)
    assert torch.equal(KMeans(3).fit(x.T.contiguous().T).labels_, expected)
    assert not KMeans(3).fit(x.clone().requires_grad_()).cluster_centers_.requires_grad


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_rows_are_named(bad):
    x = torch.ones(20, 3)
    x[[7, 9], 1] = bad
    with pytest.raises(ValueError, match="x has NaN or infinite values in 2 rows, first in row 7"):
        KMeans(1).fit(x)
    with pytest.raises(ValueError, match="x has NaN.*row 7"):
        KMeans(1).fit(torch.ones(3, 3)).predict(x)
    with pytest.raises(ValueError, match="init has NaN.*row 7"):
        KMeans(20).fit(torch.ones(20, 3), init=x)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 2), ValueError, "x has 3 rows, fewer than n_clusters=4.*at most 3"),
        (torch.zeros(5, 2), ValueError, "x has only 1 distinct rows, fewer than n_clusters=4.*at most 1"),
        (torch.zeros(0, 2), ValueError, "x must have at least one row"),
        (torch.zeros(5), ValueError, "x must have two dimensions"),
        (torch.zeros(5, 0), ValueError, "x must have 1 to 2048 columns"),
        (torch.zeros(5, 2, dtype=torch.int64), TypeError, "x must be float"),
        ([[0.0]], TypeError, "x must be a torch.Tensor"),
        (torch.full((5, 2), 1e30), ValueError, "x has rows of length up to 1.41e.30.*scale x"),
        (torch.full((5, 2), 1e-30), ValueError, "x has rows of length up to 1.41e-30.*scale x"),
    ],
)
def test_unfit_data(x, error, message):
    with pytest.raises(error, match=message):
        KMeans(4).fit(x)


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


def test_unfit_init_predict_and_zero_vectors():
    x = blobs(20, 3, 2)
    with pytest.raises(ValueError, match=r"init must have shape .* \(2, 3\), got \(3, 3\)"):
        KMeans(2).fit(x, init=x[:3])
    with pytest.raises(RuntimeError, match="not fitted"):
        KMeans(2).predict(x)
    with pytest.raises(ValueError, match="x has 2 columns, but the data that was fitted had 3"):
        KMeans(2).fit(x).predict(x[:, :2])
    x[5] = 0
    with pytest.raises(ValueError, match="x has a zero vector in row 5"):
        KMeans(2, spherical=True).fit(x)
    with pytest.raises(ValueError, match="init has a zero vector in row 1"):
        KMeans(2, spherical=True).fit(x[:5], init=x[4:6])
