"""Which rows differ, how often each occurs, and where first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from ifnd_fast.clustering.distinct import TooFewDistinct, count_distinct, distinct, distinct_rows, first_occurrences
from ifnd_fast.clustering.shards import Shards


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 3))
def test_first_occurrences_are_those_of_a_search(seed, n, dim):
    rows = torch.randint(-1, 2, (n, dim), generator=torch.Generator().manual_seed(seed)).float()
    seen: dict[tuple[float, ...], list[int]] = {}
    for index, row in enumerate(rows.tolist()):
        seen.setdefault(tuple(row), []).append(index)
    first, counts = first_occurrences(rows)
    assert first.tolist() == [found[0] for found in seen.values()]
    assert counts.tolist() == [len(found) for found in seen.values()]
    assert torch.equal(distinct(rows)[0], rows[first])
    assert torch.equal(distinct_rows(rows, n + 1, Shards.alone(rows)), rows[first])


def test_zeros_of_either_sign_are_equal_and_neighbours_differ():
    next_to_1 = 1 + torch.finfo(torch.float32).eps
    rows = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0], [1.0, 2.0**-149], [next_to_1, 0.0]])
    assert first_occurrences(rows)[0].tolist() == [0, 2, 3, 4]


def test_round_numbers_differ():
    """In their upper bits alone, which a product by an odd number keeps out of the lower ones."""
    rows = 2.0 ** torch.arange(-100, 100)[:, None].float() * torch.tensor([1.0, -1.0, 0.0])
    assert len(distinct(rows)[0]) == 200
    assert len(distinct(rows.repeat(3, 1))[0]) == 200


def test_rows_that_all_differ_are_not_copied():
    rows = torch.arange(10.0)[:, None]
    assert distinct(rows)[0] is rows


@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_the_search_ends_once_there_are_enough(chunk, monkeypatch):
    monkeypatch.setattr("ifnd_fast.ops.chunks.CHUNK_ELEMENTS", chunk)
    rows = torch.arange(40.0).repeat_interleave(5)[:, None].half()
    found = distinct_rows(rows, 4, Shards.alone(rows))
    assert found.dtype == torch.float32 and torch.equal(found, torch.arange(float(len(found)))[:, None])
    assert 4 <= len(found) <= 40 and (chunk > 7 or len(found) <= 5)


def test_copies_that_differ_by_rounding_count_once():
    unit = normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    assert count_distinct(unit, Shards.alone(unit)) == 50
    assert count_distinct(unit[:0], Shards.alone(unit[:0])) == 0
    copies = torch.cat([unit, (unit * 4096).round() / 4096 + 1e-5])
    assert count_distinct(copies, Shards.alone(copies)) == 50


def test_too_few_say_how_many_there_are():
    error = TooFewDistinct(3, 5)
    assert error.distinct == 3 and "only 3 distinct rows, fewer than n_clusters=5" in str(error)
