"""The loss with its gradients, fused and as plain torch: against a queue (MoCo) and within the batch (SimCLR).

eager             the reference, queue stored (K, D)
eager_transposed  the same, queue stored (D, K), as MoCo stores it
eager_half        as under autocast: the products in bfloat16, the softmax in float32
compiled          torch.compile of the reference
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ifnd_fast import info_nce
from ifnd_fast.ops import reference

TEMPERATURE = 0.2
CLUSTERS = (25_000, 50_000, 100_000)  # ImageNet's levels: a few false negatives a query
IMPLEMENTATIONS = ("fused", "compiled", "eager")

Loss = Callable[..., Tensor]


class Batch(NamedTuple):
    query: Tensor
    positive: Tensor
    negatives: Tensor
    labels_and_ids: tuple[Tensor, Tensor, Tensor, Tensor]


def queue_batch(B: int, K: int, L: int, dtype: torch.dtype, device: torch.device) -> Batch:
    """Half of the labels accepted; D = 128."""
    torch.manual_seed(0)
    query, positive, negatives = (normalize(torch.randn(n, 128)).to(device, dtype) for n in (B, B, K))
    labels = torch.stack([torch.randint(-clusters, clusters, (B + K,)) for clusters in CLUSTERS[:L]], 1)
    labels = labels.clamp(min=-1).int().to(device)
    ids = torch.randint(1_000_000, (B + K,)).to(device)
    return Batch(query.requires_grad_(), positive, negatives, (labels[:B], labels[B:], ids[:B], ids[B:]))


def in_batch(B: int, L: int, device: torch.device) -> tuple[Tensor, Batch]:
    """Two views of B images: each of the 2B rows against all rows. Returns the features that want a gradient too."""
    torch.manual_seed(0)
    z = normalize(torch.randn(2, B, 128, device=device), dim=2).requires_grad_()
    labels = torch.stack([torch.randint(-c, c, (B,)) for c in (100, 300, 1000)[:L]], 1).clamp(min=-1).int()
    labels, ids = labels.repeat(2, 1).to(device), torch.arange(B, device=device).repeat(2)
    return z, Batch(z.flatten(0, 1), z.flip(0).flatten(0, 1), z.flatten(0, 1), (labels, labels, ids, ids))


def eager(query, positive, negatives, y, negative_y, ids, negative_ids, strategy="eliminate") -> Tensor:
    losses = reference.info_nce(query, positive, negatives, TEMPERATURE, y, negative_y, ids, negative_ids, strategy)
    return losses.mean()


def eager_half(query, positive, negatives, y, negative_y, ids, negative_ids, strategy="eliminate") -> Tensor:
    s_positive = (query * positive).sum(1, keepdim=True).float() / TEMPERATURE
    s = (query @ negatives.t()).float() / TEMPERATURE
    same_image = ids[:, None] == negative_ids
    losses = []
    for level in range(y.shape[1]):
        out = same_image | ((y[:, level, None] == negative_y[:, level]) & (y[:, level, None] >= 0))
        logits = torch.cat([s_positive, s.masked_fill(out, -torch.inf)], 1)
        losses.append(torch.logsumexp(logits, 1) - s_positive[:, 0])
    return torch.stack(losses).mean()


def fused_with(backend: str) -> Loss:
    def loss(query, positive, negatives, y, negative_y, ids, negative_ids, strategy="eliminate") -> Tensor:
        return info_nce(
            query, positive, negatives, temperature=TEMPERATURE, query_labels=y, negative_labels=negative_y,
            query_ids=ids, negative_ids=negative_ids, false_negatives=strategy, backend=backend,
        )  # fmt: skip

    return loss


def implementation_of(name: str, fused: Callable[[str, torch.dtype], str], dtype: torch.dtype) -> Loss:
    if name == "compiled":
        torch.compiler.reset()
        return cast(Loss, torch.compile(eager, dynamic=False))
    if name == "fused":
        return fused_with(fused("info_nce", dtype))
    return eager_half if name == "eager_half" else eager


def run_queue(name, strategy, L, dtype, device, small, fused, measure) -> None:
    batch = queue_batch(*((32, 1024) if small else (256, 65536)), L, dtype, device)
    if name == "eager_transposed":
        batch = batch._replace(negatives=batch.negatives.t().contiguous().t())
    loss = implementation_of(name, fused, dtype)

    def step(loss: Loss = loss) -> Tensor:
        value = loss(*batch[:3], *batch.labels_and_ids, strategy=strategy)
        return torch.autograd.grad(value, batch.query)[0]

    gradient = measure(step, backend=name)
    if small:
        torch.testing.assert_close(gradient, step(eager), rtol=0.05, atol=1e-6 if dtype == torch.float32 else 1e-4)


@pytest.mark.benchmark(group="queue: B=256 K=65536 D=128 L=3 eliminate, float32")
@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "eager_transposed"])
def test_queue_float32(name, device, small, fused, measure):
    run_queue(name, "eliminate", 3, torch.float32, device, small, fused, measure)


@pytest.mark.benchmark(group="queue: B=256 K=65536 D=128 L=3 eliminate, bfloat16")
@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "eager_half"])
def test_queue_bfloat16(name, device, small, fused, measure):
    run_queue(name, "eliminate", 3, torch.bfloat16, device, small, fused, measure)


@pytest.mark.benchmark(group="queue: B=256 K=65536 D=128 L=3 attract, float32")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_queue_attract(name, device, small, fused, measure):
    run_queue(name, "attract", 3, torch.float32, device, small, fused, measure)


@pytest.mark.benchmark(group="queue: B=256 K=65536 D=128 keep (MoCo's plain loss), float32")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_queue_keep(name, device, small, fused, measure):
    run_queue(name, "keep", 3, torch.float32, device, small, fused, measure)


@pytest.mark.benchmark(group="queue: B=256 K=65536 D=128 L=1 eliminate, float32")
@pytest.mark.parametrize("name", ["fused", "eager"])
def test_queue_one_level(name, device, small, fused, measure):
    run_queue(name, "eliminate", 1, torch.float32, device, small, fused, measure)


@pytest.mark.benchmark(group="in batch: B=1024 D=128 L=3 eliminate, all gradients, float32")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_in_batch(name, device, small, fused, measure):
    z, batch = in_batch(64 if small else 1024, 3, device)
    loss = implementation_of(name, fused, torch.float32)

    def step(loss: Loss = loss) -> Tensor:
        value = loss(*batch[:3], *batch.labels_and_ids)
        return torch.autograd.grad(value, z, retain_graph=True)[0]

    gradient = measure(step, backend=name)
    if small:
        torch.testing.assert_close(gradient, step(eager), rtol=1e-3, atol=1e-7)
