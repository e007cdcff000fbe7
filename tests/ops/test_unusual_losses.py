"""What few calls of info_nce have: a learned temperature, hard negatives of each query, the margin, half precision
beside a float32 queue; and a queue that is written to before the backward pass."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.func import grad, vmap

import ifnd_fast
from ifnd_fast.contrast.loss import IFNDLoss
from ifnd_fast.contrast.queue import NegativeQueue
from ifnd_fast.ops import backends
from tests.ops.cases import COMBINATIONS, DTYPES, INPUTS, REDUCTIONS, Case, make_case

STRATEGIES = ("eliminate", "attract", "keep", "margin")
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def unusual(
    B: int, K: int, D: int, L: int = 1, H: int | None = 3, *, seed: int = 0, learned: bool = True, **how
) -> Case:
    """A case whose margin no pair is near to: there rounding decides."""
    case = make_case(B, K, D, L, seed=seed, learned=learned, **how)
    if H is not None:
        generator = torch.Generator().manual_seed(seed + 1)
        unit = torch.nn.functional.normalize(torch.randn(B, H, D, generator=generator), dim=2)
        case.hard_negatives = unit.to(case.query.dtype)
    q, p, n = (getattr(case, name).double() for name in INPUTS)
    above = (q @ n.T - (q * p).sum(1, keepdim=True)).flatten()
    while len(above) and float((above - case.margin).abs().min()) < 1e-6:
        case.margin += 3e-6
    return case


# ---- values and gradients -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 70), K=st.integers(0, 200), D=st.integers(1, 140), L=st.integers(1, 5), seed=st.integers(0, 99),
    H=st.sampled_from([None, 0, 1, 5]), dtype=st.sampled_from(DTYPES), strategy=st.sampled_from(STRATEGIES),
    clusters=st.sampled_from([0, 1, 10]), labels=st.booleans(), ids=st.booleans(), learned=st.booleans(),
    temperature=st.sampled_from([0.05, 0.2, 2.0]), reduction=st.sampled_from(REDUCTIONS),
    combination=st.sampled_from(COMBINATIONS),
)  # fmt: skip
def test_ragged_shapes(
    B, K, D, L, seed, H, dtype, strategy, clusters, labels, ids, learned, temperature, reduction, combination
):
    unusual(
        B, K, D, L, H, dtype=dtype, clusters=clusters, labels=labels, ids=ids, seed=seed, learned=learned,
        temperature=temperature, false_negatives=strategy, level_combination=combination,
    ).check(reduction=reduction)  # fmt: skip


@every_strategy
@pytest.mark.parametrize("D", [3072, 12288])
def test_raw_pixels(strategy, D):
    unusual(9, 40, D, 2, false_negatives=strategy).check()


@every_strategy
def test_the_rule_notices_small_mistakes(strategy):
    case = unusual(20, 150, 16, 2, false_negatives=strategy)
    less = replace(case, hard_negatives=torch.cat([case.hard_negatives[:, :2], 0 * case.hard_negatives[:, 2:]], 1))
    with pytest.raises(AssertionError, match="is allowed"):
        case.judge(less.results("cpu"))
    for name, share in (("hard_negatives", 1e-4), ("temperature", 1e-3)):  # terms of the second cancel over the batch
        off = case.results("cpu")
        off[name] = off[name] * (1 + share)
        with pytest.raises(AssertionError, match=name):
            case.judge(off)


@every_strategy
def test_gradients_of_the_reference(strategy):
    case = replace(unusual(3, 7, 4, 2, 2, dtype=torch.float64, clusters=2, false_negatives=strategy))
    inputs = tuple(t.requires_grad_() for t in case.inputs().values())

    def losses(*inputs: Tensor) -> Tensor:
        return case.loss(*inputs, backend="reference")

    assert torch.autograd.gradcheck(losses, inputs)
    assert torch.autograd.gradgradcheck(losses, inputs)


@every_backend
@every_strategy
def test_hard_negatives_are_keys_that_one_query_sees(backend, strategy):
    """The result is that of a longer queue, in which the others' are left out as their own image."""
    case = unusual(6, 40, 12, 2, 3, ids=False, learned=False, false_negatives=strategy, margin=9.0)
    rows, hard = len(case.query), case.hard_negatives.flatten(0, 1)
    for i in range(rows):
        others = torch.arange(rows).repeat_interleave(3) != i
        ids = torch.cat([torch.full((40,), -1), torch.where(others, 7, -1)])
        longer = replace(
            case, query=case.query[i : i + 1], positive=case.positive[i : i + 1], hard_negatives=None,
            negatives=torch.cat([case.negatives, hard]), query_labels=case.query_labels[i : i + 1],
            negative_labels=torch.cat([case.negative_labels, torch.full((len(hard), 2), -1).int()]),
            query_ids=torch.tensor([7]), negative_ids=ids,
        )  # fmt: skip
        expected = longer.loss(backend="reference")
        torch.testing.assert_close(case.loss(backend=backend)[i : i + 1], expected, rtol=1e-5, atol=1e-6)


@every_backend
@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 9), K=st.integers(0, 30), margin=st.sampled_from([-0.5, 0.0, 0.1, 3.0]), seed=st.integers(0, 99)
)
def test_the_margin_by_its_definition(backend, B, K, margin, seed):
    case = make_case(B, K, 5, labels=False, ids=False, seed=seed, false_negatives="margin", margin=margin)
    expected = []
    for q, p in zip(case.query.double(), case.positive.double(), strict=True):
        q_p, q_n = float(q @ p), [float(q @ n) for n in case.negatives.double()]
        assume(all(abs(s - q_p - margin) > 1e-6 for s in q_n))
        total = math.fsum(math.exp(s / 0.2) for s in q_n if s <= q_p + margin)
        expected.append(math.log1p(total / math.exp(q_p / 0.2)))
    torch.testing.assert_close(case.loss(backend=backend), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@every_backend
def test_a_margin_that_takes_all_or_nothing(backend):
    case = make_case(9, 50, 12, 2, false_negatives="margin")
    assert not replace(case, margin=-9.0).loss(backend=backend).any()
    kept = replace(case, false_negatives="keep").results(backend)
    for name, value in replace(case, margin=9.0).results(backend).items():
        torch.testing.assert_close(value, kept[name], rtol=1e-6, atol=1e-7)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_learned_temperature_changes_no_bit_and_has_its_shape_and_dtype(backend, dtype, shape):
    case = make_case(9, 50, 12, 2, temperature=0.25)
    temperature = torch.full(shape, 0.25, dtype=dtype).requires_grad_()
    rows = [getattr(case, name).requires_grad_() for name in INPUTS]
    loss = ifnd_fast.info_nce(*rows, temperature=temperature, backend=backend)
    same = ifnd_fast.info_nce(*rows, temperature=0.25, backend=backend)
    assert torch.equal(loss, same)
    *gradients, of_temperature = torch.autograd.grad(loss, (*rows, temperature))
    assert all(map(torch.equal, gradients, torch.autograd.grad(same, rows)))
    assert of_temperature.shape == shape and of_temperature.dtype == dtype
    assert float(of_temperature.abs().sum()) > 0


def test_a_module_learns_its_temperature():
    case = make_case(30, 100, 12)
    criterion = IFNDLoss(torch.nn.Parameter(torch.tensor(0.5)))
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = criterion(case.query, case.query, case.negatives)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and float(criterion.temperature.detach()) < 0.45
    assert "temperature" in criterion.state_dict()


def test_who_lacks_something_says_so_and_auto_goes_on(monkeypatch):
    lacking = backends.FUSED["cpu"].kernels | {"info_nce": backends.Kernels("ifnd_fast.ops.cpu", max_dim=64)}
    monkeypatch.setitem(backends.FUSED, "cpu", backends.FUSED["cpu"]._replace(kernels=lacking))
    case = unusual(5, 20, 8, learned=False)
    with pytest.raises(ValueError, match="backend='cpu' can't run info_nce here: it has no kernel for hard_negatives"):
        case.loss(backend="cpu")
    margin = replace(case, hard_negatives=None, false_negatives="margin")
    with pytest.raises(ValueError, match="can't run info_nce here: it has no kernel for margin"):
        margin.loss(backend="cpu")
    wide = make_case(5, 20, 65)
    with pytest.raises(ValueError, match="it takes rows of up to 64 columns, not 65"):
        wide.loss(backend="cpu")
    for auto in (case, margin, wide):
        assert torch.equal(auto.loss(), auto.loss(backend="reference"))


# ---- torch ----------------------------------------------------------------------------------------------------------


@every_backend
@every_strategy
def test_compiled_equals_eager(backend, strategy):
    torch.compiler.reset()

    def step(*inputs: Tensor) -> Tensor:
        return 2 * case.loss(*inputs, backend=backend, reduction="mean")

    case = unusual(12, 60, 16, 2, false_negatives=strategy)
    inputs = [t.requires_grad_() for t in case.inputs().values()]
    right = step(*inputs)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    gradients = zip(torch.autograd.grad(found, inputs), torch.autograd.grad(right, inputs), strict=True)
    for value, expected in ((found, right), *gradients):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_transformed():
    case = unusual(5, 30, 12, 2)
    names, inputs = list(case.inputs()), tuple(case.inputs().values())

    def of(*inputs: Tensor, backend: str = "cpu") -> Tensor:
        return case.loss(*inputs, backend=backend, reduction="mean")

    for argument, name in enumerate(names):
        found, right = grad(of, argument)(*inputs), grad(lambda *i: of(*i, backend="reference"), argument)(*inputs)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6, msg=name)
    batched = [torch.stack([t, t / 2]) for t in inputs]
    found = vmap(grad(of, (3, 4)))(*batched)
    for i in range(2):
        for value, right in zip(found, grad(of, (3, 4))(*(t[i] for t in batched)), strict=True):
            torch.testing.assert_close(value[i], right)


# ---- half precision beside a float32 queue --------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_beside_a_float32_queue(backend, half):
    """As autocast makes it: the same bits as with the few rows made float32, gradients in the rows' own dtype."""
    case = unusual(9, 50, 12, 2, learned=False)
    inputs = [t.to(half).requires_grad_() for t in case.inputs().values()]
    inputs[2] = case.negatives.requires_grad_()
    expected_inputs = [t.detach().float().requires_grad_() for t in inputs]
    with torch.autocast("cpu", dtype=half):
        loss = case.loss(*inputs, backend=backend, reduction="mean")
    right = case.loss(*expected_inputs, backend=backend, reduction="mean")
    assert torch.equal(loss, right)
    gradients = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(right, expected_inputs), strict=True)
    for given_to, (found, expected) in zip(inputs, gradients, strict=True):
        assert found.dtype == given_to.dtype and torch.equal(found, expected.to(given_to.dtype))


def test_an_encoder_under_autocast_with_a_float32_queue():
    queue = NegativeQueue(32, 8, 1)
    queue.enqueue(torch.nn.functional.normalize(torch.randn(32, 8)))
    encoder = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query, key = encoder(torch.randn(4, 8)), encoder(torch.randn(4, 8)).detach()
        assert query.dtype == torch.bfloat16
        ifnd_fast.info_nce(query, key, queue.negatives()[0]).backward()
    assert encoder.weight.grad.abs().max() > 0


# ---- a queue that is written to before the backward pass ------------------------------------------------------------


def enqueued(queue: NegativeQueue, case: Case, backend: str, compiled: bool = False) -> Tensor:
    """MoCo's own order: loss, enqueue, backward."""
    query = case.query.detach().requires_grad_()

    def of(query: Tensor) -> Tensor:
        keys, labels, ids = queue.negatives()
        return ifnd_fast.info_nce(
            query, case.positive, keys, query_labels=case.query_labels, negative_labels=labels,
            query_ids=case.query_ids, negative_ids=ids, backend=backend,
        )  # fmt: skip

    loss = (torch.compile(of, fullgraph=True, backend="aot_eager") if compiled else of)(query)
    queue.enqueue(case.positive, case.query_labels, case.query_ids)
    loss.backward()
    return query.grad


def filled(case: Case) -> NegativeQueue:
    queue = NegativeQueue(len(case.negatives), case.query.shape[1], case.query_labels.shape[1])
    queue.enqueue(case.negatives, case.negative_labels, case.negative_ids)
    return queue


@pytest.mark.parametrize("compiled", [False, True])
def test_enqueue_before_backward(compiled):
    case = make_case(6, 24, 8, 2)
    query = case.query.detach().requires_grad_()
    case.loss(query, case.positive, case.negatives, backend="cpu", reduction="mean").backward()
    torch.compiler.reset()
    assert torch.equal(enqueued(filled(case), case, "cpu", compiled), query.grad)


def test_who_needs_the_queue_says_so():
    case = make_case(6, 24, 8, 2)
    with pytest.raises(RuntimeError, match="written over before it: call queue.enqueue.*after backward"):
        enqueued(filled(case), case, "reference")
    negatives = case.negatives.requires_grad_()
    keys = negatives * 1
    loss = case.loss(case.query, case.positive, keys, backend="cpu", reduction="mean")
    with torch.no_grad():
        keys[:3] = 0
    with pytest.raises(RuntimeError, match="written over before it.*or hand the loss negatives.clone"):
        loss.backward()
    with pytest.raises(RuntimeError, match="second time"):  # another error is left as it is
        loss = case.loss(case.query, case.positive, negatives, backend="cpu", reduction="mean")
        loss.backward()
        loss.backward()


def test_a_queue_that_fills_is_compiled_few_times():
    """Its length is the step's to vary: a symbol from the second length on, not a constant of each graph."""
    torch.compiler.reset()
    graphs = CompileCounter()
    queue, keys = NegativeQueue(64, 8, 1), torch.nn.functional.normalize(torch.randn(4, 8))

    @torch.compile(backend=graphs, fullgraph=True)
    def step(query: Tensor) -> Tensor:
        return ifnd_fast.info_nce(query, keys, queue.negatives()[0])

    for _ in range(18):
        queue.enqueue(keys)
        compiled, eager = step(keys), ifnd_fast.info_nce(keys, keys, queue.negatives()[0])
        torch.testing.assert_close(compiled, eager)
    assert graphs.frame_count <= 2
