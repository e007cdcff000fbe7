"""Figures of features without labels: by their formulas in float64, and at their extremes."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from ifnd_fast.metrics import feature_quality
from ifnd_fast.metrics.feature_quality import alignment, collapse, effective_rank, feature_std, uniformity


def unit_rows(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@given(seed=st.integers(0, 10_000), n=st.integers(2, 30), dim=st.integers(1, 8), chunk=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_figures_are_their_formulas(seed, n, dim, chunk):
    first, second = unit_rows(n, dim, seed), unit_rows(n, dim, seed + 1)
    a, b = first.numpy(), second.numpy()
    p = np.sqrt(np.linalg.eigvalsh(a @ a.T if n < dim else a.T @ a).clip(1e-30))
    p /= p.sum()
    pairs = [((a[i] - a[j]) ** 2).sum() for i, j in combinations(range(n), 2)]
    wanted = [
        math.exp(-(p * np.log(p)).sum()),
        np.mean([np.sqrt(((a[:, d] - a[:, d].mean()) ** 2).mean()) for d in range(dim)]),
        np.mean([sum((x - y) ** 2) for x, y in zip(a, b, strict=True)]),
        math.log(np.mean(np.exp(-2 * np.array(pairs)))),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_quality, "CHUNK", chunk)
        for dtype, error in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
            first, second = first.to(dtype), second.to(dtype)
            found = [effective_rank(first), feature_std(first), alignment(first, second), uniformity(first)]
            assert found == pytest.approx(wanted, rel=error, abs=error)


def test_extremes():
    same, around = torch.ones(50, 16) / 4, torch.cat([torch.eye(16), -torch.eye(16)])
    assert effective_rank(same) == pytest.approx(1) and effective_rank(around) == pytest.approx(16)
    assert feature_std(same) == pytest.approx(0, abs=1e-7) and feature_std(around) == pytest.approx(16**-0.5)
    assert uniformity(same) == pytest.approx(0) and -4.2 < uniformity(around) < -3.5
    assert alignment(around, around) == 0 and alignment(around, -around) == pytest.approx(4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_has_collapsed_and_what_has_not(dtype):
    """Also in bfloat16, whose rounding spreads what is one point or one direction."""
    rows, noise = unit_rows(1000, 64), torch.randn(1000, 1, generator=torch.Generator().manual_seed(1))
    for features, words in (
        (rows[:1].expand(1000, 64), "nearly the same features"),
        (rows[:1] * noise.double().sign(), "one direction alone"),
        (normalize(rows[:1] + noise.double() * rows[1:2]), "one direction alone"),  # an arc
        (rows, None),
        (normalize(rows[:1] + 0.3 * rows), None),  # a cone, as of an untrained encoder
    ):
        features = features.to(dtype)
        found = collapse(effective_rank(features), feature_std(features), 64)
        assert (words in found) if words and found else found == words, found
    assert collapse(1.9, 0.5, 2) is None and collapse(1.0, 0.9, 1) is None  # all that there can be
