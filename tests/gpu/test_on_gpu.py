"""What only a GPU shows: streams, CUDA graphs, waiting, that "auto" is fused. (test_operators.py runs there too.)"""

from __future__ import annotations

import pytest
import torch

from ifnd_fast import assign_clusters
from ifnd_fast.ops import backends
from tests.ops import test_assign_clusters
from tests.ops.cases import make_case
from tests.training.test_trainer import STEPS, new

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
every_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])


def need(backend: str, operator: str) -> None:
    reason = backends.refusal(backend, operator, torch.device("cuda"), torch.float16)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("operator", ["info_nce", "assign_clusters", "cluster_sums"])
def test_auto_is_fused(operator):
    assert backends.choose("auto", operator, torch.device("cuda"), torch.float16) != "reference"


@every_backend
def test_loss_in_a_graph(backend):
    need(backend, "info_nce")
    case = make_case(64, 4096, 128, 3, dtype=torch.float16, device="cuda")
    expected = case.results(backend)  # compiles, too

    def step():
        inputs = [getattr(case, name).requires_grad_() for name in ("query", "positive", "negatives")]
        loss = case.loss(*inputs, backend=backend)
        return [loss, *torch.autograd.grad((loss * case.upstream).sum(), inputs)]

    for captured, right in zip(replayed(step), expected.values(), strict=True):
        assert torch.equal(captured, right)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_assignment_in_a_graph(backend, dtype):
    need(backend, "assign_clusters")
    x, c = (test_assign_clusters.data(n, 128, n, dtype, unit=True).cuda() for n in (5000, 300))

    def step():
        alone = assign_clusters(x, c, return_confidence=False, backend=backend)
        return [*assign_clusters(x, c, backend=backend), alone]

    expected = step()
    assert all(torch.equal(a, b) for a, b in zip(replayed(step), expected, strict=True))


def replayed(step):
    """The outputs of step() from a graph's second replay, captured on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for output in outputs:
        output.detach().fill_(0)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    return outputs


@every_backend
def test_runs_on_the_current_stream(backend):
    """The kernels wait for what the stream computes before them."""
    need(backend, "assign_clusters")
    x, c = (test_assign_clusters.data(n, 128, n, torch.float16, unit=True).cuda() for n in (20000, 1000))
    right = assign_clusters(x, c, return_confidence=False, backend=backend)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        labels = assign_clusters(late, c, return_confidence=False, backend=backend)
    stream.synchronize()
    assert torch.equal(labels, right)


@pytest.mark.parametrize("options", STEPS)
def test_a_training_step_never_waits_for_the_gpu(options, digit_folder, tmp_path):
    """After two steps, which compile kernels. (float16's loss scaler looks at each step's gradients: it does wait.)"""
    trainer = new(tmp_path / "run", digit_folder, "--device", "cuda", "--amp", "bf16", *options)
    train_step = trainer._train_step

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error" if trainer.step >= 2 else "default")
        try:
            return train_step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer._train_step = watched
    trainer.fit()
