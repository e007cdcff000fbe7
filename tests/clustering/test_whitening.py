"""Whitening gives directions their say, and does not depend on how rows are dealt out."""

from __future__ import annotations

import pytest
import torch

from ifnd_fast.clustering.shards import Shards
from ifnd_fast.clustering.whitening import whiten


def features(n: int = 400, dim: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([30.0, 10.0, 3.0, 1.0, 0.3, 0.1])[:dim]
    mixed = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    return (torch.randn(n, dim, generator=generator) * scales) @ mixed + 5


def whiten_alone(x: torch.Tensor, power: float) -> torch.Tensor:
    return whiten(x, power, Shards.alone(x))


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_directions_of_the_rows_are_those_of_the_definition(power):
    x = features().double()
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    values, vectors = torch.linalg.eigh(covariance)
    # In the basis of the eigenvectors, so that only the rows' inner products are told.
    wanted = torch.nn.functional.normalize(centred @ vectors / values ** (power / 2))
    found = whiten_alone(features(), power).double()
    assert torch.allclose(found @ found.T, wanted @ wanted.T, atol=1e-5)


def test_full_whitening_makes_every_direction_count_alike():
    x = whiten_alone(features(4000), 1.0)
    assert torch.allclose(x.T @ x / len(x), torch.eye(6) / 6, atol=0.01)


def test_a_constant_direction_is_left_out():
    x = torch.cat([features(), torch.full((400, 2), 7.0)], dim=1)
    found, wanted = whiten_alone(x, 1.0), whiten_alone(features(), 1.0)
    assert torch.allclose(found @ found.T, wanted @ wanted.T, atol=1e-4)


def test_half_precision_stays_half():
    found = whiten_alone(features().half(), 0.5)
    assert found.dtype == torch.float16 and bool(found.isfinite().all())
