"""assign_clusters by its fused backend: labels equal to the float64 reference's but for near ties, confidence by the
error rule of docs/operators.md, and how it behaves in torch."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ifnd_fast import assign_clusters
from ifnd_fast.ops import reference
from tests.ops.cases import DTYPES, ROUNDING

METRICS = ("inner_product", "l2")
every_metric = pytest.mark.parametrize("metric", METRICS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def similarities(x: Tensor, c: Tensor, metric: str) -> Tensor:
    s = x @ c.T
    return s - c.square().sum(1) / 2 if metric == "l2" else s


def check(
    x: Tensor, c: Tensor, metric: str, temperature: float = 0.2, assign: Callable[..., Any] = assign_clusters
) -> int:
    """The rule for `assign`; returns how many labels differ from the float64 reference's, every one a near tie."""
    how: dict[str, Any] = {"metric": metric, "temperature": temperature}
    labels, confidence = assign(x, c, **how)
    plain_labels, plain = assign_clusters(x, c, backend="reference", **how)
    right_labels, right = assign_clusters(x.double(), c.double(), backend="reference", **how)
    assert labels.dtype == plain_labels.dtype == torch.int32 and labels.shape == (len(x),)
    assert confidence.dtype == plain.dtype == torch.float32 and confidence.shape == (len(x),)
    assert torch.equal(labels, assign(x, c, return_confidence=False, **how))

    # A similarity's rounding: torch's own error in float32, plus 4 units of rounding of a sum of |x_d c_d|.
    s, s32 = similarities(x.double(), c.double(), metric), similarities(x.float(), c.float(), metric)
    size = (x.double().abs() @ c.double().abs().T).max() + (c.double().square().sum(1).max() if metric == "l2" else 0)
    rounding = (s32 - s).abs().max() + ROUNDING * size
    rows, wrong = torch.arange(len(x)), labels != right_labels
    gap = s[rows, right_labels.long()] - s[rows, labels.long()]
    assert (gap[wrong] <= 2 * rounding).all(), f"a label is off by {gap.max():.3g}, rounding is {rounding:.3g}"
    if len(c) > 1:
        best, second = s.topk(2).values.T
        assert not wrong[best - second > 2 * rounding].any()

    error, allowed = ((value - right).abs().max() for value in (confidence, plain))
    allowed += ROUNDING * (1 + size / temperature)
    assert error <= allowed, f"confidence: error {error:.3g}, {allowed:.3g} is allowed"
    return int(wrong.sum())


def data(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32, unit: bool = False) -> Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.normalize(x) if unit else x).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 150), C=st.integers(1, 250), D=st.integers(1, 140), dtype=st.sampled_from(DTYPES),
    metric=st.sampled_from(METRICS), temperature=st.sampled_from([0.05, 0.2, 20.0]), unit=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_ragged_shapes(N, C, D, dtype, metric, temperature, unit, seed):
    check(data(N, D, seed, dtype, unit), data(C, D, seed + 100, dtype, unit), metric, temperature)


@every_metric
@every_dtype
def test_many_points(metric, dtype):
    different = check(data(5000, 96, 0, dtype, unit=True), data(700, 96, 1, dtype, unit=True), metric)
    assert different <= 5  # near ties are few


@every_metric
def test_wide_rows(metric):
    for dim in (2048, 3072):  # 3072: beyond what is screened in 8 bits
        check(data(40, dim), data(17, dim, 1), metric, temperature=50.0)


@every_metric
def test_the_rule_notices_small_mistakes(metric):
    """What a nearly right kernel would give does not pass, so what passes is right."""
    x, c = data(300, 16, unit=True), data(60, 16, 1, unit=True)

    def without_the_last_centroid(x, c, **how):
        return assign_clusters(x, c[:-1], **how)

    def at_another_temperature(x, c, temperature, **how):
        return assign_clusters(x, c, temperature=temperature * 1.0003, **how)

    check(x, c, metric)
    with pytest.raises(AssertionError, match="a label is off"):
        check(x, c, metric, assign=without_the_last_centroid)
    with pytest.raises(AssertionError, match="confidence: error"):
        check(x, c, metric, assign=at_another_temperature)


@every_metric
def test_ties_take_the_lowest_index(metric):
    c = data(150, 33, 1)
    for backend in ("cpu", "reference"):
        zeros = torch.zeros(5, 33)
        assert not assign_clusters(zeros, zeros, return_confidence=False, metric=metric, backend=backend).any()
        labels, confidence = assign_clusters(data(400, 33), c.repeat(3, 1), metric=metric, backend=backend)
        once, confidence_once = assign_clusters(data(400, 33), c, metric=metric, backend=backend)
        assert torch.equal(labels, once)
        torch.testing.assert_close(confidence, confidence_once / 3, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [32, 33, 36, 100, 131])
def test_ties_of_labels_alone_take_the_lowest_index(dim, metric):
    """Equal centroids among others, as few as are scored again one by one, anywhere in a group of those."""
    c = data(70, dim, 1)
    same = torch.arange(7, 70, 3)[:20]
    c[same] = 0.1 * c[0]  # small, so that it is often the nearest by distance
    x = data(300, dim)
    if metric == "inner_product":
        c[same] = 3 * x[0]
    labels = assign_clusters(x, c, return_confidence=False, metric=metric)
    assert (labels == same[0]).sum() > 20
    assert not torch.isin(labels, same[1:]).any()


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_l2_is_the_nearest_by_distance(offset):
    """Against distances by subtraction in float64, on rows of very different lengths."""
    scale = 10.0 ** torch.linspace(-1, 1, 800)[:, None]
    x, c = scale * data(800, 24) + offset, scale[::8] * data(100, 24, 1) + offset
    labels = assign_clusters(x, c, metric="l2", return_confidence=False)
    distance = torch.linalg.vector_norm(x.double()[:, None] - c.double(), dim=2)
    nearest = distance.min(1)
    assert (labels == nearest.indices).float().mean() > 0.99
    chosen = distance.gather(1, labels.long()[:, None])[:, 0]
    rounding = ROUNDING * (c.double().square().sum(1).max() + (x @ c.T).abs().max())
    assert ((chosen.square() - nearest.values.square()) / 2 <= 2 * rounding).all()
    assert not torch.equal(labels, assign_clusters(x, c, return_confidence=False))  # inner product is another thing


def test_metrics_agree_on_unit_rows():
    x, c = data(300, 32, unit=True), data(50, 32, 1, unit=True)
    labels, confidence = assign_clusters(x, c)
    l2_labels, l2_confidence = assign_clusters(x, c, metric="l2")
    assert torch.equal(labels, l2_labels)
    torch.testing.assert_close(confidence, l2_confidence, rtol=1e-5, atol=0)


@every_metric
def test_huge_similarities(metric):
    x, c = 45 * data(100, 16, unit=True), 45 * data(50, 16, 1, unit=True)
    check(x, c, metric)
    assert assign_clusters(x, c, metric=metric)[1].isfinite().all()


@every_metric
def test_inputs_need_not_be_contiguous(metric):
    x, c = data(90, 20), data(30, 20, 1)
    scattered = x.t().contiguous().t(), torch.nn.functional.pad(c, (3, 5))[:, 3:-5]
    assert not any(t.is_contiguous() for t in scattered)
    assert all(map(torch.equal, assign_clusters(*scattered, metric=metric), assign_clusters(x, c, metric=metric)))


# ---- torch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("return_confidence", [True, False])
@every_metric
def test_opcheck(metric, return_confidence):
    arguments = (data(9, 8), data(4, 8, 1), 0.2, metric, return_confidence, "cpu")
    torch.library.opcheck(torch.ops.ifnd_fast.assign_clusters.default, arguments)


@pytest.mark.parametrize("return_confidence", [True, False])
def test_compiled_equals_eager(return_confidence):
    def function(x, c):
        return assign_clusters(2 * x, c - c.mean(0), metric="l2", return_confidence=return_confidence)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for rows in (30, 45):
        x, c = data(rows, 12), data(10, 12, 1)
        if return_confidence:
            assert all(map(torch.equal, compiled(x, c), function(x, c)))
        else:
            assert torch.equal(compiled(x, c), function(x, c))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_gradient_flows(backend):
    x, c = data(9, 8).requires_grad_(), data(4, 8, 1).requires_grad_()
    labels, confidence = assign_clusters(x, c, backend=backend)
    assert not labels.requires_grad and not confidence.requires_grad
    (confidence[:, None] * x).sum().backward()
    assert torch.equal(x.grad, confidence[:, None].expand(9, 8)) and c.grad is None


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_changes_nothing(backend):
    x, c = data(300, 32, unit=True), data(50, 32, 1, unit=True)
    expected = assign_clusters(x, c, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, assign_clusters(x, c, backend=backend), expected))


@every_metric
def test_deterministic(metric):
    """A row's result depends on the row and the centroids only: not on threads, nor on what else is assigned."""
    x, c = data(3000, 64), data(200, 64, 1)
    first = assign_clusters(x, c, metric=metric)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, assign_clusters(x, c, metric=metric), first))
    finally:
        torch.set_num_threads(before)
    part = assign_clusters(x[701:1403], c, metric=metric)
    assert all(torch.equal(a, b[701:1403]) for a, b in zip(part, first, strict=True))
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda _: assign_clusters(x, c, metric=metric), range(12))
    assert all(torch.equal(a, b) for result in together for a, b in zip(result, first, strict=True))


# ---- messages -------------------------------------------------------------------------------------------------------

X, C = torch.ones(10, 8), torch.ones(4, 8)

WRONG = [
    ({"features": [[1.0]]}, TypeError, "features must be a torch.Tensor, got list"),
    ({"features": X.long()}, TypeError, "features must be float32, .* got torch.int64"),
    ({"features": X[0]}, ValueError, r"features must have two dimensions \(rows, D\), got shape \(8,\)"),
    ({"features": X[:, :0]}, ValueError, r"features must have 1 to 16384 columns, got shape \(10, 0\)"),
    ({"features": X[:0]}, ValueError, r"features and centroids must have at least one row .*\(0, 8\)"),
    ({"centroids": C[:0]}, ValueError, r"features and centroids must have at least one row .*\(0, 8\)"),
    ({"centroids": C.numpy()}, TypeError, "centroids must be a torch.Tensor, got ndarray"),
    ({"centroids": C.half()}, TypeError, "centroids must have features's dtype torch.float32, got torch.float16"),
    ({"centroids": C.t()}, ValueError, "centroids must have features's 8 columns, got 4"),
    ({"centroids": C.to("meta")}, ValueError, "centroids must be on features's device cpu, got meta"),
    ({"centroids": C.to_sparse()}, TypeError, "centroids must be a dense tensor"),
    ({"temperature": 0.0}, ValueError, "temperature must be a number from 1e-6 to 1e6, got 0.0"),
    ({"temperature": "warm"}, TypeError, "temperature must be a number, got 'warm'"),
    ({"metric": "cosine"}, ValueError, "metric must be one of .*'inner_product'.* got 'cosine'"),
    ({"backend": "gpu"}, ValueError, "backend must be one of .* got 'gpu'"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_wrong_arguments(wrong, error, message, backend):
    arguments = {"features": X, "centroids": C, "backend": backend} | wrong
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        assign_clusters(**arguments)


@every_metric
@pytest.mark.parametrize("return_confidence", [False, True])
@pytest.mark.parametrize("away", [0.0, 1e5])
def test_the_reference_makes_few_similarities_at_a_time(away, return_confidence, metric, monkeypatch):
    x, c, shapes = data(50, 3, 1) + away, data(7, 3, 2) + away, []
    how = {"metric": metric, "return_confidence": return_confidence, "backend": "reference", "temperature": 1e6}
    whole = assign_clusters(x, c, **how)

    def recorded(rows, centroids, *arguments, definition=reference.assign_clusters):
        shapes.append((len(rows), len(centroids)))
        return definition(rows, centroids, *arguments)

    monkeypatch.setattr(importlib.import_module("ifnd_fast.ops.assign_clusters"), "SIMILARITY_ELEMENTS", 100)
    monkeypatch.setattr(reference, "assign_clusters", recorded)
    parts = assign_clusters(x, c, **how)
    assert shapes == [(14, 7)] * 3 + [(8, 7)]
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
