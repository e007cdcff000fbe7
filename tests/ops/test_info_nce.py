"""info_nce by its fused backend: values and gradients by the rule of tests/ops/cases.py; how it behaves in torch."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ifnd_fast
from tests.ops.cases import COMBINATIONS, DTYPES, INPUTS, REDUCTIONS, STRATEGIES, Case, make_case

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@every_strategy
@every_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_values_and_gradients(strategy, dtype, reduction):
    make_case(37, 531, 65, 3, dtype=dtype, false_negatives=strategy).check(reduction=reduction)


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 70), K=st.integers(0, 300), D=st.integers(1, 140), L=st.integers(1, 5), seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES), strategy=st.sampled_from(STRATEGIES), clusters=st.sampled_from([0, 1, 2, 10, 1000]),
    labels=st.booleans(), ids=st.booleans(), temperature=st.sampled_from([0.05, 0.2, 2.0]),
    reduction=st.sampled_from(REDUCTIONS), combination=st.sampled_from(COMBINATIONS),
)  # fmt: skip
def test_ragged_shapes(B, K, D, L, seed, dtype, strategy, clusters, labels, ids, temperature, reduction, combination):
    make_case(
        B, K, D, L, dtype=dtype, clusters=clusters, labels=labels, ids=ids, seed=seed, temperature=temperature,
        false_negatives=strategy, level_combination=combination,
    ).check(reduction=reduction)  # fmt: skip


@every_strategy
@every_dtype
@pytest.mark.parametrize("combination", ["any", "all"])
def test_combined_levels(strategy, dtype, combination):
    case = make_case(37, 531, 65, 3, dtype=dtype, clusters=2, false_negatives=strategy, level_combination=combination)
    case.check()
    if strategy != "keep":
        apart = replace(case, level_combination="mean").results("cpu")["loss"]
        assert not torch.allclose(case.results("cpu")["loss"], apart, rtol=1e-3)


@every_strategy
def test_combined_levels_are_those_of_one_label(strategy):
    """Labels that are alike at every level: their union and their intersection are each of them."""
    case = make_case(37, 531, 65, 1, false_negatives=strategy)
    alike = [labels.expand(-1, 3).contiguous() for labels in (case.query_labels, case.negative_labels)]
    for combination in ("any", "all"):
        combined = replace(case, query_labels=alike[0], negative_labels=alike[1], level_combination=combination)
        for name, value in combined.results("cpu").items():
            assert torch.equal(value, case.results("cpu")[name]), name


@every_strategy
@pytest.mark.parametrize("clusters", [0, 1000, 100, 10, 1], ids="clusters={}".format)
def test_label_densities(strategy, clusters):
    """From no label accepted (0) to half of them accepted, all alike (1)."""
    make_case(40, 700, 48, 3, clusters=clusters, false_negatives=strategy).check()


@every_strategy
@every_dtype
def test_every_key_a_false_negative(strategy, dtype):
    case = make_case(20, 300, 24, 3, dtype=dtype, ids=False, false_negatives=strategy).with_all_labels(4)
    case.check()
    if strategy == "eliminate":
        assert not any(value.any() for value in case.results("cpu").values())
        case.negative_labels[:, -1] = 5  # false negatives at every level but the last
        case.check()


@every_strategy
@every_dtype
def test_huge_logits(strategy, dtype):
    case = make_case(20, 300, 16, 3, dtype=dtype, scale=45.0, false_negatives=strategy)
    assert case.largest_logit() > 5e3
    case.check()


@every_strategy
def test_duplicated_rows(strategy):
    case = make_case(30, 256, 48, 3, ids=False, false_negatives=strategy)
    for tensor in (case.query, case.positive, case.query_labels):
        tensor[:] = tensor[:1].clone()
    case.negatives[128:], case.negative_labels[128:] = case.negatives[:128], case.negative_labels[:128]
    case.check()
    results = case.results("cpu")
    assert (results["loss"] == results["loss"][0]).all()


@every_strategy
def test_the_rule_notices_small_mistakes(strategy):
    """What a nearly right kernel would give does not pass, so what passes is right."""
    case = make_case(40, 300, 32, 2, false_negatives=strategy, temperature=0.2)
    case.negatives[0] = case.query[0]
    one_label = replace(case, query_labels=case.query_labels.clone())
    one_label.query_labels[0] = torch.where(one_label.query_labels[0] == 1, 2, 1)
    one_key_less = replace(case, negatives=case.negatives.clone())
    one_key_less.negatives[1] = 0
    mistakes = [replace(case, temperature=0.2001), one_key_less, *[one_label] * (strategy != "keep")]
    for mistake in mistakes:
        with pytest.raises(AssertionError, match="is allowed"):
            case.judge(mistake.results("cpu"))
    for name in ("loss", *INPUTS):
        slightly_off = case.results("cpu")
        slightly_off[name] = slightly_off[name] * (1 + 1e-4)
        with pytest.raises(AssertionError, match=name):
            case.judge(slightly_off)


@pytest.mark.parametrize("seed", [218, 250, 259])
def test_a_normalizer_larger_than_every_logit(seed):
    """log Z is 8 and no logit above 0.05: what float32 leaves out of log Z is more than all else, in every weight."""
    make_case(3, 3200, 1, labels=False, ids=False, seed=seed, temperature=20.0, false_negatives="keep").check()


@every_strategy
def test_inputs_need_not_be_contiguous(strategy):
    case = make_case(24, 200, 20, 3, false_negatives=strategy)
    expected = case.results("cpu")
    wide = {name: torch.nn.functional.pad(getattr(case, name), (3, 5))[:, 3:-5] for name in INPUTS}
    scattered = replace(
        case, query=case.query.t().contiguous().t(), positive=wide["positive"], negatives=wide["negatives"],
        query_labels=case.query_labels.t().contiguous().t(), negative_labels=case.negative_labels.repeat(1, 2)[:, :3],
        query_ids=case.query_ids.repeat_interleave(2)[::2], negative_ids=case.negative_ids.repeat_interleave(3)[::3],
    )  # fmt: skip
    inputs = [getattr(scattered, name).requires_grad_() for name in INPUTS]
    assert not any(tensor.is_contiguous() for tensor in (*inputs, scattered.query_labels, scattered.query_ids))
    loss = scattered.loss(*inputs, backend="cpu")
    gradients = torch.autograd.grad((loss * case.upstream.expand_as(loss)).sum(), inputs)
    for name, value in zip(("loss", *INPUTS), (loss, *gradients), strict=True):
        assert torch.equal(value, expected[name]), name


def test_an_expanded_upstream_gradient():
    """reduction="none" with .sum() sends an upstream gradient of stride 0."""
    case = make_case(9, 50, 12)
    inputs = [getattr(case, name).requires_grad_() for name in INPUTS]
    expanded = torch.autograd.grad(case.loss(*inputs, backend="cpu").sum(), inputs)
    summed = torch.autograd.grad(case.loss(*inputs, backend="cpu", reduction="sum"), inputs)
    assert all(map(torch.equal, expanded, summed))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_gradients_that_are_required(wanted):
    case = make_case(9, 50, 12, 2)
    inputs = [getattr(case, name).requires_grad_(i in wanted) for i, name in enumerate(INPUTS)]
    (case.loss(*inputs, backend="cpu") * case.upstream).sum().backward()
    everything = case.results("cpu")
    for i, name in enumerate(INPUTS):
        if i in wanted:
            assert torch.equal(inputs[i].grad, everything[name])
        else:
            assert inputs[i].grad is None


def in_batch(z: Tensor, case: Case, backend: str) -> tuple[Tensor, Tensor]:
    """SimCLR's loss of two views (2, B, D): each row against all rows, its own image's left out by the ids."""
    z = z.detach().clone().requires_grad_()
    loss = case.loss(torch.cat([z[0], z[1]]), torch.cat([z[1], z[0]]), torch.cat([z[0], z[1]]), backend=backend)
    (gradient,) = torch.autograd.grad((loss * case.upstream).sum(), z)
    return loss.detach(), gradient


@every_strategy
@every_dtype
def test_in_batch(strategy, dtype):
    """One tensor is query, positive and negatives. Rule as above; autograd adds the three gradients up in z's own
    dtype, which may round each sum once more: in half precision a rounding of the largest gradient is allowed too."""
    case = make_case(64, 64, 32, 3, clusters=6, dtype=dtype, false_negatives=strategy)
    case.query_ids = case.negative_ids = torch.arange(32).repeat(2)
    case.negative_labels = case.query_labels = case.query_labels[:32].repeat(2, 1)
    z = case.query.reshape(2, 32, 32)
    right = in_batch(z.double(), case, "reference")
    plain, fused = in_batch(z, case, "reference"), in_batch(z, case, "cpu")
    for f, p, r in zip(fused, plain, right, strict=True):
        error, allowed = ((x.double() - r).abs().max() for x in (f, p))
        once_more = 0.0 if f.dtype == torch.float32 else torch.finfo(f.dtype).eps / 2
        assert error <= allowed + (2.0**-22 * (1 + 1 / 0.2) + once_more) * max(1.0, float(r.abs().max()))
    assert right[1].abs().max() > 0.1


# ---- torch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extras", [True, False], ids=["labels and ids", "plain"])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("combination", ["mean", "any"])
def test_opcheck(combination, extras, requires_grad):
    case = make_case(6, 10, 8, 2, labels=extras, ids=extras)
    log_hard, ceiling = (torch.linspace(-1, 1, 6), torch.linspace(0, 2, 6)) if extras else (None, None)
    learned = torch.tensor(0.2) if extras else None
    if requires_grad and extras:
        learned.requires_grad_(), log_hard.requires_grad_()
    unusual = (learned, log_hard, ceiling)
    matrices = [getattr(case, name).requires_grad_(requires_grad) for name in INPUTS]
    extra = (case.query_labels, case.negative_labels, case.query_ids, case.negative_ids)
    forward = torch.ops.ifnd_fast.info_nce.default
    torch.library.opcheck(forward, (*matrices, *extra, 0.2, "eliminate", combination, "cpu", requires_grad, *unusual))

    query, positive, negatives = (matrix.detach() for matrix in matrices)
    settings = (0.2, "eliminate", combination, "cpu")
    learned, _, ceiling = unusual = tuple(None if t is None else t.detach() for t in unusual)
    *_, log_normalizer, counts = forward(query, positive, negatives, *extra, *settings, False, *unusual)
    torch.library.opcheck(
        torch.ops.ifnd_fast.info_nce_negatives_grad.default,
        (case.upstream, query, negatives, *extra, log_normalizer, counts, *settings, learned, ceiling),
    )


@pytest.mark.parametrize(
    ("compiler", "strategy"),
    [*(("aot_eager", s) for s in STRATEGIES), pytest.param("inductor", "eliminate", marks=pytest.mark.slow)],
)
def test_compiled_equals_eager(compiler, strategy):
    """In one graph, with what surrounds it, gradients included; for a second batch size too."""

    def step(features: Tensor, case: Case, reduction: str) -> Tensor:
        unit = torch.nn.functional.normalize(features)
        return 2 * case.loss(unit, case.positive, case.negatives * 0.5, reduction=reduction)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for rows in (12, 17):
        case = make_case(rows, 60, 16, 3, false_negatives=strategy)
        results = []
        for function in (step, compiled):
            features, negatives = case.query.detach().requires_grad_(), case.negatives.detach().requires_grad_()
            loss = function(features, replace(case, negatives=negatives), "mean")
            results.append((loss, *torch.autograd.grad(loss, (features, negatives))))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_changes_nothing(backend):
    case = make_case(9, 50, 12, 2)
    expected = case.results(backend)
    inputs = [getattr(case, name).requires_grad_() for name in INPUTS]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.loss(*inputs, backend=backend)
    gradients = torch.autograd.grad((loss * case.upstream).sum(), inputs)
    for name, value in zip(("loss", *INPUTS), (loss, *gradients), strict=True):
        assert torch.equal(value, expected[name]), name


def test_without_gradients():
    case = make_case(9, 50, 12, 2)
    expected = case.loss(backend="cpu")
    case.query.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = case.loss(backend="cpu")
        assert not loss.requires_grad and torch.equal(loss, expected)
    assert torch.equal(case.loss(backend="cpu"), expected)


def test_second_derivatives_are_refused():
    case = make_case(5, 20, 8, 2)
    case.query.requires_grad_()
    with pytest.raises(RuntimeError, match='no second derivatives on backend=.cpu.*use backend="reference"'):
        torch.autograd.grad(case.loss(backend="cpu").sum(), case.query, create_graph=True)
    (gradient,) = torch.autograd.grad(case.loss(backend="reference").sum(), case.query, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), case.query)
    assert second.abs().max() > 0


def test_checkpointed():
    case = make_case(5, 20, 8, 2)
    expected = case.results("cpu", "sum")["query"]
    query = case.query.requires_grad_()

    def loss(query):
        return -1.7 * case.loss(query, case.positive, case.negatives, backend="cpu", reduction="sum")

    for reentrant in (True, False):
        query.grad = None
        torch.utils.checkpoint.checkpoint(loss, query, use_reentrant=reentrant).backward()
        torch.testing.assert_close(query.grad, expected)


# ---- same bits ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@every_strategy
@pytest.mark.parametrize("B", [8, 100])
def test_deterministic(strategy, B, threads):
    case = make_case(B, 2000, 64, 3, false_negatives=strategy)
    by_threads = []
    for number in (1, 2):
        threads(number)
        first = case.results("cpu")
        assert all(same_bits(first, case.results("cpu")) for _ in range(3))
        case.judge(first)
        by_threads.append(first)
    for name, value in by_threads[0].items():
        torch.testing.assert_close(by_threads[1][name], value, rtol=1e-5, atol=1e-6)


def test_python_threads_at_once():
    cases = [make_case(40, 2000, 64, 3, seed=seed) for seed in range(8)]
    alone = [case.results("cpu") for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: case.results("cpu"), cases * 3))
    assert all(map(same_bits, together, alone * 3))


# ---- messages -------------------------------------------------------------------------------------------------------

Q, KEYS = torch.ones(4, 8), torch.ones(10, 8)
Y, KEY_Y = torch.zeros(4, 2, dtype=torch.int32), torch.zeros(10, 2, dtype=torch.int32)
IDS, KEY_IDS = torch.arange(4), torch.arange(10)

WRONG = [
    ({"query": [[1.0]]}, TypeError, "query must be a torch.Tensor, got list"),
    ({"query": Q.int()}, TypeError, "query must be float32, .* got torch.int32"),
    ({"query": Q.to(torch.complex64)}, TypeError, "query must be float32, .* got torch.complex64"),
    ({"query": Q.to_sparse()}, TypeError, r"query must be a dense tensor, got torch.sparse_coo.*query.to_dense\(\)"),
    ({"query": Q[0]}, ValueError, r"query must have two dimensions \(rows, D\), got shape \(8,\)"),
    ({"query": Q[:0], "positive": Q[:0]}, ValueError, r"query must have at least one row, got shape \(0, 8\)"),
    ({"query": Q[:, :0]}, ValueError, r"query must have 1 to 16384 columns, got shape \(4, 0\)"),
    ({"query": torch.ones(4, 16385)}, ValueError, r"query must have 1 to 16384 columns, got shape \(4, 16385\)"),
    ({"positive": None}, TypeError, "positive must be a torch.Tensor, got NoneType"),
    ({"positive": Q.double()}, TypeError, "positive must have query's dtype torch.float32, got torch.float64"),
    ({"query": Q.double()}, TypeError, "positive must have query's dtype torch.float64, got torch.float32"),
    ({"positive": Q[:3]}, ValueError, r"positive must have query's shape \(4, 8\), got \(3, 8\)"),
    ({"positive": Q[:, :7]}, ValueError, "positive must have query's 8 columns, got 7"),
    ({"positive": Q.to("meta")}, ValueError, "positive must be on query's device cpu, got meta"),
    ({"negatives": KEYS.t()}, ValueError, "negatives must have query's 8 columns, got 10"),
    ({"negatives": KEYS.bfloat16()}, TypeError, "negatives must have query's dtype torch.float32, got torch.bfloat16"),
    ({"negatives": KEYS.to("meta")}, ValueError, "negatives must be on query's device cpu, got meta"),
    ({"temperature": 0}, ValueError, "temperature must be a number from 1e-6 to 1e6, got 0.0"),
    ({"temperature": 1e-40}, ValueError, "temperature must be a number from 1e-6 to 1e6, got 1e-40"),
    ({"temperature": -0.2}, ValueError, "temperature must be a number from 1e-6 to 1e6, got -0.2"),
    ({"temperature": float("nan")}, ValueError, "temperature must be a number from 1e-6 to 1e6, got nan"),
    ({"temperature": float("inf")}, ValueError, "temperature must be a number from 1e-6 to 1e6, got inf"),
    ({"temperature": "warm"}, TypeError, "temperature must be a number, got 'warm'"),
    ({"temperature": None}, TypeError, "temperature must be a number, got None"),
    ({"temperature": torch.tensor(2)}, TypeError, r"temperature must be a number, or a float .* got torch.int64 of"),
    ({"temperature": torch.ones(2)}, TypeError, r"temperature must be a number, or a float .* of shape \(2,\)"),
    ({"temperature": torch.ones(1, device="meta")}, ValueError, "temperature must be on query's device cpu, got meta"),
    ({"temperature": torch.tensor(0.0)}, ValueError, "temperature must be a number from 1e-6 to 1e6, got 0.0"),
    ({"temperature": torch.tensor(float("nan"))}, ValueError, "temperature must be a number from 1e-6 to 1e6, got nan"),
    ({"margin": "0.1"}, TypeError, "margin must be a number, got '0.1'"),
    ({"margin": float("nan")}, ValueError, "margin must be a finite number, got nan"),
    ({"hard_negatives": [1]}, TypeError, "hard_negatives must be a torch.Tensor, got list"),
    ({"hard_negatives": KEYS}, ValueError, r"hard_negatives must have three dimensions \(B, H, D\), got .*\(10, 8\)"),
    ({"hard_negatives": Q[:, None, :7]}, ValueError, r"hard_negatives must have shape \(4, H, 8\), got \(4, 1, 7\)"),
    ({"hard_negatives": Q[:3, None]}, ValueError, r"hard_negatives must have shape \(4, H, 8\), got \(3, 1, 8\)"),
    ({"hard_negatives": Q[:, None].double()}, TypeError, "hard_negatives must have query's dtype torch.float32"),
    ({"query_labels": Y}, ValueError, "query_labels and negative_labels go together: only query_labels"),
    ({"negative_labels": KEY_Y}, ValueError, "query_labels and negative_labels .*: only negative_labels"),
    ({"query_ids": IDS}, ValueError, "query_ids and negative_ids go together: only query_ids"),
    ({"negative_ids": KEY_IDS}, ValueError, "query_ids and negative_ids go together: only negative_ids"),
    ({"query_labels": [0], "negative_labels": KEY_Y}, TypeError, "query_labels must be a torch.Tensor, got list"),
    ({"query_labels": Y.long(), "negative_labels": KEY_Y}, TypeError, "query_labels must be torch.int32, .*int64"),
    ({"query_labels": Y, "negative_labels": KEY_Y.long()}, TypeError, r"negative_labels must be .*\.to\(torch.int32\)"),
    ({"query_labels": Y[:3], "negative_labels": KEY_Y}, ValueError, r"query_labels must have shape \(4, L\), .*\(3,"),
    ({"query_labels": Y[:, 0], "negative_labels": KEY_Y}, ValueError, r"query_labels must have shape \(4, L\), .*\(4,"),
    ({"query_labels": Y[:, :0], "negative_labels": KEY_Y[:, :0]}, ValueError, "query_labels must have 1 to 16 levels"),
    ({"query_labels": Y.repeat(1, 9), "negative_labels": KEY_Y.repeat(1, 9)}, ValueError, "query_labels .* got 18"),
    ({"query_labels": Y, "negative_labels": KEY_Y[:, :1]}, ValueError, r"negative_labels must have shape \(10, 2\),"),
    ({"query_labels": Y, "negative_labels": KEY_Y.to("meta")}, ValueError, "negative_labels must be on query's device"),
    ({"query_labels": Y - 2, "negative_labels": KEY_Y}, ValueError, r"query_labels must be -1 .* got -2"),
    ({"query_labels": Y, "negative_labels": KEY_Y - 3}, ValueError, r"negative_labels must be -1 .* got -3"),
    ({"query_ids": IDS.int(), "negative_ids": KEY_IDS}, TypeError, "query_ids must be torch.int64, got torch.int32"),
    ({"query_ids": IDS[:3], "negative_ids": KEY_IDS}, ValueError, r"query_ids must have shape \(4\), got \(3,\)"),
    ({"query_ids": IDS, "negative_ids": KEY_IDS[:9]}, ValueError, r"negative_ids must have shape \(10\), got \(9,\)"),
    ({"query_ids": IDS, "negative_ids": KEY_IDS[:, None]}, ValueError, r"negative_ids must have .* got \(10, 1\)"),
    ({"false_negatives": "drop"}, ValueError, "false_negatives must be one of .*'eliminate'.* got 'drop'"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of .*'mean'.* got 'avg'"),
    ({"backend": "gpu"}, ValueError, "backend must be one of .*'reference'.* got 'gpu'"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_wrong_arguments(wrong, error, message, backend):
    arguments = {"query": Q, "positive": Q, "negatives": KEYS, "backend": backend} | wrong
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        ifnd_fast.info_nce(**arguments)
