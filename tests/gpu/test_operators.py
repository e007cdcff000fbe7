"""The GPU kernels by the rules that every backend is held to (tests/ops/cases.py, tests/ops/test_assign.py)."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ifnd_fast
from ifnd_fast.ops import backends
from ifnd_fast.ops.info_nce import COMBINATIONS
from tests.ops import test_assign_clusters
from tests.ops.cases import DTYPES, STRATEGIES, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_metric = pytest.mark.parametrize("metric", test_assign_clusters.METRICS)
case_of = functools.partial(make_case, device=DEVICE)


ON_TURING = ("values", "ragged", "many_points", "wide", "many_levels", "cluster_sums")


@pytest.fixture(autouse=True)
def _little_on_turing(request):
    """It adds up as Volta does and holds its numbers where Ampere does: what is left are shapes and dtypes."""
    if request.node.callspec.params.get("backend") == "Turing" and not any(n in request.node.name for n in ON_TURING):
        pytest.skip("other emulated cards show the same")


def refused(dtype, backend) -> bool:
    """Tensor cores before 8.0 know no bfloat16."""
    reason = backends.refusal(backend, "assign_clusters", torch.device(DEVICE), dtype)
    return dtype == torch.bfloat16 and reason is not None


def taken(dtype, backend):
    """This dtype, where the backend takes it; elsewhere the test is not run, as float16 has one of its own."""
    if refused(dtype, backend):
        pytest.skip("no bfloat16 on this card")
    return dtype


def drawn(dtype, backend):
    """The same where dtypes are drawn: float16 in its place."""
    return torch.float16 if refused(dtype, backend) else dtype


# ---- info_nce -------------------------------------------------------------------------------------------------------


@every_strategy
@every_dtype
def test_values_and_gradients(backend, strategy, dtype):
    case_of(37, 331, 65, 3, dtype=taken(dtype, backend), false_negatives=strategy).check(backend)


@every_strategy
@pytest.mark.parametrize("combination", ["any", "all"])
@pytest.mark.parametrize("L", [3, 6])  # Triton holds four levels of labels, and loops over more
def test_combined_levels(backend, strategy, combination, L):
    case = case_of(20, 150, 33, L, clusters=2, false_negatives=strategy, level_combination=combination)
    case.check(backend)
    if combination == "all" and strategy != "keep":  # one pair of a query and a key in 8, in 64
        apart = dataclasses.replace(case, level_combination="any").results(backend)["loss"]
        assert not torch.allclose(case.results(backend)["loss"], apart, rtol=1e-3)


@settings(max_examples=20, deadline=None)
@given(
    B=st.integers(1, 70), K=st.integers(0, 200), D=st.integers(1, 140), L=st.integers(1, 5), seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES), strategy=st.sampled_from(STRATEGIES), clusters=st.sampled_from([0, 1, 2, 10, 1000]),
    labels=st.booleans(), ids=st.booleans(), temperature=st.sampled_from([0.05, 0.2, 2.0]),
    combination=st.sampled_from(COMBINATIONS),
)  # fmt: skip
def test_ragged_shapes(backend, B, K, D, L, seed, dtype, strategy, clusters, labels, ids, temperature, combination):
    case_of(
        B, K, D, L, dtype=drawn(dtype, backend), clusters=clusters, labels=labels, ids=ids, seed=seed,
        temperature=temperature, false_negatives=strategy, level_combination=combination,
    ).check(backend)  # fmt: skip


@every_strategy
@every_dtype
def test_without_labels(backend, strategy, dtype):
    """There is nothing to take out or to attract, and no second pass has left sums to read."""
    case_of(40, 150, 24, 3, dtype=taken(dtype, backend), labels=False, false_negatives=strategy).check(backend)


@every_strategy
@every_dtype
def test_every_key_a_false_negative(backend, strategy, dtype):
    case = case_of(20, 150, 24, 3, dtype=taken(dtype, backend), ids=False, false_negatives=strategy).with_all_labels(4)
    case.check(backend)
    if strategy == "eliminate":
        assert not any(value.any() for value in case.results(backend).values())
        case.negative_labels[:, -1] = 5  # false negatives at every level but the last
        case.check(backend)


@every_strategy
@every_dtype
def test_huge_logits(backend, strategy, dtype):
    case = case_of(20, 150, 16, 3, dtype=taken(dtype, backend), scale=45.0, false_negatives=strategy)
    assert case.largest_logit() > 5e3
    case.check(backend)


@every_strategy
@pytest.mark.parametrize("D", [129, 300])
def test_rows_wider_than_a_tile(backend, strategy, D):
    case_of(9, 70, D, 2, dtype=torch.float16, false_negatives=strategy).check(backend)


@every_strategy
def test_a_chunk_in_parts(backend, strategy, monkeypatch):
    """As on 8.0, 8.6 and 8.9, whose tiles are not the interpreter's."""
    if backend != "triton":
        pytest.skip("of Triton's tiles")
    from ifnd_fast.kernels import tiles

    monkeypatch.setitem(tiles.TILES, ("info_nce", 2), {None: tiles.Tile(16, 32, 4, 2, marked=16, parts=2)})
    case_of(20, 70, 100, 2, dtype=torch.float16, false_negatives=strategy).check(backend)


@pytest.mark.parametrize("dtype, B", [(torch.float32, 100), (torch.float16, 200)])
def test_few_keys_many_queries(backend, dtype, B):
    """The queries are split, for the keys' gradient. Their rows' lengths differ, in float32 so their terms' units."""
    case = case_of(B, 9, 16, 2, dtype=dtype, clusters=3)
    case.query *= 2.0 ** (torch.arange(B) % 7 - 5).to(case.query)[:, None]
    case.check(backend)


def test_ids_have_64_bits(backend):
    case = case_of(9, 70, 16)
    case.negative_ids[::2] += 2**32
    assert (case.query_ids[:, None] == case.negative_ids % 2**32).any()
    case.check(backend)


def test_small_float16_weights_keep_their_digits(backend):
    """Keys of weight e^{-12.0254} = 100.5 of float16's smallest steps beside some of weight 1: unscaled, half a step is
    lost of each, 0.5 %."""
    case = case_of(1, 4096, 16, dtype=torch.float16, labels=False, ids=False, temperature=1 / 12.0254)
    case.query.zero_()[:, 0] = case.positive.zero_()[:, 2] = 1
    case.negatives.zero_()[:, 1] = 1
    case.negatives[::256] = case.query
    fused = case.results(backend)["query"][0, 1].double()
    right = case.results("reference", dtype=torch.float64)["query"][0, 1]
    assert right != 0 and abs(fused - right) <= 2**-10 * abs(right)


@pytest.mark.parametrize("L, strategy", [(8, "attract"), (16, "eliminate"), (16, "attract")])
def test_many_levels(backend, L, strategy):
    case_of(9, 70, 16, L, clusters=3, false_negatives=strategy).check(backend)


def test_no_label_at_most_keys(backend):
    """Most tiles have no false negative, and are not visited again."""
    case = case_of(70, 500, 32, 2, ids=False, clusters=1000)
    case.negative_labels[:400] = -1
    case.negative_labels[450] = case.query_labels[3] = 7
    case.check(backend)


@every_strategy
def test_the_same_bits_again(backend, strategy):
    case = case_of(20, 150, 33, 3, false_negatives=strategy)
    first, second = case.results(backend), case.results(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_gradients(backend):
    case = case_of(9, 50, 12, 2)
    expected = case.loss(backend=backend)
    case.query.requires_grad_()
    assert torch.equal(case.loss(backend=backend), expected)


# ---- assign_clusters ------------------------------------------------------------------------------------------------


def assign_by(backend):
    return functools.partial(ifnd_fast.assign_clusters, backend=backend)


def data(*args, **kwargs):
    return test_assign_clusters.data(*args, **kwargs).to(DEVICE)


@settings(max_examples=20, deadline=None)
@given(
    N=st.integers(1, 150), C=st.integers(1, 200), D=st.integers(1, 140), dtype=st.sampled_from(DTYPES),
    metric=st.sampled_from(test_assign_clusters.METRICS), temperature=st.sampled_from([0.05, 0.2, 20.0]),
    unit=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_assign_ragged_shapes(backend, N, C, D, dtype, metric, temperature, unit, seed):
    x, c = data(N, D, seed, drawn(dtype, backend), unit), data(C, D, seed + 100, drawn(dtype, backend), unit)
    test_assign_clusters.check(x, c, metric, temperature, assign_by(backend))


@every_metric
@every_dtype
def test_assign_many_points(backend, metric, dtype):
    x, c = data(700, 96, 0, taken(dtype, backend), unit=True), data(300, 96, 1, taken(dtype, backend), unit=True)
    assert test_assign_clusters.check(x, c, metric, assign=assign_by(backend)) <= 5  # near ties are few


@every_metric
def test_assign_wide_rows(backend, metric):
    test_assign_clusters.check(data(40, 300), data(17, 300, 1), metric, temperature=50.0, assign=assign_by(backend))


@every_metric
def test_ties_take_the_lowest_index(backend, metric):
    zeros = torch.zeros(5, 33, device=DEVICE)
    assign = assign_by(backend)
    assert not assign(zeros, zeros, return_confidence=False, metric=metric).any()
    # Eighths: every sum is exact. The interpreter's products are BLAS's, which on some CPUs sums columns differently.
    points, centroids = ((8 * rows).round() / 8 for rows in (data(100, 33), data(150, 33, 1)))
    labels, confidence = assign(points, centroids.repeat(3, 1), metric=metric)
    assert labels.max() < 150 and (confidence <= 1 / 3 + 1e-5).all()


# ---- cluster_sums ---------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("dim", [1, 33, 96])
def test_cluster_sums(backend, dim, dtype):
    if backend == "triton":
        pytest.skip("Triton has no cluster_sums")
    x, centroids = data(300, dim, 0, dtype), data(7, dim, 1)
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 6, (300,), generator=generator).to(DEVICE, torch.int32)  # cluster 6 is empty
    sums, counts, distances = backends.module_of(backend, "cluster_sums").cluster_sums(x, labels, centroids)
    own = torch.nn.functional.one_hot(labels.long(), 7).double()
    right = own.T @ x.double()
    assert sums.dtype == torch.float64 and (sums - right).abs().max() <= 1e-12 * right.abs().max()
    assert counts.tolist() == own.sum(0).tolist()
    squares = (x.double() - centroids.double()[labels.long()]).square().sum(1)
    assert ((distances - squares).abs() <= (dim + 4) * 2.0**-24 * squares).all()
    again = backends.module_of(backend, "cluster_sums").cluster_sums(x, labels, centroids)
    assert torch.equal(sums, again[0]) and torch.equal(distances, again[2])
