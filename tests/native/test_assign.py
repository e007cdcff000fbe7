"""The C++ kernels of assignment and reassignment against float64, by the rule of cases.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.native.cases import DTYPES, ROUNDING, _cpu, address


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["spread", "near each other", "duplicated", "mixed lengths", "unit lengths"])
@pytest.mark.parametrize("features", SCREENED)
def test_values_of_labels_alone_are_those_with_confidence(features, kind, dtype, metric):
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
    x, c = SCREENED[features](c, noise).to(dtype).contiguous(), c.to(dtype)
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
            assert _cpu.isa() not in ("avx512vnni", "avx512bf16", "amx")
            assert previous is None and (labels == -7).all() and bounds.isnan().all()
            return
        assert torch.equal(labels, native_assign(x, c, 1, with_confidence=False)[0])
        assert torch.equal(labels, stated(x, c, 1)[0])
        previous, c = c, c + 0.01 * (torch.rand(150, 1, generator=generator) < 0.3)
        labels[::4] = none


@pytest.mark.parametrize("D", [768, 2048])
def test_wide_rows_are_screened(D):
    """Of random wide rows hundreds are as near as 8 bits tell, until the nearest is met, here as the last."""
    generator = torch.Generator().manual_seed(D)
    c = torch.nn.functional.normalize(torch.randn(2000, D, generator=generator))
    x = c[1990:].repeat(8, 1) + 0.7 * torch.randn(80, D, generator=generator) / D**0.5
    labels, bounds = torch.full((80,), -1, dtype=torch.int32), torch.zeros(80)
    unscreened = native_reassign(x, c, None, labels, bounds)
    assert unscreened == (-1 if _cpu.isa() in ("portable", "avx2", "avx512") else 0)
    assert torch.equal(native_assign(x, c, 1, with_confidence=False)[0], torch.arange(1990, 2000).repeat(8).int())


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


def test_wrong_arguments_are_refused():
    x = torch.zeros(4, 4)
    for wrong in ({"tau": 0.0}, {"tau": float("nan")}, {"threads": 0}, {"metric": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("tau", "temperature")):
            native_assign(x, x, **wrong)
