"""The adapters on two ranks: a training by Lightning, and the losses side by side with those they stand in for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forked import run_ranks

for package in ("lightning", "lightly", "pytorch_metric_learning"):
    pytest.importorskip(package, reason="extras: lightning, lightly, metric-learning")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from torch.utils.data.distributed import DistributedSampler
from ifnd_fast.runtime import distributed
from tests.integrations.test_lightning import IMAGES, images, train

rank = int(os.environ["RANK"])
loader = images(sampler=DistributedSampler(IMAGES, 2, rank, shuffle=False))
model, queue, renewal = train(sys.argv[1], epochs=2, loader=loader, strategy="ddp", devices=2)
assert distributed.world_size() == 2 and len(model.seen) == 4
keys, indices = (torch.cat([distributed.all_gather(step) for step in part]) for part in zip(*model.seen))
slots = torch.arange(len(keys))[-40:] % 40
assert torch.equal(queue.queue.features[slots], keys[-40:]) and torch.equal(queue.queue.indices[slots], indices[-40:])
assert distributed.same_everywhere(*queue.queue.negatives(), queue.labels, *model.parameters())
assert (model.labels[1] >= 0).sum(0).tolist() == [30, 30]

import lightly.loss
from pytorch_metric_learning import losses
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from ifnd_fast.integrations import metric_learning
from ifnd_fast.integrations.lightly import NTXentLoss

def loss_and_gradients(loss_fn, *arguments, views=1):
    generator = torch.Generator().manual_seed(rank)
    rows = [torch.randn(16, 12, generator=generator).requires_grad_() for _ in range(views)]
    loss = loss_fn(*rows, *arguments)
    loss.backward()
    return [loss.detach(), *(view.grad for view in rows)]

for size in (0, (40, 12)):
    made = []
    for kind in (NTXentLoss, lightly.loss.NTXentLoss):
        torch.manual_seed(0)
        made.append(kind(0.2, size, gather_distributed=True))
    for _ in range(3):
        torch.testing.assert_close(*(loss_and_gradients(loss, views=2) for loss in made), rtol=2e-5, atol=1e-6)
torch.testing.assert_close(made[0].queue.features, made[1].memory_bank.bank)

labels = torch.arange(16) // 3 + rank
for name in ("NTXentLoss", "SupConLoss"):
    for efficient in (False, True):
        made = [DistributedLossWrapper(getattr(kinds, name)(), efficient) for kinds in (metric_learning, losses)]
        torch.testing.assert_close(*(loss_and_gradients(loss, labels) for loss in made), rtol=2e-5, atol=1e-6)
"""


@pytest.mark.slow
def test_two_ranks(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    done = run_ranks(2, script, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
