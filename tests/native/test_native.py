"""The C++ kernels called directly, against float64 definitions in plain torch.

Rule: a result's error is at most that of the same definition computed by torch in float32, plus 4 units of
float32 rounding in a logit (a relative change of that size in every exponential). Where bfloat16 inputs are
multiplied by dot instructions, the weights of a gradient's terms are rounded to bfloat16 too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

_cpu = pytest.importorskip("ifnd_fast._cpu", reason="the extension is not built")
from tests.native import programs  # noqa: E402
from tests.native.programs import isas  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ELIMINATE, ATTRACT, KEEP = 0, 1, 2
ROUNDING = 4 * 2.0**-24
BFLOAT16_ROUNDING = 2.0**-8  # the unit roundoff of 8 significant bits


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """The definitions' matrices are too small for more; the kernels are told their number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def address(tensor: Tensor | None) -> int:
    assert tensor is None or tensor.is_contiguous()
    return 0 if tensor is None else tensor.data_ptr()


class Case:
    """Inputs of one call; labels from -1 to clusters - 1."""

    def __init__(
        self,
        B,
        K,
        D,
        L=1,
        *,
        dtype=torch.float32,
        strategy=ELIMINATE,
        clusters=5,
        labels=True,
        ids=True,
        tau=0.2,
        scale=1.0,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def rows(n: int) -> Tensor:
            return (scale * torch.nn.functional.normalize(torch.randn(n, D, generator=generator))).to(dtype)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        self.query, self.positive, self.negatives = rows(B), rows(B), rows(K)
        self.query_labels = integers(-1, clusters, B, L).int() if labels else None
        self.negative_labels = integers(-1, clusters, K, L).int() if labels else None
        self.query_ids = integers(0, K + 1, B) + 2**33 if ids else None
        # The low halves of these ids all agree with some query's; only some whole ids do.
        self.negative_ids = (integers(0, K + 1, K) + 2**32 * integers(1, 3, K)) if ids else None
        self.loss_grad = torch.rand(B, generator=generator) + 0.5
        self.L, self.tau, self.strategy, self.combination = L, tau, strategy, 0

    def native(self, threads: int = 2, with_grad: bool = True) -> dict[str, Tensor]:
        (B, D), K = self.query.shape, len(self.negatives)
        keys = [self.query_labels, self.negative_labels, self.query_ids, self.negative_ids]
        sizes = (B, K, D, self.L, DTYPES[self.query.dtype], self.tau, self.strategy, self.combination)
        losses = self.L if self.combination == 0 else 1
        # NaN: what a kernel forgets to write shows.
        loss, weight, query_grad = (torch.full(s, torch.nan) for s in ((B,), (B,), (B, D)))
        normalizer, negatives_grad = torch.full((B, losses), torch.nan), torch.full((K, D), torch.nan)
        counts = torch.full((B, losses), -7, dtype=torch.int32)
        _cpu.info_nce_forward(
            *map(address, (self.query, self.positive, self.negatives, *keys)),
            *sizes,
            address(loss),
            address(query_grad) if with_grad else 0,
            address(weight),
            address(normalizer),
            address(counts),
            threads,
        )
        _cpu.info_nce_negatives_grad(
            *map(address, (self.query, self.negatives, *keys)),
            *sizes,
            *map(address, (self.loss_grad, normalizer, counts, negatives_grad)),
            threads,
        )
        return {
            "loss": loss,
            "query_grad": query_grad,
            "positive_weight": weight,
            "log_normalizer": normalizer,
            "counts": counts,
            "negatives_grad": negatives_grad,
        }

    def logits(self, float_type: torch.dtype) -> tuple[Tensor, Tensor]:
        q, p, n = (t.to(float_type) for t in (self.query, self.positive, self.negatives))
        return (q * p).sum(1) / self.tau, q @ n.T / self.tau

    def definition(self, float_type: torch.dtype) -> dict[str, Tensor]:
        """By the formulas, with autograd for the derivatives."""
        query, negatives = (t.to(float_type, copy=True).requires_grad_() for t in (self.query, self.negatives))
        s_positive = ((query.detach() * self.positive.to(float_type)).sum(1) / self.tau).requires_grad_()
        # d loss / d q goes through s+ too: s+ is a leaf, and the chain rule adds its part below.
        s = query @ negatives.T / self.tau
        same = torch.zeros_like(s, dtype=torch.bool)
        if self.query_ids is not None:
            same = (self.query_ids[:, None] == self.negative_ids) & (self.negative_ids >= 0)
        losses, normalizers, counts, pulls = [], [], [], torch.zeros_like(s)
        for level in range(self.L):
            false = torch.zeros_like(same)
            if self.query_labels is not None and self.strategy != KEEP:
                y = self.query_labels[:, level, None]
                false = (y == self.negative_labels[:, level]) & (y >= 0) & ~same
            out = same | false if self.strategy != ATTRACT else same
            kept = torch.cat([s_positive[:, None], s.masked_fill(out, -torch.inf)], dim=1)
            normalizers.append(torch.logsumexp(kept, 1))
            counts.append(false.sum(1).int())
            if self.strategy == ATTRACT:
                pulled = (s_positive + s.masked_fill(~false, 0).sum(1)) / (1 + counts[-1])
                pulls = pulls + false / (1 + counts[-1][:, None]) / self.L
            else:
                pulled = s_positive
            losses.append(normalizers[-1] - pulled)
        loss = torch.stack(losses).mean(0)
        query_grad, weight, ds = torch.autograd.grad(loss.sum(), (query, s_positive, s), retain_graph=True)
        (negatives_grad,) = torch.autograd.grad((loss * self.loss_grad).sum(), negatives)
        # What the gradients are sums of, without signs: rounding is relative to that.
        terms, positive_terms = ds.abs() + 2 * pulls, weight.abs() + (self.strategy == ATTRACT)
        positive = self.positive.to(float_type)
        return {
            "loss": loss.detach(),
            "positive_weight": weight,
            "query_grad": query_grad + weight[:, None] * positive / self.tau,
            "log_normalizer": torch.stack(normalizers, 1).detach(),
            "counts": torch.stack(counts, 1),
            "negatives_grad": negatives_grad,
            "query_terms": (terms @ negatives.abs() + positive_terms[:, None] * positive.abs()) / self.tau,
            "negatives_terms": (terms * self.loss_grad[:, None]).T @ query.abs() / self.tau,
        }

    def check(self, **how) -> None:
        native, right, plain = (
            self.native(**how),
            self.definition(torch.float64),
            self.definition(torch.float32),
        )
        assert torch.equal(native["counts"], right["counts"])
        s_positive, s = self.logits(torch.float64)
        logit = 1 + max(float(t.abs().max()) for t in (s_positive, s) if t.numel())
        dots = self.query.dtype == torch.bfloat16 and _cpu.isa() == "avx512bf16"
        for name in ("loss", "query_grad", "positive_weight", "log_normalizer", "negatives_grad"):
            if right[name].numel() == 0:
                continue
            terms = right[name.replace("grad", "terms")].detach() if "grad" in name else torch.ones(1)
            error, allowed = ((x[name] - right[name]).abs() for x in (native, plain))
            if dots and "grad" in name:
                error = error - BFLOAT16_ROUNDING * terms
            limit = allowed.max() + ROUNDING * logit * terms.max()
            assert error.max() <= limit, f"{name}: error {error.max()}, torch's {allowed.max()}"


SHAPES = [
    (1, 1, 1, 1),
    (37, 531, 65, 3),
    (256, 300, 128, 1),
    (5, 1000, 31, 16),
    (70, 200, 2048, 2),
    (3, 0, 8, 2),
]


@pytest.mark.parametrize("strategy", [ELIMINATE, ATTRACT, KEEP])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_by_shape(shape, dtype, strategy):
    Case(*shape, dtype=dtype, strategy=strategy).check()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 80),
    st.integers(0, 400),
    st.integers(1, 150),
    st.integers(1, 5),
    st.sampled_from(list(DTYPES)),
    st.sampled_from([ELIMINATE, ATTRACT, KEEP]),
    st.sampled_from([0, 1, 2, 10, 1000]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_values_fuzzed(B, K, D, L, dtype, strategy, clusters, labels, ids, threads, seed):
    """clusters 0: no label accepted; 1: half of them, all alike."""
    case = Case(B, K, D, L, dtype=dtype, strategy=strategy, clusters=clusters, labels=labels, ids=ids, seed=seed)
    case.check(threads=threads)


@pytest.mark.parametrize("strategy", [ELIMINATE, ATTRACT])
@pytest.mark.parametrize("levels", [1, 3])
def test_values_with_every_key_a_false_negative(strategy, levels):
    case = Case(9, 400, 24, levels, strategy=strategy, ids=False)
    case.query_labels[:] = 1
    case.negative_labels[:] = 1
    case.check()
    if strategy == ELIMINATE:
        assert not case.native()["loss"].any()
        case.negative_labels[:, -1] = 2  # every key is left out at all levels but the last
        case.check()


@pytest.mark.parametrize("strategy", [ELIMINATE, ATTRACT, KEEP])
def test_values_of_huge_logits(strategy):
    case = Case(20, 300, 16, 3, strategy=strategy, scale=45.0)  # logits to 1e4
    assert max(float(t.abs().max()) for t in case.logits(torch.float64)) > 5e3
    case.check()
    assert all(torch.isfinite(x).all() for x in case.native().values())


def test_values_where_the_largest_logits_are_false_negatives():
    """S_l as S_all - S_F, or one maximum for all levels, would lose the second level's sum entirely."""
    case = Case(4, 200, 2, 2, ids=False, tau=1.0)
    case.query[:] = case.positive[:] = torch.tensor([1.0, 0.0])
    case.negatives[:] = torch.tensor([0.5, 1.0])
    case.negatives[::2, 0] = 1e4  # exact in float32: rounding of logits is no excuse here
    case.query_labels[:] = torch.tensor([7, -1])
    case.negative_labels[:] = torch.tensor([0, 0])
    case.negative_labels[::2, 0] = 7
    right, native = case.definition(torch.float64), case.native()
    torch.testing.assert_close(native["log_normalizer"].double(), right["log_normalizer"], rtol=3e-7, atol=0)
    torch.testing.assert_close(native["query_grad"].double(), right["query_grad"], rtol=1e-6, atol=1e-6)
    assert 4 < right["log_normalizer"][0, 0] < 6  # what must not get lost beside 1e4


def test_values_of_a_nearly_perfect_query():
    """The loss of a query far nearer to its positive than to any key is tiny, not 0."""
    case = Case(3, 50, 2, ids=False, labels=False, tau=1.0)
    case.query[:] = case.positive[:] = torch.tensor([5.0, 0.0])
    case.negatives[:] = torch.tensor([0.0, 1.0])
    right = 50 * torch.exp(torch.tensor(-25.0, dtype=torch.float64))
    native = case.native()
    torch.testing.assert_close(native["loss"].double(), right.expand(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(native["positive_weight"].double(), -right.expand(3), rtol=1e-5, atol=0)


def test_values_of_duplicated_rows():
    case = Case(64, 256, 48, 3, ids=False)
    for tensor in (case.query, case.positive, case.query_labels):
        tensor[:] = tensor[:1].clone()
    case.negatives[128:], case.negative_labels[128:] = case.negatives[:128], case.negative_labels[:128]
    case.check()
    native = case.native()
    assert (native["loss"] == native["loss"][0]).all()
    assert torch.equal(native["negatives_grad"][128:], native["negatives_grad"][:128])


@pytest.mark.parametrize("strategy", [ELIMINATE, ATTRACT, KEEP])
def test_values_without_labels_accepted_are_those_of_keep(strategy):
    case = Case(33, 300, 40, 2, clusters=0, strategy=strategy)
    kept = Case(33, 300, 40, 2, clusters=0, strategy=KEEP).native()
    for name, value in case.native().items():
        torch.testing.assert_close(value, kept[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("B", [1, 8, 33, 200])
def test_values_by_threads(B, threads):
    """Both ways of splitting, rows and keys; the same bits on every run."""
    case = Case(B, 1500, 64, 3)
    case.check(threads=threads)
    first, second = case.native(threads=threads), case.native(threads=threads)
    assert all(torch.equal(first[name], second[name]) for name in first)
    without = case.native(threads=threads, with_grad=False)
    assert without["query_grad"].isnan().all()
    assert torch.equal(without["loss"], first["loss"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("culprit", ["query", "positive", "negatives"])
def test_values_that_are_not_finite_show_in_the_loss(culprit, bad):
    case = Case(20, 100, 16, ids=False, labels=False)
    case.query[:, 2] = 0.5  # inf gives a logit of inf: one of -inf would rightly count for nothing
    getattr(case, culprit)[3, 2] = bad
    finite = case.native()["loss"].isfinite()
    assert not finite[3]
    assert not finite.any() if culprit == "negatives" else finite.sum() == 19


@pytest.mark.parametrize("strategy", [ELIMINATE, ATTRACT, KEEP])
@pytest.mark.parametrize("unknown", [-1, -2, -(2**31), -(2**32), -(2**32) + 5, -(2**63)])
def test_values_of_unknown_ids(unknown, strategy):
    """They match nothing, not even each other; 2^32 - 1 and 2^32 - 2 have the low halves of -1 and -2."""
    case = Case(20, 200, 24, 2, strategy=strategy, ids=False)
    without = case.native()
    case.query_ids, case.negative_ids = torch.full((20,), unknown), torch.full((200,), unknown)
    case.negative_ids[::5], case.negative_ids[1::5] = 2**32 - 1, 2**32 - 2
    found = case.native()
    assert all(torch.equal(found[name], without[name]) for name in found)
    case.query_ids[::2] = case.negative_ids[::3] = 5
    case.check()
    assert not torch.equal(case.native()["loss"], without["loss"])


@pytest.mark.parametrize("strategy", [ELIMINATE, ATTRACT])
@pytest.mark.parametrize("combination", [0, 1, 2])
def test_values_of_labels_below_0(combination, strategy):
    below = torch.tensor([-1, -2, -3, -(2**31), -(2**31) + 1], dtype=torch.int32)
    case = Case(20, 200, 24, 2, strategy=strategy)
    case.combination = combination
    case.query_labels[:] = -1
    expected = case.native()
    for labels in (case.query_labels, case.negative_labels):
        labels[labels < 0] = below.repeat(len(labels))[: int((labels < 0).sum())]
    assert (case.query_labels == case.negative_labels[:20]).any()
    found = case.native()
    assert not found["counts"].any() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("strategy", [ELIMINATE, ATTRACT, KEEP])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [1e-6, 1e-3, 1e6])
@pytest.mark.parametrize("scale", [1e-7, 6e-5, 1.0, 1e4])
def test_values_at_the_ends_of_the_ranges(scale, tau, dtype, strategy):
    """Rows down to float16's subnormal numbers, and logits up to 1e14."""
    case = Case(9, 150, 16, 3, dtype=dtype, strategy=strategy, scale=scale, tau=tau)
    case.check()
    assert all(value.isfinite().all() for value in case.native().values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_many_nearly_equal_logits(dtype):
    """Added up one by one, e^s a little below 1 are all rounded the same way: 20,000 of them off by 4e-5."""
    case = Case(3, 20_000, 16, dtype=dtype, scale=6e-5, tau=1e-3, labels=False, ids=False)
    right = case.definition(torch.float64)["loss"]
    torch.testing.assert_close(case.native()["loss"].double(), right, rtol=0, atol=1.5e-6)


def native_assign(x, c, metric=0, tau=0.2, threads=2, with_confidence=True):
    labels, confidence = torch.full((len(x),), -7, dtype=torch.int32), torch.full((len(x),), torch.nan)
    _cpu.assign_clusters(
        address(x),
        address(c),
        len(x),
        len(c),
        x.shape[1],
        DTYPES[x.dtype],
        metric,
        tau,
        address(labels),
        address(confidence) if with_confidence else 0,
        threads,
    )
    return labels, confidence


def similarity(x, c, metric, float_type):
    x, c = x.to(float_type), c.to(float_type)
    return x @ c.T - (c.square().sum(1) / 2 if metric else 0)


def check_assign(x, c, metric=0, tau=0.2, threads=2):
    labels, confidence = native_assign(x, c, metric, tau, threads)
    s, s32 = similarity(x, c, metric, torch.float64), similarity(x, c, metric, torch.float32)
    assert 0 <= labels.min() and labels.max() < len(c)
    # A label may differ from the best only by rounding of a sum of D products.
    size = (x.double().abs() @ c.double().abs().T).max() + (c.double().square().sum(1).max() if metric else 0)
    short = s.max(1).values - s.gather(1, labels.long()[:, None])[:, 0]
    allowed = (s32 - s).abs().max() + ROUNDING * size
    assert short.max() <= 2 * allowed
    right, plain = ((t / tau).softmax(1).max(1).values for t in (s, s32))
    error, plain_error = (confidence - right).abs().max(), (plain - right).abs().max()
    assert error <= plain_error + ROUNDING * (1 + size / tau)
    bare, untouched = native_assign(x, c, metric, tau, threads, with_confidence=False)
    assert torch.equal(bare, labels) and untouched.isnan().all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 300),
    st.integers(1, 150),
    st.sampled_from(list(DTYPES)),
    st.integers(0, 1),
    st.integers(1, 4),
    st.sampled_from([0.05, 1.0, 20.0]),
    st.integers(0, 99),
)
def test_values_of_assignment_fuzzed(N, C, D, dtype, metric, threads, tau, seed):
    generator = torch.Generator().manual_seed(seed)
    x, c = (torch.randn(n, D, generator=generator).to(dtype) for n in (N, C))
    check_assign(x, c, metric, tau, threads)


@pytest.mark.parametrize("metric", [0, 1])
def test_values_of_assignment_large(metric):
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(3000, 128))
    check_assign(x, x[::3].contiguous(), metric)
    labels, _ = native_assign(x, x[::3].contiguous(), metric)
    assert torch.equal(labels[::3], torch.arange(1000).int())  # a centroid's own row
    wide = torch.randn(40, 2048)
    check_assign(wide, wide[:17].contiguous(), metric, tau=50.0)


def test_values_of_assignment_ties_take_the_lowest_index():
    torch.manual_seed(0)
    c = torch.randn(150, 33).repeat(3, 1)
    for metric in (0, 1):
        labels, confidence = native_assign(torch.randn(500, 33), c, metric)
        assert labels.max() < 150
        assert confidence.max() <= 1 / 3 + 1e-6


UP, DOWN = 0.51, 0.49  # to whole numbers they are rounded to 1 and to 0


def misrounded(which: str) -> tuple[Tensor, Tensor]:
    """Rows and centroids: nearest by a hair is centroid 37, but far from it once `which` is rounded to 8 bits."""
    x, c = torch.ones(70, 64), torch.zeros(100, 64)
    if which == "centroids":
        c[[3, 90], :61], c[37] = UP / 127, DOWN / 127
        c[[3, 37, 90], 0] = 1.0
    else:
        x[:, ::2], x[:, 1::2], x[:, 0] = UP, DOWN, 127.0
        c[[3, 90], 2::2] = c[37, 1::2] = 1.0
        c[37, 0] = 0.002
    return x, c


def in_8_bits(rows: Tensor) -> Tensor:
    """Each row as whole numbers from -127 to 127 times a scale of its own."""
    scale = rows.abs().amax(1, keepdim=True).double() / 127
    return (rows / scale.clamp_min(1e-30)).round() * scale


SCREENED = {
    "clusters": lambda c, noise: c[torch.arange(500) % len(c)] + 0.01 * noise,
    "collapsed": lambda c, noise: c[:1] + 1e-4 * noise,
    "short": lambda c, noise: 1e-6 * noise,
    "tiny": lambda c, noise: 1e-25 * noise,
    "below normal numbers": lambda c, noise: 1e-39 * noise,
    "huge": lambda c, noise: 1e15 * noise,
    "overflowing": lambda c, noise: 3e38 * noise.sign(),
    "zero": lambda c, noise: 0 * noise,
    "mixed lengths": lambda c, noise: noise * 10.0 ** torch.linspace(-30, 10, 500)[:, None],
    "not finite": lambda c, noise: noise.masked_fill(noise > 2.5, torch.inf).masked_fill(noise < -2.5, torch.nan),
}


@pytest.mark.parametrize("metric", [0, 1])
@pytest.mark.parametrize("kind", ["spread", "near each other", "duplicated", "mixed lengths", "unit lengths"])
@pytest.mark.parametrize("features", SCREENED)
def test_values_of_labels_alone_are_those_with_confidence(features, kind, metric):
    """Labels without confidence may be found by 8-bit screening: they are the same, ties included."""
    generator = torch.Generator().manual_seed(0)
    c, noise = torch.randn(700, 64, generator=generator), torch.randn(500, 64, generator=generator)
    if kind == "near each other":
        c = c[:1] + 1e-3 * c
    elif kind == "duplicated":
        c = c[:70].repeat(10, 1)
    elif kind == "mixed lengths":
        c = c * 10.0 ** torch.linspace(-20, 3, 700)[torch.randperm(700, generator=generator), None]
    elif kind == "unit lengths":
        c = torch.nn.functional.normalize(c)
    x = SCREENED[features](c, noise).contiguous()
    labels, _ = native_assign(x, c, metric)
    bare, _ = native_assign(x, c, metric, with_confidence=False)
    assert torch.equal(bare, labels)


@pytest.mark.parametrize("which", ["features", "centroids"])
def test_values_of_labels_where_8_bits_order_centroids_wrongly(which):
    x, c = misrounded(which)
    assert ((x.double() @ c.double().T).argmax(1) == 37).all()
    rounded = (in_8_bits(x), c.double()) if which == "features" else (x.double(), in_8_bits(c))
    assert not ((rounded[0] @ rounded[1].T).argmax(1) == 37).any()
    labels, _ = native_assign(x, c, with_confidence=False)
    assert (labels == 37).all()


@pytest.mark.parametrize("metric", [0, 1])
def test_values_of_labels_decided_by_float32_rounding(metric):
    """Centroids exact in 8 bits and equally near: which sum of the same terms is the largest depends on their order."""
    generator = torch.Generator().manual_seed(0)
    x = (10.0 ** (8 * torch.rand(3000, 1, generator=generator) - 4)).repeat(1, 512)
    terms = torch.randint(-40, 128, (512,), generator=generator).float()
    terms[0] = 127
    c = torch.stack([terms[torch.randperm(512, generator=generator)] for _ in range(20)] + [0 * terms] * 60)
    assert torch.equal(in_8_bits(c), c.double())
    labels, _ = native_assign(x, c, metric)
    bare, _ = native_assign(x, c, metric, with_confidence=False)
    assert torch.equal(bare, labels) and len(labels.unique()) > 2


def stated(x: Tensor, c: Tensor, metric: int) -> tuple[Tensor, Tensor]:
    """Labels by the rule where similarities may not be numbers, and the rows whose confidence is NaN."""
    s = similarity(x, c, metric, torch.float64)
    numbers = torch.where(s.isnan(), -torch.inf, s)
    best = numbers.max(1, keepdim=True).values
    labels = torch.where((s == best).any(1), (s == best).int().argmax(1), -1)  # the lowest index
    return labels.int(), s.isnan().any(1) | best[:, 0].isinf()


NOT_NUMBERS = {
    "row": lambda x, c: x[::7].fill_(torch.nan),
    "one of a row": lambda x, c: x[3::9, -1].fill_(torch.nan),
    "infinite rows": lambda x, c: (x[::5, 0].fill_(torch.inf), x[1::5, 0].fill_(-torch.inf), x[2::9].mul_(torch.inf)),
    "centroid": lambda x, c: c[5].fill_(torch.nan),
    "one of some centroids": lambda x, c: c[2::11, 1].fill_(torch.nan),
    "the last centroid": lambda x, c: c[-1, 0].fill_(torch.nan),
    "every centroid but one": lambda x, c: (c[:40].fill_(torch.nan), c[41:].fill_(torch.nan)),
    "infinite centroids": lambda x, c: (c[4::13, 0].fill_(torch.inf), c[5::17, 0].fill_(-torch.inf)),
    "everything": lambda x, c: (x.fill_(torch.nan), c[::2].fill_(torch.nan)),
}


@pytest.mark.parametrize("metric", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [3, 40, 384])
@pytest.mark.parametrize("which", NOT_NUMBERS)
def test_values_of_assignment_of_what_is_no_number(which, D, dtype, metric):
    """-1 where no similarity is a number, else the lowest index of the largest; screened or not."""
    generator = torch.Generator().manual_seed(D)
    x, c = (torch.randn(n, D, generator=generator).to(dtype) for n in (70, 150))
    NOT_NUMBERS[which](x, c)
    right, unsure = stated(x, c, metric)
    labels, confidence = native_assign(x, c, metric)
    alone, _ = native_assign(x, c, metric, with_confidence=False)
    assert torch.equal(labels, right) and torch.equal(alone, right)
    assert torch.equal(confidence.isnan(), unsure) and unsure.any()


def test_values_of_assignment_by_infinities_alone():
    x = torch.ones(40, 1)
    for numbers in ([-torch.inf] * 3, [torch.nan, -torch.inf, torch.nan, -torch.inf], [0.0, torch.inf, torch.inf]):
        c = torch.tensor(numbers)[:, None]
        right, unsure = stated(x, c, 0)
        labels, confidence = native_assign(x, c)
        assert torch.equal(labels, right) and unsure.all() and confidence.isnan().all()


@pytest.mark.parametrize("metric", [0, 1])
@pytest.mark.parametrize("scale", [1e17, 1e18, 3e18, 1e19])
def test_values_of_labels_whose_sums_overflow(scale, metric):
    """Where products overflow float32, on the way or for good, screening gives what the sums give."""
    generator = torch.Generator().manual_seed(0)
    x, c = scale * torch.randn(300, 64, generator=generator), scale * torch.randn(150, 64, generator=generator)
    labels, _ = native_assign(x, c, metric)
    alone, _ = native_assign(x, c, metric, with_confidence=False)
    assert torch.equal(alone, labels)


def native_reassign(x, c, previous, labels, bounds):
    (N, D), C = x.shape, len(c)
    return _cpu.reassign(address(x), address(previous), address(c), N, C, D, address(labels), address(bounds), 2)


@pytest.mark.parametrize("which", [None, *NOT_NUMBERS])
@pytest.mark.parametrize("D", [40, 176, 384])
def test_values_of_reassignment_of_what_is_no_number(D, which):
    """Labels are those of assignment, also of rows whose labels were none of 0..C-1: those have none yet."""
    generator = torch.Generator().manual_seed(D)
    x, c = (torch.randn(n, D, generator=generator) for n in (70, 150))
    if which is not None:
        NOT_NUMBERS[which](x, c)
    labels, bounds, previous = torch.full((70,), -7, dtype=torch.int32), torch.full((70,), torch.nan), None
    for none in (-1, 150, -(2**31), 2**31 - 1):
        if native_reassign(x, c, previous, labels, bounds) < 0:
            assert _cpu.isa() not in ("avx512vnni", "avx512bf16")
            assert previous is None and (labels == -7).all() and bounds.isnan().all()
            return
        assert torch.equal(labels, native_assign(x, c, 1, with_confidence=False)[0])
        assert torch.equal(labels, stated(x, c, 1)[0])
        previous, c = c, c + 0.01 * (torch.rand(150, 1, generator=generator) < 0.3)
        labels[::4] = none


# Widths at which half a tile of floats isn't whole blocks of centroids, and their neighbours; and usual ones.
TILE_WIDTHS = [
    *(32, 96, 128, 144, 160, 161, 168, 176, 177, 192, 193, 200, 208, 209, 224, 225, 240, 256, 257, 272, 288, 289),
    *(304, 320, 336, 337, 352, 368, 383, 384, 385, 399, 400, 401, 448, 480, 512, 513, 576, 640, 672, 673, 768),
    *(1023, 1024, 2047, 2048),
]  # fmt: skip


@pytest.mark.parametrize("metric", [0, 1])
@pytest.mark.parametrize("D", TILE_WIDTHS)
def test_values_of_labels_at_every_width_of_a_tile(D, metric):
    generator = torch.Generator().manual_seed(D)
    for C in (64, 67, 200, 512):
        x, c = (torch.nn.functional.normalize(torch.randn(n, D, generator=generator)) for n in (64, C))
        s = similarity(x, c, metric, torch.float64)
        best, second = s.topk(2).values.T
        clear = best - second > 1e-6  # float32 can tell
        labels, _ = native_assign(x, c, metric, with_confidence=False)
        assert clear.sum() >= 63 and torch.equal(labels[clear], s.argmax(1).int()[clear])


def test_values_of_assignment_do_not_depend_on_the_split():
    torch.manual_seed(0)
    x, c = torch.randn(700, 48), torch.randn(90, 48)
    labels, confidence = native_assign(x, c, threads=1)
    for threads in (2, 3, 8):
        assert all(map(torch.equal, native_assign(x, c, threads=threads), (labels, confidence)))
    part, part_confidence = native_assign(x[100:333].contiguous(), c, threads=2)
    assert torch.equal(part, labels[100:333]) and torch.equal(part_confidence, confidence[100:333])


def test_wrong_sizes_are_refused():
    x = torch.zeros(4, 4)
    for wrong in ({"tau": 0.0}, {"tau": float("nan")}, {"threads": 0}, {"metric": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("tau", "temperature")):
            native_assign(x, x, **wrong)
    for shape in ((4, 4, 2049, 1), (4, 4, 4, 17)):
        with pytest.raises(ValueError, match="D must|L must"):
            Case(*shape).native()


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    prelude = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_best_instruction_set_is_chosen():
    if "IFND_FAST_CPU_ISA" not in os.environ:
        assert _cpu.isa() == isas()[-1]


@pytest.mark.parametrize("isa", [isa for isa in isas() if isa != _cpu.isa()])
def test_other_instruction_sets(isa):
    """The value tests again with each lower one."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "test_values",
        __file__,
    ]
    environment = {**os.environ, "IFND_FAST_CPU_ISA": isa}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:]
    assert run("from ifnd_fast import _cpu; print(_cpu.isa())", IFND_FAST_CPU_ISA=isa).stdout.strip() == isa


def test_an_unknown_instruction_set_is_an_error():
    done = run("from ifnd_fast import _cpu; _cpu.isa()", IFND_FAST_CPU_ISA="sse9")
    assert done.returncode != 0 and "IFND_FAST_CPU_ISA must be portable, or on x86 also avx2" in done.stderr


def test_one_openmp_runtime_with_torch():
    done = run("""
        import re, torch
        def runtimes():
            return set(re.findall(r"\\S*lib(?:gomp|omp|iomp)\\S*", open("/proc/self/maps").read()))
        before = runtimes()
        import importlib.util
        from importlib.machinery import EXTENSION_SUFFIXES
        spec = importlib.util.find_spec("ifnd_fast")
        path = spec.submodule_search_locations[0] + "/_cpu" + EXTENSION_SUFFIXES[0]
        spec = importlib.util.spec_from_file_location("_cpu", path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        print(len(before), runtimes() == before)
    """)
    assert done.stdout.split() == ["1", "True"], done.stdout + done.stderr


# Without torch and numpy, whose own threads would hide what is tested.
FORK = """
    import array, importlib.util, os, signal
    from importlib.machinery import EXTENSION_SUFFIXES
    folder = importlib.util.find_spec("ifnd_fast").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("_cpu", folder + "/_cpu" + EXTENSION_SUFFIXES[0])
    _cpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(_cpu)
    x, c = (array.array("f", [(7 * i + i * i) % 11 - 5 for i in range(n * 8)]) for n in (500, 20))
    address = lambda a: a.buffer_info()[0]

    def work():  # labels, and the number of threads that the process has after it
        labels = array.array("i", [-1] * 500)
        _cpu.assign_clusters(address(x), address(c), 500, 20, 8, 0, 0, 1.0, address(labels), 0, 2)
        return labels, len(os.listdir("/proc/self/task"))

    def in_child():
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # a hang ends the child, and the test fails
            labels, threads = work()
            os._exit(threads if min(labels) >= 0 else 99)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    fresh = in_child()
    mine, threads = work()
    print(fresh, threads, in_child(), work() == (mine, threads))
"""


def test_a_forked_child_does_not_hang():
    """Forked before any thread started it uses threads, afterwards one; the parent is unharmed."""
    done = run(FORK)
    assert done.stdout.split() == ["2", "2", "1", "True"], done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_scratch_memory_is_small():
    """Peak memory of both calls at B 256, K 65536 grows by under 2% of a (B, K) float32 matrix.

    Linux counts a process's pages in batches of 32 for each core, so a peak is known to that.
    """
    done = run("""
        import ctypes, statistics, torch
        from tests.native.test_native import Case

        def peak():
            status = open("/proc/self/status").read()
            return int(status.partition("VmHWM:")[2].split()[0])

        Case(64, 64, 4, 1).native()  # starts the threads
        case = Case(256, 65536, 128, 3, clusters=25000, ids=False)
        outputs = 4 * 128 * (65536 + 256) // 1024

        def growth():
            ctypes.CDLL(None).malloc_trim(0)  # else freed memory would hide what the calls take
            open("/proc/self/clear_refs", "w").write("5")
            before = peak()
            case.native()
            return peak() - before - outputs

        print(statistics.median(growth() for _ in range(9)))
    """)
    assert done.returncode == 0, done.stderr
    counted_to = 32 * 4 * os.cpu_count()
    assert 0 < int(done.stdout) < 0.02 * 256 * 65536 * 4 / 1024 + counted_to


def build(sanitizers: str, folder: Path, *names: str) -> Path:
    try:
        return programs.build(sanitizers, folder, *names)
    except programs.NoSanitizer as error:
        pytest.skip(f"the compiler has no sanitizer runtime: {error}")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    return build(programs.MEMORY, tmp_path_factory.mktemp("sanitized"), "driver", "fuzz", "overrun")


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them builds the programs
@pytest.mark.parametrize("isa", isas())
def test_sanitized(isa, sanitized):
    done = programs.run(sanitized / "driver", isa, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    name, _, error = done.stdout.split()
    assert name == isa
    assert float(error) <= 1.1, "exp.h states its error"


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them builds the programs
@pytest.mark.parametrize("isa", isas())
def test_fuzzed(isa, sanitized):
    """Every entry point against float64; tests/native/README.md has the long run."""
    done = programs.run(sanitized / "fuzz", isa, "--calls", "1500", timeout=250)
    assert done.returncode == 0, done.stderr[:3000] + done.stderr[-3000:]
    name, _, calls, _, values, *_ = done.stdout.split()
    assert name == isa and int(calls) >= 1500 and int(values) > 10**6


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them builds the programs
@pytest.mark.parametrize("buffer", ["0", "1", "2"])
def test_a_touch_past_a_buffer_is_stopped(buffer, sanitized):
    assert programs.run(sanitized / "overrun", None, "-1", buffer).stdout == "1\n"
    for past in ("0", "1", "63", "4000"):
        done = programs.run(sanitized / "overrun", None, past, buffer)
        assert done.returncode != 0 and "AddressSanitizer: use-after-poison" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them builds the programs
def test_no_data_races(tmp_path):
    # What remains outside parallel.h's annotations is the compiler's own record of a parallel region.
    (tmp_path / "suppressions").write_text("race_top:_omp_fn\n")
    environment = {**os.environ, "TSAN_OPTIONS": f"suppressions={tmp_path / 'suppressions'}"}
    driver = build("thread", tmp_path / "build", "driver") / "driver"
    done = subprocess.run([str(driver)], env=environment, capture_output=True, text=True, timeout=250)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address space randomisation is more than the sanitizer's runtime knows")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_kernel_objects_share_no_code(sanitized):
    """The linker would merge two instruction sets' copies of a weak symbol (a header's inline function)."""
    for isa in isas():
        (object_file,) = sanitized.glob(f"CMakeFiles/kernels_{isa}.dir/**/*.o")
        symbols = subprocess.run(["nm", str(object_file)], check=True, capture_output=True, text=True).stdout
        weak = [line.split()[-1] for line in symbols.splitlines() if line.split()[-2] in "WwVvu"]
        assert not [name for name in weak if f"4ifnd{len(isa)}{isa}" not in name and "san_" not in name], weak
