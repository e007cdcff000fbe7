"""Rows that can't be clustered are refused, and the message says why."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.exceptions import NotFittedError

from ifnd_fast.clustering.kmeans import KMeans
from tests.clustering.data import blobs


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_rows_are_named(bad):
    x = torch.ones(20, 3)
    x[[7, 9], 1] = bad
    with pytest.raises(ValueError, match="x has NaN or infinite values in 2 rows, first in row 7"):
        KMeans(1).fit(x)
    with pytest.raises(ValueError, match="x has NaN.*row 7"):
        KMeans(1).fit(torch.ones(3, 3)).predict(x)
    with pytest.raises(ValueError, match="init has NaN.*row 7"):
        KMeans(20, init=x).fit(torch.ones(20, 3))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 2), ValueError, "x has 3 rows, fewer than n_clusters=4.*at most 3"),
        (torch.zeros(5, 2), ValueError, "x has only 1 distinct rows, fewer than n_clusters=4.*at most 1"),
        (torch.zeros(0, 2), ValueError, "x must have at least one row"),
        (torch.zeros(5), ValueError, "x must have two dimensions"),
        (torch.zeros(5, 0), ValueError, "x must have 1 to 16384 columns"),
        (torch.zeros(5, 2, dtype=torch.int64), TypeError, "x must be float"),
        (np.zeros(5), ValueError, "x must have two dimensions.*Reshape your data"),
        (np.zeros((5, 2), complex), ValueError, "x must be of real numbers, got complex128"),
        ([["a", "b"]], TypeError, "x must be of numbers, got list of <U1"),
        (csr_array(np.eye(3)), TypeError, r"x must be dense.*pass x.toarray\(\)"),
        (torch.full((5, 2), 1e30), ValueError, "x has rows of length up to 1.41e.30.*scale x"),
        (torch.full((5, 2), 1e-30), ValueError, "x has rows of length up to 1.41e-30.*scale x"),
    ],
)
def test_unfit_data(x, error, message):
    with pytest.raises(error, match=message):
        KMeans(4).fit(x)


def test_unfit_init_predict_and_zero_vectors():
    x = blobs(20, 3, 2)
    with pytest.raises(ValueError, match=r"init must have shape .* \(2, 3\), got \(3, 3\)"):
        KMeans(2, init=x[:3]).fit(x)
    with pytest.raises(NotFittedError, match="not fitted"):
        KMeans(2).predict(x)
    with pytest.raises(ValueError, match="X has 2 features, but KMeans is expecting 3 features"):
        KMeans(2).fit(x).predict(x[:, :2])
    x[5] = 0
    with pytest.raises(ValueError, match="x has a zero vector in row 5"):
        KMeans(2, spherical=True).fit(x)
    with pytest.raises(ValueError, match="init has a zero vector in row 1"):
        KMeans(2, spherical=True, init=x[4:6]).fit(x[:5])
