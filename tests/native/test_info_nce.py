"""The loss's C++ kernels against float64, by the rule of cases.py."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.native.cases import ATTRACT, DTYPES, ELIMINATE, KEEP, Case, run_python

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


def test_wrong_sizes_are_refused():
    for shape in ((4, 4, 16385, 1), (4, 4, 4, 17)):
        with pytest.raises(ValueError, match="D must|L must"):
            Case(*shape).native()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_scratch_memory_is_small():
    """Peak memory of both calls at B 256, K 65536 grows by under 2% of a (B, K) float32 matrix.

    Linux counts a process's pages in batches of 32 for each core, so a peak is known to that.
    """
    done = run_python("""
        import ctypes, statistics, torch
        from tests.native.cases import Case

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
