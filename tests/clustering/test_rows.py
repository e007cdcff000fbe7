"""Rows that can't be clustered are refused, and the message says why."""

from __future__ import annotations

import pytest
import torch

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
