"""The GPU backends in torch: what their fake implementations promise, compiled graphs, and memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ifnd_fast.ops import backends
from ifnd_fast.ops.pair_labels import PairLabels
from tests.gpu.test_operators import DEVICE, case_of, data
from tests.ops.cases import INPUTS

every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
LEFT_OUT = ("Volta", "Turing")  # torch sees no difference
NONE = (None,) * 3  # no learned temperature, hard negatives or margin
DIMS = (8, 13)  # as it is, and filled up to pieces of 16 bytes


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck_of_the_loss(backend, dim, requires_grad):
    case = case_of(6, 10, dim, 2)
    matrices = [getattr(case, name).requires_grad_(requires_grad) for name in INPUTS]
    extra = PairLabels(case.query_labels, case.negative_labels, case.query_ids, case.negative_ids)
    forward = torch.ops.ifnd_fast.info_nce.default
    settings = (0.2, "eliminate", "mean", backend)
    torch.library.opcheck(forward, (*matrices, *extra, *settings, requires_grad, *NONE))

    query, positive, negatives = (matrix.detach() for matrix in matrices)
    *_, log_normalizer, counts = forward(query, positive, negatives, *extra, *settings, False, *NONE)
    torch.library.opcheck(
        torch.ops.ifnd_fast.info_nce_negatives_grad.default,
        (case.upstream, query, negatives, *extra, log_normalizer, counts, *settings, *NONE[:2]),
    )


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("return_confidence", [True, False])
def test_opcheck_of_assignment(backend, dim, return_confidence):
    arguments = (data(9, dim), data(4, dim, 1), 0.2, "l2", return_confidence, backend)
    torch.library.opcheck(torch.ops.ifnd_fast.assign_clusters.default, arguments)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend, compiler, dim):
    """In one graph, gradients of queries and negatives included."""
    case = case_of(12, 60, dim, 2)

    def step(features, negatives):
        query = torch.nn.functional.normalize(features)
        return 2 * case.loss(query, case.positive, negatives * 0.5, backend=backend, reduction="mean")

    torch.compiler.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (case.query, case.negatives)]
        loss = function(*inputs)
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that are made inside; views have none."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes += tensor.untyped_storage().nbytes()
        return out


def need_own_memory(backend):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("Triton's interpreter copies what it is given")


@every_dtype
def test_the_queue_is_not_copied(backend, dtype):
    """A loss of few queries and its gradient take a small part of the queue's memory; of float32, cuda takes as much
    as the queue has for its terms, and a number for each row."""
    need_own_memory(backend)
    case = case_of(4, 4096, 64, 2, dtype=dtype)
    queue = case.negatives.nbytes
    extra = PairLabels(case.query_labels, case.negative_labels, case.query_ids, case.negative_ids)
    module = backends.module_of(backend, "info_nce")
    with Allocated() as allocated:
        module.info_nce_forward(case.query, case.positive, case.negatives, extra, 0.2, "eliminate", "mean", True)
    terms = queue if backend == "cuda" and dtype == torch.float32 else 0
    assert terms <= allocated.bytes <= terms + 0.1 * queue


@every_dtype
def test_centroids_and_features_are_not_copied(backend, dtype):
    need_own_memory(backend)
    x, c = data(500, 64, 0, dtype), data(300, 64, 1, dtype)
    terms = x.nbytes + c.nbytes if backend == "cuda" and dtype == torch.float32 else 0
    module = backends.module_of(backend, "assign_clusters")
    with Allocated() as allocated:
        module.assign_clusters(x, c, 0.2, "inner_product", True)
    assert terms <= allocated.bytes <= terms + 0.15 * (x.nbytes + c.nbytes)
