"""symmetric_info_nce against the sums of its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ifnd_fast
from tests.ops.cases import STRATEGIES, make_case

every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def literal(left: Tensor, right: Tensor, ids: list[int], labels: list[int], strategy: str) -> list[float]:
    """Each pair's loss at one level, in Python's numbers."""
    s = (left.double() @ right.double().T / 0.2).tolist()

    def one(of: list[list[float]], i: int) -> float:
        others = [k for k in range(len(of)) if k != i and not (ids[k] == ids[i] >= 0)]
        detected = [k for k in others if strategy != "keep" and labels[k] == labels[i] >= 0]
        total = math.exp(of[i][i]) + sum(
            math.exp(of[i][k]) for k in others if strategy == "attract" or k not in detected
        )
        pulled = [of[i][i]] + [of[i][k] for k in detected if strategy == "attract"]
        return math.log(total) - sum(pulled) / len(pulled)

    transposed = [list(column) for column in zip(*s, strict=True)]
    return [(one(s, i) + one(transposed, i)) / 2 for i in range(len(s))]


@every_backend
@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 12), D=st.integers(1, 9), seed=st.integers(0, 99), strategy=st.sampled_from(STRATEGIES),
    ids=st.lists(st.integers(-2, 5), min_size=12, max_size=12),
    labels=st.lists(st.integers(-1, 3), min_size=12, max_size=12),
)  # fmt: skip
def test_equals_the_literal_definition(backend, B, D, seed, strategy, ids, labels):
    case = make_case(B, 1, D, seed=seed)
    ids, labels = ids[:B], labels[:B]
    found = ifnd_fast.symmetric_info_nce(
        case.query, case.positive, ids=torch.tensor(ids), labels=torch.tensor(labels).int()[:, None],
        false_negatives=strategy, reduction="none", backend=backend,
    )  # fmt: skip
    expected = literal(case.query, case.positive, ids, labels, strategy)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["eliminate", "attract", "margin"])
def test_gradients_of_both_towers_and_the_temperature(strategy):
    case = make_case(20, 1, 12, 2)
    results = []
    for backend in ("cpu", "reference"):
        left, right, temperature = case.query.clone(), case.positive.clone(), torch.tensor(0.07)
        inputs = [t.requires_grad_() for t in (left, right, temperature)]
        loss = ifnd_fast.symmetric_info_nce(
            left, right, temperature=temperature, labels=case.query_labels, false_negatives=strategy, margin=0.05,
            backend=backend,
        )  # fmt: skip
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_of_plain_pairs_it_is_the_mean_of_two_cross_entropies():
    case = make_case(16, 1, 8)
    s = case.query @ case.positive.T / 0.2
    target = torch.arange(16)
    clip = (torch.nn.functional.cross_entropy(s, target) + torch.nn.functional.cross_entropy(s.T, target)) / 2
    torch.testing.assert_close(ifnd_fast.symmetric_info_nce(case.query, case.positive), clip)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"left": None}, TypeError, "left must be a torch.Tensor, got NoneType"),
        ({"right": [1]}, TypeError, "right must be a torch.Tensor, got list"),
        ({"right": torch.ones(5, 3)}, ValueError, r"right must have left's shape \(4, 3\), got \(5, 3\)"),
        ({"ids": torch.ones(4)}, TypeError, "ids must be torch.int64, got torch.float32"),
        ({"ids": torch.ones(3).long()}, ValueError, r"ids must have shape \(4\), got \(3,\)"),
    ],
)
def test_wrong_arguments(wrong, error, message):
    with pytest.raises(error, match=message):
        ifnd_fast.symmetric_info_nce(**{"left": torch.ones(4, 3), "right": torch.ones(4, 3)} | wrong)
