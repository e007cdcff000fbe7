"""What is unknown, not a number, or at the ends of the ranges: the same stated answer in every backend."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

import ifnd_fast
from ifnd_fast import IFNDLoss, KMeans, NegativeQueue, PseudoLabels
from ifnd_fast.ops import checks
from tests.ops.cases import COMBINATIONS, DTYPES, STRATEGIES, make_case
from tests.ops.test_assign_clusters import METRICS, check, data

BACKENDS = ("cpu", "reference")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_metric = pytest.mark.parametrize("metric", METRICS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
NAN, INF = float("nan"), float("inf")

# ---- unknown ids and labels -----------------------------------------------------------------------------------------


@every_backend
@every_strategy
@pytest.mark.parametrize("unknown", [-1, -2, -(2**31), -(2**32) + 5, -(2**63)])
def test_an_id_below_zero_is_no_ones(backend, strategy, unknown):
    """The result is that of ids which no two have; -2^32 + 5 has the low half of id 5."""
    case = make_case(12, 150, 24, 2, ids=False, false_negatives=strategy)
    ids, keys = torch.arange(12) % 6, torch.arange(150) % 9
    ids[::2], keys[::3] = unknown, unknown
    known, known_keys = ids.clone(), keys.clone()
    known[::2], known_keys[::3] = torch.arange(1000, 1006), torch.arange(2000, 2050)
    found = replace(case, query_ids=ids, negative_ids=keys).results(backend)
    for name, value in replace(case, query_ids=known, negative_ids=known_keys).results(backend).items():
        assert torch.equal(found[name], value), name


@every_backend
def test_all_ids_unknown(backend):
    case = make_case(12, 150, 24, 2, ids=False)
    unknown = replace(case, query_ids=torch.full((12,), -1), negative_ids=torch.full((150,), -1))
    assert float(unknown.loss(backend=backend).mean()) > 1
    assert torch.equal(unknown.loss(backend=backend), case.loss(backend=backend))


@every_backend
def test_keys_without_ids_in_a_queue_are_negatives(backend):
    """A queue fed without indices, and queries whose indices aren't known: once a loss of 0."""
    queue = NegativeQueue(32, 16, 1)
    keys = data(32, 16, unit=True)
    queue.enqueue(keys)
    negatives, labels, ids = queue.negatives()
    query, positive = data(8, 16, 1, unit=True), data(8, 16, 2, unit=True)
    criterion = IFNDLoss(backend=backend)
    unknown = torch.full((8,), -1)
    found = criterion(query, positive, negatives, labels[:8], labels, unknown, ids)
    torch.testing.assert_close(found, criterion(query, positive, negatives))
    assert float(found) > 1


@every_backend
@every_strategy
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_unaccepted_labels_match_nothing(backend, strategy, combination):
    case = make_case(12, 150, 24, 3, false_negatives=strategy, level_combination=combination).with_all_labels(-1)
    plain = replace(case, query_labels=None, negative_labels=None, false_negatives="keep", level_combination="mean")
    torch.testing.assert_close(case.loss(backend=backend), plain.loss(backend=backend), rtol=1e-5, atol=1e-6)


# ---- similarities that are not numbers ------------------------------------------------------------------------------


def stated(x: Tensor, c: Tensor, metric: str) -> tuple[list[int], list[bool]]:
    """Labels by the rule, and whether the confidence is NaN; similarities summed one by one, in float64."""
    labels, unsure = [], []
    for row in x.double().tolist():
        similar = [sum(a * b for a, b in zip(row, key, strict=True)) for key in c.double().tolist()]
        if metric == "l2":
            halves = [sum(b * b for b in key) / 2 for key in c.double().tolist()]
            similar = [s - h for s, h in zip(similar, halves, strict=True)]
        numbers = [s for s in similar if s == s]
        labels.append(similar.index(max(numbers)) if numbers else -1)
        unsure.append(len(numbers) < len(similar) or not -INF < max(numbers) < INF)
    return labels, unsure


@every_backend
@every_metric
@every_dtype
@pytest.mark.parametrize("clusters", [1, 2, 7, 64, 150])
@pytest.mark.parametrize("dim", [1, 3, 40, 384])
def test_rows_that_are_not_numbers(backend, metric, dtype, clusters, dim):
    x, c = data(70, dim, 0, dtype), data(clusters, dim, 1, dtype)
    x[3, 0], x[4], x[17, -1], x[69] = NAN, NAN, NAN, NAN
    labels, confidence = ifnd_fast.assign_clusters(x, c, metric=metric, backend=backend)
    alone = ifnd_fast.assign_clusters(x, c, metric=metric, backend=backend, return_confidence=False)
    bad = torch.tensor([3, 4, 17, 69])
    assert (labels[bad] == -1).all() and (alone[bad] == -1).all()
    assert confidence[bad].isnan().all() and int(confidence.isnan().sum()) == 4
    good = x.isfinite().all(1)
    clean, sure = ifnd_fast.assign_clusters(x[good], c, metric=metric, backend=backend)
    assert torch.equal(labels[good], clean) and torch.equal(alone[good], clean)
    torch.testing.assert_close(confidence[good], sure, rtol=1e-5, atol=1e-7)


@every_backend
@every_metric
@every_dtype
@pytest.mark.parametrize("which", [[0], [5], [63], [99], [0, 1, 2], list(range(99)), list(range(100))])
def test_centroids_that_are_not_numbers(backend, metric, dtype, which):
    """Never the nearest; the others are as if it were not there."""
    x, c = data(50, 40, 0, dtype), data(100, 40, 1, dtype)
    c[torch.tensor(which), 7] = NAN
    labels, confidence = ifnd_fast.assign_clusters(x, c, metric=metric, backend=backend)
    alone = ifnd_fast.assign_clusters(x, c, metric=metric, backend=backend, return_confidence=False)
    assert confidence.isnan().all() and torch.equal(alone, labels)
    good = torch.tensor([j for j in range(100) if j not in which], dtype=torch.int64)
    if len(good) == 0:
        assert (labels == -1).all()
        return
    right = ifnd_fast.assign_clusters(x, c[good], metric=metric, backend="reference", return_confidence=False)
    assert torch.equal(labels.long(), good[right.long()])


@every_backend
@every_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinite_similarities(backend, metric, dtype):
    """The lowest index of the largest, infinite or not."""
    x = torch.tensor([[1.0, 0.0], [INF, 1.0], [-INF, 1.0], [1.0, 1.0], [0.0, 0.0], [INF, -INF]]).to(dtype)
    c = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [2.0, 2.0], [2.0, 2.0], [-1.0, -1.0]]).to(dtype)
    wanted, unsure = stated(x, c, metric)
    labels, confidence = ifnd_fast.assign_clusters(x, c, metric=metric, backend=backend)
    assert labels.tolist() == wanted and confidence.isnan().tolist() == unsure
    assert ifnd_fast.assign_clusters(x, c, metric=metric, backend=backend, return_confidence=False).tolist() == wanted


# ---- the ends of the ranges -----------------------------------------------------------------------------------------

ENDS = [1e-6, 1e-3, 0.2, 1e3, 1e6]


@every_strategy
@every_dtype
@pytest.mark.parametrize("temperature", ENDS)
@pytest.mark.parametrize("scale", [1.0, 1e-7, 10.0])
def test_losses_at_every_temperature(strategy, dtype, temperature, scale):
    """Logits up to 1e8 and down to 1e-20; rows of 1e-7 are subnormal in float16. Upstream gradients are such that
    float16 holds what comes of them."""
    case = make_case(20, 300, 16, 3, dtype=dtype, scale=scale, temperature=temperature, false_negatives=strategy)
    case.upstream *= min(1.0, temperature)
    if scale == 10 and temperature == 1e-6:
        assert case.largest_logit() > 5e7
    case.check()


@every_dtype
@every_metric
@pytest.mark.parametrize("temperature", ENDS)
@pytest.mark.parametrize("scale", [1.0, 1e-7, 10.0])
def test_confidences_at_every_temperature(dtype, metric, temperature, scale):
    x, c = (scale * data(n, 16, n, unit=True) for n in (100, 70))
    check(x.to(dtype), c.to(dtype), metric, temperature)
    for backend in BACKENDS:
        _, confidence = ifnd_fast.assign_clusters(
            x.to(dtype), c.to(dtype), metric=metric, temperature=temperature, backend=backend
        )
        assert confidence.isfinite().all() and (confidence >= 1 / 70 - 1e-6).all() and (confidence <= 1).all()


@every_backend
@every_strategy
def test_gradients_stay_finite_where_one_logit_towers(backend, strategy):
    case = make_case(6, 50, 16, 2, temperature=1e-6, false_negatives=strategy)
    case.negatives[3], case.positive[2] = 100 * case.query[1], -100 * case.query[2]
    right = case.results("reference", dtype=torch.float64)
    for name, value in case.results(backend).items():
        assert value.isfinite().all(), name
        torch.testing.assert_close(value.double(), right[name], rtol=1e-4, atol=1e-4 * float(right[name].abs().max()))


TAKES_TEMPERATURE = {
    "info_nce": lambda t: ifnd_fast.info_nce(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2), temperature=t),
    "assign_clusters": lambda t: ifnd_fast.assign_clusters(torch.ones(2, 2), torch.ones(2, 2), temperature=t),
    "IFNDLoss": lambda t: IFNDLoss(t),
    "PseudoLabels": lambda t: PseudoLabels((2,), temperature=t),
    "cluster_levels": lambda t: ifnd_fast.cluster_levels(torch.eye(3), (2,), temperature=t),
}


@pytest.mark.parametrize("take", TAKES_TEMPERATURE)
def test_temperatures(take):
    for good in (1e-6, 1e6, 1, np.float32(0.5), np.float64(0.5), np.int64(2), Fraction(1, 2)):
        TAKES_TEMPERATURE[take](good)
    for bad in (0.99e-6, 1.01e6, 0, -1, -0.0, NAN, INF, -INF, 1e-30, 1e30, 10**400):
        with pytest.raises(ValueError, match="temperature must be a number from 1e-6 to 1e6, got"):
            TAKES_TEMPERATURE[take](bad)
    for bad in (True, False, "0.2", None, 1j, [0.2], np.array(0.2), np.array([0.2]), np.bool_(True), b"1"):
        with pytest.raises(TypeError, match="temperature must be a number, got"):
            TAKES_TEMPERATURE[take](bad)
    if take in ("info_nce", "IFNDLoss"):
        return  # which take a learned one
    with pytest.raises(TypeError, match=r"temperature must be a number, got a \(\) tensor.*pass its float\(\)"):
        TAKES_TEMPERATURE[take](torch.tensor(0.2))


# ---- numbers that are none ------------------------------------------------------------------------------------------

NOT_COUNTS = [True, False, 2.0, "3", None, NAN, np.float64(2), torch.tensor(3), np.array([3]), 0, -1, 1j]
MAKES_COUNTS = {
    "n_clusters": lambda n: KMeans(n).fit(torch.eye(4)),
    "max_iter": lambda n: KMeans(1, max_iter=n).fit(torch.eye(4)),
    "n_init": lambda n: KMeans(1, n_init=n).fit(torch.eye(4)),
    "size": lambda n: NegativeQueue(n, 2, 1),
    "dim": lambda n: NegativeQueue(2, n, 1),
    "levels": lambda n: NegativeQueue(2, 2, n),
}


@pytest.mark.parametrize("name", MAKES_COUNTS)
def test_counts(name):
    for good in (1, np.int64(1), np.int32(1), np.uint8(1)):
        MAKES_COUNTS[name](good)
    for bad in NOT_COUNTS:
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got"):
            MAKES_COUNTS[name](bad)


def test_seeds_and_tolerances():
    x = data(40, 3)
    assert torch.equal(KMeans(3, seed=np.int64(7)).fit(x).labels_, KMeans(3, seed=7).fit(x).labels_)
    assert KMeans(3, seed=2**64 - 1).fit(x).n_iter_
    for bad in (-1, 1.0, True, None, "0", torch.tensor(1)):
        with pytest.raises(ValueError, match="seed must be an integer of at least 0, got"):
            KMeans(3, seed=bad).fit(x)
    with pytest.raises(ValueError, match=r"seed must be below 2\^64"):
        KMeans(3, seed=2**64).fit(x)
    assert KMeans(3, tol=np.float32(0.01)).fit(x).n_iter_
    for bad in (1, -1e-9, NAN, INF):
        with pytest.raises(ValueError, match="tol must be a fraction from 0 to below 1"):
            KMeans(3, tol=bad).fit(x)
    for bad in ("0", None, True, torch.tensor(0.1)):
        with pytest.raises(TypeError, match="tol must be a number"):
            KMeans(3, tol=bad).fit(x)


@pytest.mark.parametrize("bad", [1, 0, "no", None, torch.tensor(True)])
def test_flags(bad):
    for name in ("spherical", "distributed"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got"):
            KMeans(2, **{name: bad}).fit(torch.eye(3))
        with pytest.raises(TypeError, match=f"{name} must be True or False, got"):
            PseudoLabels((2,), **{name: bad})
    with pytest.raises(TypeError, match="return_confidence must be True or False, got"):
        ifnd_fast.assign_clusters(torch.eye(3), torch.eye(3), return_confidence=bad)


@pytest.mark.parametrize("bad", [None, 1, True, np.array(["mean", "sum"]), ["mean"], torch.ones(2)])
def test_names(bad):
    q = torch.eye(3)
    for name in ("false_negatives", "reduction", "level_combination", "backend"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            IFNDLoss(**{name: bad})
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            ifnd_fast.info_nce(q, q, q, **{name: bad})
    for name in ("metric", "backend"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            ifnd_fast.assign_clusters(q, q, **{name: bad})
    with pytest.raises(ValueError, match="engine must be one of"):
        KMeans(2, engine=bad).fit(q)


def test_pseudo_labels_are_checked_when_they_are_made():
    for name, bad in (("max_iter", 0), ("n_init", True), ("seed", -1), ("seed", 0.5)):
        with pytest.raises(ValueError, match=f"{name} must be an integer"):
            PseudoLabels((2,), **{name: bad})
        with pytest.raises(ValueError, match=f"{name} must be an integer"):
            ifnd_fast.cluster_levels(torch.eye(3), (2,), **{name: bad})
    with pytest.raises(ValueError, match="max_iter must be an integer"):
        PseudoLabels((2,)).fit(torch.eye(3), max_iter=0)
    fitted = PseudoLabels((np.int64(2),), seed=np.int64(1)).fit(torch.eye(3))
    assert fitted.levels == (2,) and type(fitted.levels[0]) is int
    assert torch.equal(fitted.labels, PseudoLabels([2], seed=1).fit(torch.eye(3)).labels)
    for bad in (NAN, -0.1, 2):
        with pytest.raises(ValueError, match="rate must be in 0..1"):
            fitted.accept(bad)
    for bad in ("1", None, True, torch.tensor(0.5)):
        with pytest.raises(TypeError, match="rate must be a number"):
            fitted.accept(bad)
    assert torch.equal(fitted.accept(np.float32(1)), fitted.labels)


def test_numbers():
    assert checks.number("x", np.float16(0.5)) == 0.5 and type(checks.number("x", np.float16(0.5))) is float
    assert checks.integer("x", np.uint64(2**63), 0) == 2**63
    assert checks.flag("x", np.bool_(True)) is True
