"""The loss with its gradients, fused and as plain torch: against a queue (MoCo) and within the batch (SimCLR).

fused         by the backend that "auto" takes; on a GPU also by each of its own
eager         in plain torch, level by level, products in the inputs' dtype and the softmax in float32 as under
              autocast; queue stored (K, D). Faster than the reference, which is written to be read
compiled      torch.compile of it, to which the reference's masks of all levels at once would be four times slower
..._transposed  the same, queue stored (D, K), as MoCo stores it
inf_cl        https://github.com/DAMO-NLP-SG/Inf-CLIP, where it is installed: the plain loss of a batch, on a GPU
torch_linear_cross_entropy, ..._in_chunks   the plain loss of a batch by torch, 2.14 or newer
"""

from __future__ import annotations

import functools
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
ODD_SIZES = ((37, 10007, 100), (32, 10240, 96), (48, 10240, 112), (251, 10007, 100), (256, 10240, 96))
FUSED = ("fused", "cuda", "triton") if torch.cuda.is_available() else ("fused",)
PEERS = (*FUSED, "compiled", "compiled_transposed", "eager", "eager_transposed")

Loss = Callable[..., Tensor]


class Batch(NamedTuple):
    query: Tensor
    positive: Tensor
    negatives: Tensor
    labels_and_ids: tuple[Tensor, Tensor, Tensor, Tensor]


def queue_batch(B: int, K: int, D: int, L: int, dtype: torch.dtype, device: torch.device) -> Batch:
    """Half of the labels accepted."""
    torch.manual_seed(0)
    query, positive, negatives = (normalize(torch.randn(n, D)).to(device, dtype) for n in (B, B, K))
    labels = torch.stack([torch.randint(-clusters, clusters, (B + K,)) for clusters in CLUSTERS[:L]], 1)
    labels = labels.clamp(min=-1).int().to(device)
    ids = torch.randint(1_000_000, (B + K,)).to(device)
    return Batch(query.requires_grad_(), positive, negatives, (labels[:B], labels[B:], ids[:B], ids[B:]))


def in_batch(rows: int, device: torch.device) -> tuple[Tensor, Batch]:
    """Two views of rows / 2 images, each row against all rows. Returns the features that want a gradient too."""
    torch.manual_seed(0)
    images = rows // 2
    z = normalize(torch.randn(2, images, 128, device=device), dim=2).requires_grad_()
    labels = torch.stack([torch.randint(-c, c, (images,)) for c in (100, 300, 1000)], 1).clamp(min=-1).int()
    labels, ids = labels.repeat(2, 1).to(device), torch.arange(images, device=device).repeat(2)
    return z, Batch(z.flatten(0, 1), z.flip(0).flatten(0, 1), z.flatten(0, 1), (labels, labels, ids, ids))


def eager(query, positive, negatives, y, negative_y, ids, negative_ids, strategy="eliminate") -> Tensor:
    s_positive = (query * positive).sum(1, keepdim=True).float() / TEMPERATURE
    s = (query @ negatives.t()).float() / TEMPERATURE
    same_image = ids[:, None] == negative_ids
    kept = s.masked_fill(same_image, -torch.inf)
    if strategy == "keep":
        return (torch.logsumexp(torch.cat([s_positive, kept], 1), 1) - s_positive[:, 0]).mean()
    losses = []
    for level in range(y.shape[1]):
        detected = (y[:, level, None] == negative_y[:, level]) & (y[:, level, None] >= 0) & ~same_image
        logits = kept.masked_fill(detected, -torch.inf) if strategy == "eliminate" else kept
        pulled = s_positive[:, 0]
        if strategy == "attract":
            pulled = (pulled + s.masked_fill(~detected, 0.0).sum(1)) / (1 + detected.sum(1))
        losses.append(torch.logsumexp(torch.cat([s_positive, logits], 1), 1) - pulled)
    return torch.stack(losses).mean()


def right(query, positive, negatives, y, negative_y, ids, negative_ids, strategy="eliminate") -> Tensor:
    losses = reference.info_nce(query, positive, negatives, TEMPERATURE, y, negative_y, ids, negative_ids, strategy)
    return losses.mean()


def fused_with(backend: str) -> Loss:
    def loss(query, positive, negatives, y, negative_y, ids, negative_ids, strategy="eliminate") -> Tensor:
        return info_nce(
            query, positive, negatives, temperature=TEMPERATURE, query_labels=y, negative_labels=negative_y,
            query_ids=ids, negative_ids=negative_ids, false_negatives=strategy, backend=backend,
        )  # fmt: skip

    return loss


def implementation_of(name: str, fused: Callable[..., str], dtype: torch.dtype) -> Loss:
    if name.startswith("compiled"):
        torch.compiler.reset()
        return cast(Loss, torch.compile(eager, dynamic=False))
    if name in FUSED:
        return fused_with(fused("info_nce", dtype, "auto" if name == "fused" else name))
    return eager


def run_queue(
    name, device, small, fused, measure, strategy="eliminate", L=3, dtype=torch.float32, row=None, B=256, K=65536, D=128
) -> None:
    queries, keys = (32, min(K, 1024)) if small else (B, K)
    batch = queue_batch(queries, keys, D, L, dtype, device)
    if name.endswith("_transposed"):
        batch = batch._replace(negatives=batch.negatives.t().contiguous().t())
    loss = implementation_of(name, fused, dtype)

    def step(loss: Loss = loss) -> Tensor:
        value = loss(*batch[:3], *batch.labels_and_ids, strategy=strategy)
        return torch.autograd.grad(value, batch.query)[0]

    gradient = measure(step, row or name, operations=2 * 2 * B * K * D, dtype=str(dtype))
    if small:
        torch.testing.assert_close(gradient, step(right), rtol=0.05, atol=1e-6 if dtype == torch.float32 else 1e-4)


@pytest.mark.benchmark(group="queue: B=256 K=65536 D=128 L=3 eliminate, float32")
@pytest.mark.parametrize("name", PEERS)
def test_queue_float32(name, device, small, fused, measure):
    run_queue(name, device, small, fused, measure)


@pytest.mark.benchmark(group="queue: B=256 K=65536 D=128 L=3 eliminate, bfloat16")
@pytest.mark.parametrize("name", PEERS)
def test_queue_bfloat16(name, device, small, fused, measure):
    run_queue(name, device, small, fused, measure, dtype=torch.bfloat16)


@pytest.mark.benchmark(group="queue: B=256 K=65536 D=128 L=3 eliminate, float16")
@pytest.mark.parametrize("name", FUSED)
def test_queue_float16(name, device, small, fused, measure):
    run_queue(name, device, small, fused, measure, dtype=torch.float16)


@pytest.mark.benchmark(group="queue: B=256 K=65536 D=128 L=3 attract, float32")
@pytest.mark.parametrize("name", [*FUSED, "compiled", "eager"])
def test_queue_attract(name, device, small, fused, measure):
    run_queue(name, device, small, fused, measure, strategy="attract")


@pytest.mark.benchmark(group="queue: B=256 K=65536 D=128 keep (MoCo's plain loss), float32")
@pytest.mark.parametrize("name", [*FUSED, "compiled", "eager"])
def test_queue_keep(name, device, small, fused, measure):
    run_queue(name, device, small, fused, measure, strategy="keep")


@pytest.mark.benchmark(group="queue: B=256 K=65536 D=128 L=1 eliminate, float32")
@pytest.mark.parametrize("name", [*FUSED, "compiled", "eager"])
def test_queue_one_level(name, device, small, fused, measure):
    run_queue(name, device, small, fused, measure, L=1)


@pytest.mark.benchmark(group="queue, number of threads: B=256 K=65536 D=128 L=3 eliminate, float32")
@pytest.mark.parametrize("n", [1, 2])
def test_queue_threads(n, device, small, fused, measure, threads):
    if device.type != "cpu":
        pytest.skip("threads are the CPU's")
    threads(n)
    run_queue("fused", device, small, fused, measure, row=f"{n} threads")


@pytest.mark.benchmark(group="queue, number of keys: B=256 D=128 L=3 eliminate, float32")
@pytest.mark.parametrize("K", [0, 1024, 4096, 16384, 65536, 262144, 1048576])
def test_queue_keys(K, device, small, fused, measure):
    run_queue("fused", device, small, fused, measure, row=f"K={K:,}", K=K)


@pytest.mark.benchmark(group="queue, odd sizes: L=3 eliminate, float32")
@pytest.mark.parametrize(
    "size", [(37, 10007, 100), (32, 10240, 96), (48, 10240, 112), (251, 10007, 100), (256, 10240, 96)]
)
def test_queue_odd_sizes(size, device, small, fused, measure):
    sizes = dict(zip("BKD", size, strict=True))
    run_queue("fused", device, small, fused, measure, row=" ".join(f"{k}={n}" for k, n in sizes.items()), **sizes)


@pytest.mark.parametrize("rows", [1024, 4096])
@pytest.mark.parametrize("name", [*FUSED, "compiled", "eager"])
def test_in_batch(name, rows, device, small, fused, measure, benchmark):
    benchmark.group = f"in batch: B=K={rows} D=128 L=3 eliminate, all gradients, float32"
    z, batch = in_batch(64 if small else rows, device)
    loss = implementation_of(name, fused, torch.float32)

    def step(loss: Loss = loss) -> Tensor:
        value = loss(*batch[:3], *batch.labels_and_ids)
        return torch.autograd.grad(value, z, retain_graph=True)[0]

    # Scores and the query's gradient, then again scores and the negatives' gradient.
    gradient = measure(step, name, operations=4 * 2 * rows * rows * 128, dtype="torch.float32")
    if small:
        torch.testing.assert_close(gradient, step(right), rtol=1e-3, atol=1e-7)


def infinite_contrastive(query, keys) -> Tensor:
    """inf-cl's loss of one GPU: keys[i] is the positive of query[i], all others are its negatives."""
    inf_cl = pytest.importorskip("inf_cl", reason="inf-cl is not installed (pip install inf-cl)")
    return inf_cl.cal_flash_loss(query, keys, scale=1 / TEMPERATURE, head_dim=query.shape[1]).mean()


def linear_cross_entropy(query: Tensor, keys: Tensor, in_chunks: bool) -> Tensor:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch has no linear_cross_entropy: pip install 'torch>=2.14'")
    options = torch.nn.LinearCrossEntropyOptions() if in_chunks else None
    own = torch.arange(len(query), device=query.device)
    return torch.nn.functional.linear_cross_entropy(query / TEMPERATURE, keys, own, options=options)


PLAIN_PEERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "inf_cl": infinite_contrastive,
    "torch_linear_cross_entropy": functools.partial(linear_cross_entropy, in_chunks=False),
    "torch_linear_cross_entropy_in_chunks": functools.partial(linear_cross_entropy, in_chunks=True),
}


@pytest.mark.parametrize("name", [*FUSED, *PLAIN_PEERS, "compiled", "eager"])
@pytest.mark.benchmark(group="in batch: B=K=4096 D=128 keep, all gradients, float32")
def test_in_batch_keep(name, device, small, fused, measure):
    """Two views; each row of the first against all of the second."""
    if name == "inf_cl" and device.type == "cpu":
        pytest.skip("inf-cl computes on a GPU")
    rows = 64 if small else 4096
    torch.manual_seed(0)
    query, keys = (normalize(torch.randn(rows, 128, device=device)).requires_grad_() for _ in range(2))
    ids = torch.arange(rows, device=device)  # the own key is the positive, no negative

    def plain(query: Tensor, keys: Tensor, loss: Loss = right) -> Tensor:
        return loss(query, keys, keys, None, None, ids, ids, strategy="keep")

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(query, keys), (query, keys))

    loss = PLAIN_PEERS.get(name)
    if loss is None:
        loss = functools.partial(plain, loss=implementation_of(name, fused, torch.float32))
    allowed = 1e-2 if name == "inf_cl" else 1e-4  # inf-cl may multiply in TF32
    for gradient, expected in zip(step(loss), step(plain), strict=True):
        assert (gradient - expected).norm() <= allowed * expected.norm()
    measure(lambda: step(loss), name, operations=4 * 2 * rows * rows * 128, dtype="torch.float32")
