"""KMeans as an estimator of scikit-learn's: its own checks, its pipelines, data frames, and what is refused."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pandas
import pytest
import torch
from sklearn import config_context
from sklearn.base import clone, is_clusterer
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from ifnd_fast import KMeans
from tests.clustering.data import blobs

X = blobs(200, 4, 5)


UNMET = {
    "check_sample_weight_equivalence_on_dense_data": "rows in another order meet other random numbers; scikit-learn's "
    "own KMeans doesn't meet it either",
}


@pytest.mark.filterwarnings("ignore:Estimator KMeans does not inherit")
def test_scikit_learns_own_checks():
    # Some of them give 4 distinct rows: more clusters than those are an error here, a warning there.
    results = check_estimator(KMeans(2), expected_failed_checks=UNMET, on_fail=None, on_skip=None)
    assert [result for result in results if result["status"] == "failed"] == []
    assert {result["check_name"] for result in results if result["status"] == "xfail"} == set(UNMET)
    assert sum(result["status"] == "passed" for result in results) > 40


def test_what_takes_long_to_import_is_not_imported():
    """Neither scikit-learn nor torch's compiler, at the first fit or before: each takes about as long as clustering
    100,000 rows."""
    code = "import sys, torch, ifnd_fast; before = set(sys.modules); "
    code += "ifnd_fast.KMeans(90).fit(torch.randn(500, 9)).predict(torch.eye(9)); "
    code += "print({name.partition('.')[0] for name in sys.modules if 'sklearn' in name} "
    code += "| {name for name in set(sys.modules) - before if not name.startswith('ifnd_fast')})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_parameters():
    start = X[:3].numpy()
    kmeans = KMeans(3, init=start, max_iter=7)
    assert kmeans.get_params()["init"] is start and kmeans.get_params()["max_iter"] == 7
    assert (clone(kmeans).init == start).all() and clone(kmeans).max_iter == 7
    assert kmeans.set_params(max_iter=2, init="random") is kmeans
    assert repr(kmeans) == "KMeans(n_clusters=3, init='random', max_iter=2)"
    assert repr(KMeans(init=torch.eye(2))) == "KMeans(init=[[1. 0.]\n [0. 1.]])"
    with pytest.raises(ValueError, match="KMeans has no parameter 'n_cluster', only n_clusters, init"):
        kmeans.set_params(n_cluster=4)
    for bad in ("k-means", "k-means||"):
        with pytest.raises(ValueError, match="init must be one of"):
            KMeans(2, init=bad).fit(X)
    for bad in (None, torch.randn):
        with pytest.raises(TypeError, match=r"init must be one of .* or centroids \(C, D\), got"):
            KMeans(2, init=bad).fit(X)


def test_what_fit_took_once_is_refused():
    for centroids in (X[:5], X[:5].numpy(), X[:4], X[:5].tolist()):
        with pytest.raises(TypeError, match=r"y, of shape .* pass KMeans\(n_clusters, init=centroids\)"):
            KMeans(5).fit(X, centroids)
    with pytest.raises(TypeError, match=r"pass fit\(x, callback=function\)"):
        KMeans(5).fit(X, None, print)
    assert KMeans(5).fit(X, np.zeros(200)).n_iter_  # a y, as pipelines give it
    assert KMeans(5).fit(X, np.zeros((200, 2))).n_iter_
    assert KMeans(5).fit(X, [[0]] * 100 + [[0, 1]] * 100).n_iter_


def test_what_comes_in_as_an_array_goes_out_as_one():
    ours = KMeans(5).fit(X)
    for rows in (X.numpy(), X.numpy().astype(">f4"), X.tolist(), pandas.DataFrame(X.numpy())):
        fitted = KMeans(5).fit(rows)
        for found in (fitted.labels_, fitted.predict(rows), KMeans(5).fit_predict(rows)):
            assert type(found) is np.ndarray and found.dtype == np.int32 and (found == ours.labels_.numpy()).all()
        assert type(fitted.cluster_centers_) is type(fitted.transform(rows)) is np.ndarray
        assert isinstance(fitted.predict(X), torch.Tensor)
        assert fitted.n_features_in_ == 4
        again = pickle.loads(pickle.dumps(fitted))
        assert (again.predict(rows) == fitted.labels_).all() and again.inertia_ == fitted.inertia_
    whole = (10 * X).round().int().numpy()
    as_floats = KMeans(np.int64(5), seed=np.uint8(3)).fit(whole.astype(np.float64))
    assert (KMeans(5, seed=3).fit(whole).labels_ == as_floats.labels_).all()
    assert as_floats.cluster_centers_.dtype == np.float64


@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transform_and_score(dtype, offset):
    x = X.to(dtype) + offset
    fitted = KMeans(7).fit(x)
    wanted = euclidean_distances(x.double(), fitted.cluster_centers_.double())
    assert fitted.transform(x).dtype == dtype
    np.testing.assert_allclose(fitted.transform(x), wanted, rtol=1e-5, atol=1e-3 * bool(offset))
    np.testing.assert_allclose(fitted.transform(x)[:3], KMeans(7).fit_transform(x)[:3])
    assert fitted.score(x) == pytest.approx(-fitted.inertia_, rel=1e-6)
    assert fitted.score(x, None, 2) == pytest.approx(2 * fitted.score(x))
    spherical = KMeans(7, spherical=True).fit(x)
    assert spherical.score(x) == pytest.approx(-spherical.inertia_, rel=1e-6)
    assert (spherical.transform(3 * x).argmin(1) == spherical.labels_).all()


def test_in_a_pipeline_and_a_search():
    assert is_clusterer(KMeans())
    pipeline = make_pipeline(StandardScaler(), KMeans(5)).fit(X.numpy(), kmeans__sample_weight=np.ones(200))
    scaled = StandardScaler().fit_transform(X.numpy())
    assert (pipeline.predict(X.numpy()) == KMeans(5).fit(scaled).labels_).all()
    assert list(pipeline.get_feature_names_out()) == [f"kmeans{number}" for number in range(5)]
    search = GridSearchCV(KMeans(), {"n_clusters": [1, 5]}, cv=2).fit(X.numpy())
    assert search.best_params_ == {"n_clusters": 5}


def test_names_of_columns():
    frame = pandas.DataFrame(X.numpy(), columns=list("abcd"))
    fitted = KMeans(5).fit(frame)
    assert list(fitted.feature_names_in_) == list("abcd")
    with pytest.raises(ValueError, match="feature names should match those that were passed during fit"):
        fitted.predict(frame[list("bacd")])
    assert not hasattr(fitted.fit(X), "feature_names_in_")


def test_data_frames_out():
    frame = pandas.DataFrame(X.numpy(), columns=list("abcd"), index=range(7, 207))
    pipeline = make_pipeline(StandardScaler(), KMeans(5)).set_output(transform="pandas")
    distances = clone(pipeline).fit(frame).transform(frame)
    assert list(distances.columns) == [f"kmeans{number}" for number in range(5)]
    assert (distances.index == frame.index).all() and distances.to_numpy().min() >= 0
    with config_context(transform_output="pandas"):
        fitted = KMeans(5).fit(frame)
        assert (fitted.transform(frame).index == frame.index).all()
        assert isinstance(fitted.transform(X), torch.Tensor)
        assert type(fitted.set_output(transform="default").transform(frame)) is np.ndarray  # its own comes first
    with pytest.raises(ValueError, match="transform must be one of"):
        fitted.set_output(transform="arrow")


def test_what_is_no_number_is_named():
    for rows in (pandas.DataFrame({"a": [1, 2], "b": ["1", "two"]}), [[1], [1, 2]]):
        with pytest.raises(ValueError, match="^x must be of numbers: "):
            KMeans(1).fit(rows)


def test_random_rows_to_start_from():
    starts = []
    for seed in range(3):
        seen: list[float] = []
        KMeans(5, init="random", seed=seed).fit(X, callback=lambda _, inertia, seen=seen: seen.append(inertia))
        starts.append(seen[0])
    assert len(set(starts)) == 3
    with pytest.raises(ValueError, match="only 2 distinct rows"):
        KMeans(3, init="random").fit(X[:2].repeat(9, 1))
