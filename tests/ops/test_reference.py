"""The reference backend against the formulas of the paper, written out as sums of Python floats."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ifnd_fast
from tests.ops.cases import INPUTS, STRATEGIES, Case, make_case


def literal_loss(case: Case, i: int) -> float:
    """Query i's loss by the definition: sums over keys of exponentials, nothing shared with the package."""
    rows = {name: getattr(case, name).tolist() for name in INPUTS}
    ids, labels = None, None
    if case.query_ids is not None and case.negative_ids is not None:
        ids = case.query_ids.tolist(), case.negative_ids.tolist()
    if case.query_labels is not None and case.negative_labels is not None:
        labels = case.query_labels.tolist(), case.negative_labels.tolist()

    def similarity(key: list[float]) -> float:
        return math.fsum(a * b for a, b in zip(rows["query"][i], key, strict=True)) / case.temperature

    positive = similarity(rows["positive"][i])
    losses = []
    for level in range(1 if labels is None else len(labels[0][0])):
        detected: list[float] = []
        others: list[float] = []
        for k, key in enumerate(rows["negatives"]):
            if ids is not None and ids[0][i] == ids[1][k] >= 0:
                continue
            is_false = labels is not None and labels[0][i][level] == labels[1][k][level] >= 0
            (detected if is_false and case.false_negatives != "keep" else others).append(similarity(key))
        if case.false_negatives == "attract":
            total = math.fsum(math.exp(s) for s in [positive, *detected, *others])
            pulled = [positive, *detected]
            losses.append(-math.fsum(math.log(math.exp(s) / total) for s in pulled) / len(pulled))
        else:
            total = math.fsum(math.exp(s) for s in [positive, *others])
            losses.append(-math.log(math.exp(positive) / total))
    return math.fsum(losses) / len(losses)


def integers(rows: int, *columns: int, low: int, high: int, dtype: torch.dtype) -> st.SearchStrategy:
    shape = (rows, *columns)
    values = st.lists(st.integers(low, high), min_size=math.prod(shape), max_size=math.prod(shape))
    return values.map(lambda v: torch.tensor(v, dtype=dtype).reshape(shape))


@st.composite
def small_cases(draw) -> Case:
    B, K, D, L = (draw(st.integers(low, high)) for low, high in ((1, 4), (0, 6), (1, 4), (1, 3)))
    case = make_case(
        B, K, D, L, dtype=torch.float64, labels=False, ids=False, scale=draw(st.sampled_from([0.1, 1.0, 5.0])),
        seed=draw(st.integers(0, 999)), temperature=draw(st.sampled_from([0.07, 0.2, 1.0])),
        false_negatives=draw(st.sampled_from(STRATEGIES)),
    )  # fmt: skip
    if draw(st.booleans()):
        case.query_labels = draw(integers(B, L, low=-1, high=2, dtype=torch.int32))
        case.negative_labels = draw(integers(K, L, low=-1, high=2, dtype=torch.int32))
    if draw(st.booleans()):
        case.query_ids = draw(integers(B, low=-2, high=3, dtype=torch.int64))
        case.negative_ids = draw(integers(K, low=-2, high=3, dtype=torch.int64))
    return case


@settings(max_examples=150, deadline=None)
@given(small_cases())
def test_equals_the_literal_definition(case):
    literal = [literal_loss(case, i) for i in range(len(case.query))]
    losses = case.loss(backend="reference")
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, torch.tensor(literal, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    total = math.fsum(literal)
    assert float(case.loss(backend="reference", reduction="sum")) == pytest.approx(total, 1e-10, 1e-12)
    mean = total / len(literal)
    assert float(case.loss(backend="reference", reduction="mean")) == pytest.approx(mean, 1e-10, 1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("extras", [True, False], ids=["labels and ids", "plain"])
def test_gradients_first_and_second(strategy, extras):
    case = make_case(3, 7, 4, 2, dtype=torch.float64, clusters=2, labels=extras, ids=extras, false_negatives=strategy)
    inputs = tuple(getattr(case, name).requires_grad_() for name in INPUTS)

    def losses(*inputs):
        return case.loss(*inputs, backend="reference")

    assert torch.autograd.gradcheck(losses, inputs)
    assert torch.autograd.gradgradcheck(losses, inputs)


@settings(max_examples=25, deadline=None)
@given(small_cases())
def test_strategies_are_equal_without_accepted_labels(case):
    if case.query_labels is not None:
        case = case.with_all_labels(-1)
    eliminated, attracted, kept = (
        replace(case, false_negatives=strategy).results("reference") for strategy in STRATEGIES
    )
    for name, value in kept.items():
        torch.testing.assert_close(eliminated[name], value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(attracted[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_negatives(backend, strategy, dtype):
    results = make_case(5, 0, 8, 2, dtype=dtype, false_negatives=strategy).results(backend)
    assert results["negatives"].shape == (0, 8)
    assert not any(value.any() for value in results.values())  # 0, and so not NaN


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=25, deadline=None)
@given(own=st.lists(st.booleans(), min_size=1, max_size=40), label=st.integers(-1, 1), seed=st.integers(0, 99))
def test_a_key_of_the_same_image_never_counts(backend, strategy, own, label, seed):
    """Whatever its label and however near it is, the result is that without it."""
    case = make_case(1, len(own), 6, 2, clusters=2, seed=seed, false_negatives=strategy)
    mine = torch.tensor(own)
    case.query_ids[:] = 7
    case.negative_ids[:] = torch.where(mine, 7, 8)
    case.negatives[mine] = 100 * case.query
    case.negative_labels[mine] = torch.tensor([label, 1 - label], dtype=torch.int32)
    without = replace(
        case, negatives=case.negatives[~mine], negative_labels=case.negative_labels[~mine],
        query_ids=None, negative_ids=None,
    )  # fmt: skip
    result, expected = case.results(backend), without.results(backend)
    assert not result["negatives"][mine].any()
    result["negatives"] = result["negatives"][~mine]
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_assignment_equals_the_literal_definition(metric):
    torch.manual_seed(0)
    x, c, tau = torch.randn(20, 3).double(), torch.randn(7, 3).double(), 0.3
    labels, confidence = ifnd_fast.assign_clusters(x, c, temperature=tau, metric=metric, backend="reference")
    for i, row in enumerate(x.tolist()):
        similar = [math.fsum(a * b for a, b in zip(row, key, strict=True)) for key in c.tolist()]
        if metric == "l2":
            similar = [-sum((a - b) ** 2 for a, b in zip(row, key, strict=True)) / 2 for key in c.tolist()]
        exponentials = [math.exp(s / tau) for s in similar]
        assert labels[i] == max(range(7), key=similar.__getitem__)
        assert float(confidence[i]) == pytest.approx(max(exponentials) / math.fsum(exponentials), 1e-12)
