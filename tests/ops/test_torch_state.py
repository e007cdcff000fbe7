"""What a program may set in torch, and how its tensors may be made, changes no bit of a result."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import ifnd_fast
from ifnd_fast import IFNDLoss, KMeans, MoCo, NegativeQueue, PseudoLabels, cluster_levels
from ifnd_fast.clustering.lloyd import centroids_of
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.clustering.whitening import whiten
from ifnd_fast.contrast.encoder import Encoder
from ifnd_fast.metrics.false_negatives import detection_by_rate
from ifnd_fast.metrics.knn import knn_accuracy
from ifnd_fast.ops import cpu
from ifnd_fast.ops.address import address
from tests.ops.cases import DTYPES, STRATEGIES, make_case

GENERATOR = torch.Generator().manual_seed(0)
X = normalize(torch.randn(300, 24, generator=GENERATOR))
C = normalize(torch.randn(70, 24, generator=GENERATOR))
FAR = X + 1e5
LABELS = torch.randint(-1, 4, (300, 2), generator=GENERATOR).int()
TRUTH = torch.arange(300) % 4
IMAGES = torch.rand(8, 12, generator=GENERATOR)
EXTRAS = torch.randint(-1, 3, (8, 2), generator=GENERATOR).int(), torch.arange(8)
CASES = [make_case(9, 70, 24, 2, dtype=d, false_negatives=s) for d in DTYPES for s in STRATEGIES]
torch.manual_seed(0)
MODEL = MoCo(Encoder(nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU()), 16, dim=24), bn_groups=2)


def losses() -> dict[str, Tensor]:
    found = {}
    for number, case in enumerate(CASES):
        for backend in ("cpu", "reference"):
            for name, value in case.results(backend).items():
                found[f"{number} {backend} {name}"] = value
    return found


def assignments() -> dict[str, Tensor]:
    found = {}
    for dtype in DTYPES:
        for metric in ("inner_product", "l2"):
            for backend in ("cpu", "reference"):
                for offset in (0, 1e5 if dtype == torch.float32 else 100):
                    name = f"{dtype} {metric} {backend} {offset}"
                    found[name], found["confidence " + name] = ifnd_fast.assign_clusters(
                        (X + offset).to(dtype), (C + offset).to(dtype), metric=metric, backend=backend
                    )
    return found


def clusterings() -> dict[str, Tensor]:
    found = {}
    for name, x in {"unit": X, "half": X.half(), "double": X.double(), "far": FAR, "tiny": 1e-20 * X}.items():
        for engine in ("fused", "faiss"):
            fitted = KMeans(20, max_iter=6, engine=engine, n_init=2).fit(x)
            found |= {f"{name} {engine} labels": fitted.labels_, f"{name} {engine} centres": fitted.cluster_centers_}
            found |= {f"{name} {engine} predicted": fitted.predict(x[:50])}
    found["array"] = torch.from_numpy(KMeans(5, max_iter=6).fit(X.numpy()).labels_)
    found["spherical"] = KMeans(5, spherical=True).fit(3 * X).labels_
    found["moved"] = centroids_of(X, LABELS[:, 0].contiguous(), 6, Shards.alone(X))
    return found


def levels() -> dict[str, Tensor]:
    pseudo_labels = PseudoLabels((4, 12), max_iter=5).fit(X)
    warm = cluster_levels(X, (4, 12), max_iter=3, previous=LABELS)
    found = {f"warm {i} {name}": getattr(level, name) for i, level in enumerate(warm) for name in level._fields[:3]}
    found |= {"accepted": pseudo_labels.accept(0.3), **pseudo_labels.state_dict()}
    return found


def training_step() -> dict[str, Tensor]:
    MODEL.train()
    query, keys = MODEL(IMAGES, IMAGES.flip(0), shuffle_seed=3)
    queue = NegativeQueue(16, 24, 2).to("cpu") if torch.get_default_device().type == "cpu" else None
    queue = queue or NegativeQueue(16, 24, 2).to_empty(device="cpu")
    queue.enqueue(keys, *EXTRAS)
    queue.enqueue(keys.flip(0))
    negatives, labels, ids = queue.negatives()
    loss = IFNDLoss(0.1)(query, keys, negatives, EXTRAS[0], labels, EXTRAS[1], ids)
    gradients = torch.autograd.grad(loss, tuple(MODEL.query_encoder.parameters()))
    queue.relabel(LABELS)
    found = {"loss": loss.detach(), "query": query.detach(), "labels": queue.labels, "state": queue.get_extra_state()}
    return found | {f"gradient {i}": g for i, g in enumerate(gradients)}


def others() -> dict[str, Tensor]:
    accuracy = knn_accuracy(X[:200], TRUTH[:200], X[200:], TRUTH[200:], k=5, chunk=64)
    by_rate = detection_by_rate(LABELS, X[:, :2].abs(), TRUTH.numpy(), [0.0, 0.5, 1.0])
    numbers = [number for level in by_rate.per_query for number in level]
    return {
        "whitened": whiten(X, 0.5, Shards.alone(X)),
        "figures": torch.tensor([accuracy, *numbers], dtype=torch.float64, device="cpu"),
    }


EVERYTHING: dict[str, Callable[[], dict[str, Tensor]]] = {
    f.__name__: f for f in (losses, assignments, clusterings, levels, training_step, others)
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def flushed() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


STATES = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "device": default_device,
    "device context": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "warnings": warnings_as_errors,
    "flushed": flushed,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
NORMAL: dict[str, dict[str, Tensor]] = {}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("what", EVERYTHING)
@pytest.mark.parametrize("state", STATES)
def test_no_state_of_torch_changes_a_bit(state, what):
    needs_gradients = what in ("losses", "training_step")
    if needs_gradients and state in ("no gradients", "inference"):
        return  # torch gives none then
    if what == "training_step" and state == "autocast":
        return  # the network's own products are meant to be rounded
    if what not in NORMAL:
        NORMAL[what] = EVERYTHING[what]()
        again = EVERYTHING[what]()
        assert all(torch.equal(again[name], value) for name, value in NORMAL[what].items())
    with STATES[state]():
        found = EVERYTHING[what]()
    gc.collect()  # a heap that was written to beyond its end shows here, if not before
    assert found.keys() == NORMAL[what].keys()
    for name, value in NORMAL[what].items():
        assert found[name].dtype == value.dtype and found[name].device == value.device, name
        assert torch.equal(found[name], value), name


def test_no_global_generator_moves():
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpys = torch.get_rng_state(), np.random.get_state()
    for run in EVERYTHING.values():
        run()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpys, strict=True))


# ---- how tensors are made -------------------------------------------------------------------------------------------


def negated(x: Tensor) -> Tensor:
    """x, as the imaginary part of a conjugate: a view whose numbers in memory are of the other sign."""
    view = torch.complex(torch.zeros_like(x.float()), -x.float()).conj().imag
    assert view.is_neg()
    return view


def dense_and_negated(x: Tensor) -> Tensor:
    view = torch._neg_view(-x)
    assert view.is_neg() and view.is_contiguous()
    return view


class Named(Tensor):
    """A subclass, such as torchvision's tensors."""


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "padded": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "reversed": lambda x: x.flip(0).contiguous().flip(0),
    "parameter": lambda x: nn.Parameter(x),
    "subclass": lambda x: x.as_subclass(Named),
    "negated": negated,
    "dense, negated": dense_and_negated,
    "half a storage": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
def test_no_view_changes_a_bit(view):
    make = VIEWS[view]
    for metric in ("inner_product", "l2"):
        for backend in ("cpu", "reference"):
            plain = ifnd_fast.assign_clusters(X, C, metric=metric, backend=backend)
            other = ifnd_fast.assign_clusters(make(X), make(C), metric=metric, backend=backend)
            assert all(map(torch.equal, other, plain))
    expected = KMeans(9, max_iter=5).fit(X)
    fitted = KMeans(9, max_iter=5).fit(make(X))
    assert torch.equal(fitted.labels_, expected.labels_) and fitted.inertia_ == expected.inertia_
    assert torch.equal(fitted.predict(make(X)), expected.labels_)
    assert torch.equal(PseudoLabels((5,), max_iter=4).fit(make(X)).labels, PseudoLabels((5,), max_iter=4).fit(X).labels)
    case = CASES[0]
    for backend in ("cpu", "reference"):
        expected = case.results(backend)
        inputs = [make(getattr(case, name)).detach().requires_grad_() for name in ("query", "positive", "negatives")]
        loss = case.loss(*inputs, backend=backend)
        gradients = torch.autograd.grad((loss * case.upstream).sum(), inputs)
        for value, right in zip((loss, *gradients), expected.values(), strict=True):
            if (view, backend) == (
                "half a storage",
                "reference",
            ):  # its products are BLAS's, which tell how rows are aligned
                torch.testing.assert_close(value.detach(), right, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(value.detach(), right)


def test_expanded_rows():
    row, keys = X[:1].expand(6, -1), C[:1].expand(9, -1)
    for backend in ("cpu", "reference"):
        assert torch.equal(
            ifnd_fast.info_nce(row, row, keys, backend=backend),
            ifnd_fast.info_nce(row.clone(), row.clone(), keys.clone(), backend=backend),
        )
    labels = ifnd_fast.assign_clusters(row, C, return_confidence=False)
    assert torch.equal(labels, ifnd_fast.assign_clusters(row.clone(), C, return_confidence=False))


@pytest.mark.parametrize("make", [
    np.asfortranarray, lambda a: a[::-1][::-1], lambda a: a.astype(">f4"), lambda a: np.lib.stride_tricks.as_strided(a),
    lambda a: np.ma.masked_array(a).data,
], ids=["fortran", "reversed", "byte order", "strided", "masked"])  # fmt: skip
def test_arrays(make):
    expected = KMeans(9, max_iter=5).fit(X).labels_
    array = make(X.numpy().copy())
    array.flags.writeable = False
    with warnings_as_errors():
        assert np.array_equal(KMeans(9, max_iter=5).fit(array).labels_, expected.numpy())


# ---- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.float64), "got torch.float64 of shape"),
        (torch.zeros(3, 4, dtype=torch.bfloat16), "got torch.bfloat16"),
        (torch.zeros(3, 4, device="meta"), "on meta"),
        (torch.zeros(4, 3).t(), r"strides \(1, 3\)"),
        (torch.zeros(3, 8)[:, :4], r"strides \(8, 1\)"),
        (torch.zeros(3, 5), r"of shape \(3, 5\)"),
        (torch.zeros(12), r"of shape \(12,\)"),
        (torch.zeros(3, 4).to_sparse(), "torch.sparse_coo"),
        (torch._neg_view(torch.zeros(3, 4)), "negated"),
    ],
)
def test_an_address_is_taken_of_nothing_else(tensor, message):
    with pytest.raises(RuntimeError, match=f"internal error of ifnd_fast: loss must be contiguous.*{message}"):
        address("loss", tensor, torch.float32, "cpu", (3, 4))


def test_an_address():
    x = torch.zeros(3, 4)
    assert address("loss", x, torch.float32, "cpu", (3, 4)) == x.data_ptr()
    assert address("loss", None, torch.float32, "cpu", (3, 4)) == 0


def test_labels_of_another_dtype_reach_no_kernel():
    with pytest.raises(RuntimeError, match="labels must be contiguous torch.int32"):
        cpu.cluster_sums(X, torch.zeros(300, dtype=torch.int64), C)
    with nullcontext(), pytest.raises(RuntimeError, match="bounds must be contiguous torch.float32"):
        cpu.reassign_by_bounds(X, None, C, torch.zeros(300, dtype=torch.int32), torch.zeros(300, dtype=torch.float64))
