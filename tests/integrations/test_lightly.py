"""Side by side with lightly's own loss: the same values, gradients and bank; and what labels change."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from ifnd_fast.integrations.lightly import NTXentLoss
from ifnd_fast.ops.info_nce import info_nce

theirs = pytest.importorskip("lightly.loss", reason="extra: lightly")


def pair(*arguments, **settings):
    """Ours and theirs, with the same random bank."""
    made = []
    for kind in (NTXentLoss, theirs.NTXentLoss):
        torch.manual_seed(0)
        made.append(kind(*arguments, **settings))
    return made


def step(loss_fn, batch, seed):
    """Loss and gradients of a batch of two views, and of what normalises them."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(batch, 16, generator=generator).mul(3).requires_grad_() for _ in range(2)]
    loss = loss_fn(*views)
    loss.backward()
    return loss.detach(), views[0].grad, views[1].grad


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("bank", [0, (40, 16)], ids=["in batch", "bank"])
def test_loss_gradients_and_bank_are_theirs(bank, temperature):
    """Over batches that fill the bank, end at its end and go beyond it: what goes beyond is left out."""
    fused, eager = pair(temperature=temperature, memory_bank_size=bank)
    for seed, batch in enumerate((16, 16, 16, 8, 16, 16, 1, 40, 60, 16)):
        torch.testing.assert_close(step(fused, batch, seed), step(eager, batch, seed), rtol=2e-5, atol=1e-6)
        if bank:
            torch.testing.assert_close(fused.queue.features, eager.memory_bank.bank)
            assert fused.queue.pointer == int(eager.memory_bank.bank_ptr)


def test_the_bank_stays_without_gradient():
    fused, eager = pair(memory_bank_size=(8, 16))
    before = fused.queue.features.clone()
    views = torch.randn(4, 16), torch.randn(4, 16)
    for given in (views, (views[0], views[1].clone().requires_grad_())):
        torch.testing.assert_close(fused(*given), eager(*given))
    assert torch.equal(fused.queue.features, before) and torch.equal(eager.memory_bank.bank, before)


def test_half_precision_is_computed_in_float32():
    views = [torch.randn(8, 16).bfloat16().requires_grad_() for _ in range(2)]
    fused, eager = pair(temperature=0.1, memory_bank_size=(8, 16))
    loss = fused(*views)
    torch.testing.assert_close(loss, eager(*(view.float() for view in views)))
    loss.backward()
    assert views[0].grad.dtype == views[1].grad.dtype == torch.bfloat16


def test_labels_take_false_negatives_out():
    """In the batch and, by the labels that went in with the keys or were renewed since, in the bank."""
    first, second = (normalize(torch.randn(6, 16)) for _ in range(2))
    labels, indices = torch.tensor([[0], [0], [1], [-1], [1], [2]]).int(), torch.arange(6)
    rows, both = torch.cat([first, second]), torch.cat([labels, labels])
    wanted = info_nce(
        rows, rows.roll(6, 0), rows, query_labels=both, negative_labels=both,
        query_ids=indices.repeat(2), negative_ids=indices.repeat(2), backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(NTXentLoss(0.2)(first, second, labels, indices), wanted)
    torch.testing.assert_close(NTXentLoss(0.2)(first, second, labels), wanted)

    loss_fn = NTXentLoss(0.2, memory_bank_size=(6, 16))
    loss_fn(first.requires_grad_(), second, labels, indices)
    loss_fn.queue.relabel(table := torch.tensor([[3], [4], [4], [4], [-1], [-1]]).int())
    got = loss_fn(second, first.detach(), table, indices)
    wanted = info_nce(second, first, second, query_labels=table, negative_labels=table,
                      query_ids=indices, negative_ids=indices, backend="reference")  # fmt: skip
    torch.testing.assert_close(got, wanted)


def test_the_bank_is_saved_and_what_lightly_saved_is_loaded():
    fused, eager = pair(memory_bank_size=(8, 16))
    step(fused, 3, 0)
    resumed = NTXentLoss(memory_bank_size=(8, 16))
    resumed.load_state_dict(fused.state_dict())
    assert torch.equal(step(resumed, 4, 1)[0], step(fused, 4, 1)[0])
    holder = torch.nn.ModuleDict({"criterion": fused})
    holder.load_state_dict(torch.nn.ModuleDict({"criterion": eager}).state_dict())


def test_temperature_may_change():
    fused, eager = pair(temperature=0.5)
    fused.temperature = eager.temperature = 0.1
    torch.testing.assert_close(step(fused, 8, 0), step(eager, 8, 0))
    with pytest.raises(ValueError, match="temperature"):
        fused.temperature = 0


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"memory_bank_size": 4096}, r"memory_bank_size must be 0 or \(rows, length of a row\), got 4096"),
        ({"memory_bank_size": (1, 2, 3)}, "memory_bank_size must be 0 or"),
        ({"memory_bank_size": (-1, 2)}, "size"),
        ({"temperature": 0.0}, "temperature"),
        ({"false_negatives": "drop"}, "false_negatives"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        NTXentLoss(**settings)


def test_unknown_images_need_a_bank():
    views = torch.randn(2, 16), torch.randn(2, 16)
    with pytest.raises(ValueError, match="indices must be 0 or more"):
        NTXentLoss()(*views, indices=torch.tensor([0, -1]))
    assert NTXentLoss(memory_bank_size=(4, 16))(*views, indices=torch.tensor([0, -1])).isfinite()
