"""What is unusual, and what is not a number, by every GPU backend: the answers of tests/ops/cases.py all the same."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from ifnd_fast.ops import backends
from ifnd_fast.ops.assign_clusters import middle_of
from ifnd_fast.ops.pair_labels import PairLabels
from tests.gpu.test_operators import DEVICE, assign_by, case_of, data, every_dtype, every_metric, every_strategy, taken
from tests.ops.cases import Case

INF, NAN = math.inf, math.nan
LEFT_OUT = ("Turing",)  # it adds up as Volta does, and holds its numbers where Ampere does


# ---- info_nce -------------------------------------------------------------------------------------------------------


def test_negative_ids_match_nothing(backend):
    """Of unknown images: as if all were different."""
    case = case_of(20, 90, 16, 2)
    unknown = torch.tensor([-1, -2, -(2**31), -(2**63), -(2**32), -1 - 2**40, -(2**62) - 1]).to(DEVICE)
    case.query_ids[:14], case.negative_ids[:21] = unknown.repeat(2), unknown.repeat(3)
    known = dataclasses.replace(case, query_ids=case.query_ids.clone(), negative_ids=case.negative_ids.clone())
    known.query_ids[:14], known.negative_ids[:21] = 1000 + torch.arange(14), 2000 + torch.arange(21)
    expected, found = known.results(backend), case.results(backend)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (case.query_ids[14:, None] == case.negative_ids[21:]).any()  # others still exclude
    case.negative_ids[:21] = 3000
    assert torch.equal(case.results(backend)["loss"], expected["loss"])


def forward_and_backward(backend: str, case: Case) -> list[Tensor]:
    """Past the operator's checks, which on the CPU refuse labels below -1 and on a GPU do not read them."""
    module = backends.module_of(backend, "info_nce")
    labels = PairLabels(case.query_labels, case.negative_labels, case.query_ids, case.negative_ids)
    how = (case.temperature, case.false_negatives, case.level_combination)
    outputs = module.info_nce_forward(case.query, case.positive, case.negatives, labels, *how, True)
    back = module.info_nce_negatives_grad(case.upstream, case.query, case.negatives, labels, *outputs[3:], *how)
    return [*outputs, back]


@pytest.mark.parametrize("strategy", ["eliminate", "attract"])
@pytest.mark.parametrize("L", [3, 6])  # Triton holds four levels of labels, and loops over more
def test_negative_labels_match_nothing(backend, strategy, L):
    case = case_of(20, 90, 16, L, clusters=3, false_negatives=strategy)
    expected = forward_and_backward(backend, case)
    below = torch.tensor([-1, -2, -3, -(2**31), -(2**31) + 1, -(2**16)], dtype=torch.int32).to(DEVICE)
    for labels in (case.query_labels, case.negative_labels):
        none = labels < 0
        assert none.any()
        labels[none] = below.repeat(len(labels) * L)[: int(none.sum())]
    for found, right in zip(forward_and_backward(backend, case), expected, strict=True):
        assert torch.equal(found, right)


@every_strategy
@every_dtype
@pytest.mark.parametrize("logit", [1.3e7, 3e8])
def test_logits_without_a_fraction(backend, strategy, dtype, logit):
    """Where float32 numbers are 1 to 32 apart."""
    case = case_of(9, 70, 16, 3, dtype=taken(dtype, backend), scale=45.0, false_negatives=strategy, temperature=1e-3)
    case.temperature *= case.largest_logit() / logit
    case.upstream *= case.temperature  # that float16 may hold the gradients
    case.positive[:4] = case.negatives[:4]
    case.check(backend)


@every_strategy
@every_dtype
@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_temperatures(backend, strategy, dtype, temperature):
    case = case_of(9, 70, 16, 2, dtype=taken(dtype, backend), false_negatives=strategy, temperature=temperature)
    case.upstream *= temperature
    case.check(backend)


@every_dtype
@pytest.mark.parametrize("scale", [1e-7, 1e-4])  # in float16 subnormal
@pytest.mark.parametrize("temperature", [1e-6, 0.2])
def test_short_rows(backend, dtype, scale, temperature):
    case = case_of(9, 70, 16, 2, dtype=taken(dtype, backend), scale=scale, temperature=temperature)
    case.check(backend)
    results = case.results(backend)
    assert case.negatives.any() and results["query"].any()


@every_dtype
@pytest.mark.parametrize("largest", [1e-42, 1e-30, 1e30])
def test_upstream_gradients_of_any_size(backend, dtype, largest):
    case = case_of(9, 70, 16, 2, dtype=taken(dtype, backend))
    case.upstream *= largest / case.upstream.abs().max()
    if largest == 1e-42:  # which float32 holds with few digits, and a GPU takes for 0
        assert all(value.isfinite().all() for value in case.results(backend).values())
    elif case.query.dtype == torch.float32 or largest < 1:  # float16 holds no such gradient
        case.check(backend)


def test_a_row_that_is_no_number_spoils_its_own_loss_alone(backend):
    for dtype in (torch.float16, torch.float32):
        case = case_of(20, 150, 16, 2, dtype=dtype)
        expected = case.results(backend)
        case.query[3, 5] = NAN
        found = case.loss(backend=backend)
        assert found[3].isnan()
        others = torch.arange(20).to(DEVICE) != 3
        assert torch.equal(found[others], expected["loss"][others])


# ---- assign_clusters ------------------------------------------------------------------------------------------------


@every_metric
@every_dtype
def test_rows_that_are_no_numbers(backend, metric, dtype):
    """Label -1 and confidence NaN for theirs, and the others as they were."""
    x, c = data(70, 33, 0, taken(dtype, backend)), data(40, 33, 1, taken(dtype, backend))
    labels, confidence = assign_by(backend)(x, c, metric=metric)
    x[3], x[17, 5] = NAN, NAN
    spoilt = torch.zeros(70, dtype=torch.bool).to(DEVICE)
    spoilt[[3, 17]] = True
    found, how_sure = assign_by(backend)(x, c, metric=metric)
    assert (found[spoilt] == -1).all() and how_sure[spoilt].isnan().all()
    assert torch.equal(found[~spoilt], labels[~spoilt]) and torch.equal(how_sure[~spoilt], confidence[~spoilt])
    assert torch.equal(assign_by(backend)(x, c, metric=metric, return_confidence=False), found)


@every_metric
@every_dtype
@pytest.mark.parametrize("at", [0, 7, 39])
def test_a_centroid_that_is_no_number(backend, metric, dtype, at):
    """Is no row's nearest; the confidences, sums over all, are NaN."""
    x, c = data(70, 33, 0, taken(dtype, backend)), data(40, 33, 1, taken(dtype, backend))
    others = torch.cat([c[:at], c[at + 1 :]])
    right = assign_by(backend)(x, others, metric=metric, return_confidence=False)
    c[at, 2] = NAN
    labels, confidence = assign_by(backend)(x, c, metric=metric)
    assert torch.equal(labels, right + (right >= at))
    assert confidence.isnan().all()
    assert torch.equal(assign_by(backend)(x, c, metric=metric, return_confidence=False), labels)
    c[:] = NAN
    assert (assign_by(backend)(x, c, metric=metric, return_confidence=False) == -1).all()
    assert (assign_by(backend)(x, c, metric=metric)[0] == -1).all()


def columns_of(first: list[float], rest: float = 1.0, at: dict[int, float] | None = None) -> list[float]:
    c = first + [rest] * 70
    for i, value in (at or {}).items():
        c[i] = value
    return c


@every_metric
@every_dtype
@pytest.mark.parametrize(
    "c",
    [
        columns_of([0.0, 1.0, INF, 2.0, -INF, INF, -INF], at={60: INF, 65: -INF}),
        columns_of([NAN, -INF, -INF, NAN], rest=-INF),
        columns_of([NAN], rest=NAN, at={66: -INF, 69: -INF}),
        columns_of([-INF], rest=-INF),
        columns_of([2.0, -INF, 3.0], at={68: -INF}),
        columns_of([1.0, 5.0, 5.0]),
    ],
)
def test_infinite_similarities(backend, metric, dtype, c):
    """The lowest index of the largest, of infinities too; a softmax of which is no number. "l2" is relative to the
    centroids' middle where they lie far from the origin: for an infinite row that is another thing."""
    x = torch.tensor([1.0, -1.0, INF, -INF, 2.0, NAN, 0.0])[:, None]
    centroids = torch.tensor(c)[:, None]
    middle, far = middle_of(centroids)
    shift = middle.double() if metric == "l2" and far else 0.0
    moved = (centroids.double() - shift).T
    s = (x.double() - shift) * moved - (moved.square() / 2 if metric == "l2" else 0)
    best = torch.where(s.isnan(), -INF, s).amax(1, keepdim=True)
    right = torch.where((s == best).any(1), (s == best).int().argmax(1), -1).int()
    how_sure = 1 / ((s - best) / 0.2).exp().sum(1)
    dtype = taken(dtype, backend)
    labels, confidence = assign_by(backend)(x.to(DEVICE, dtype), centroids.to(DEVICE, dtype), metric=metric)
    assert labels.tolist() == right.tolist()
    torch.testing.assert_close(confidence.cpu().double(), how_sure, rtol=1e-5, atol=0, equal_nan=True)
    alone = assign_by(backend)(x.to(DEVICE, dtype), centroids.to(DEVICE, dtype), metric=metric, return_confidence=False)
    assert alone.tolist() == right.tolist()
