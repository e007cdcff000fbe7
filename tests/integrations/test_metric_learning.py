"""Side by side with pytorch-metric-learning's own losses: the same values, gradients and wrappers, in less memory."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

pml = pytest.importorskip("pytorch_metric_learning", reason="extra: metric-learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402

from ifnd_fast.integrations.metric_learning import NTXentLoss, SupConLoss  # noqa: E402

PAIRS = [(NTXentLoss, losses.NTXentLoss), (SupConLoss, losses.SupConLoss)]
both = pytest.mark.parametrize("ours, theirs", PAIRS, ids=["NTXent", "SupCon"])

LABELS = {
    "two of each": torch.arange(8).repeat(2),
    "unequal, some alone": torch.tensor([5, 5, 5, 2, -1, -1, 2, 2, 2, 9, 7, 7, 7, 7, 7, 0]),
    "one class": torch.zeros(16, dtype=torch.int64),
    "all alone": torch.arange(16),
}


def loss_and_gradients(loss_fn, *arguments, n=16, references=0, seed=0, **named):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 12, generator=generator).requires_grad_()
    leaves = [rows]
    if references:
        leaves.append(torch.randn(references, 12, generator=generator).requires_grad_())
        named["ref_emb"] = leaves[1]
    loss = loss_fn(rows, *arguments, **named)
    if loss.requires_grad:
        loss.backward()
    return [loss.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


def agree(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6)


@both
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_loss_and_gradients_are_theirs(ours, theirs, labels, temperature):
    agree(loss_and_gradients(ours(temperature), labels), loss_and_gradients(theirs(temperature), labels))


@both
@pytest.mark.parametrize("reference_labels", [torch.arange(5).repeat(2), torch.full((10,), 5)], ids=["some", "one"])
def test_with_references(ours, theirs, reference_labels):
    given = {"references": 10, "ref_labels": reference_labels}
    labels = LABELS["unequal, some alone"]
    agree(loss_and_gradients(ours(), labels, **given), loss_and_gradients(theirs(), labels, **given))


@both
def test_distances_reducers_and_regularizers_are_taken(ours, theirs):
    for settings in (
        # warm enough that no pair's probability is below 1e-38, at which theirs ends
        {"distance": distances.DotProductSimilarity(normalize_embeddings=False), "temperature": 2.0},
        {"reducer": reducers.ThresholdReducer(low=1.0)},
        {"reducer": reducers.ClassWeightedReducer(weights=torch.linspace(0, 1, 10))},
        {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.1},
    ):
        labels = LABELS["unequal, some alone"].clamp(min=0)
        agree(loss_and_gradients(ours(**settings), labels), loss_and_gradients(theirs(**settings), labels))


@both
def test_their_wrappers_take_it(ours, theirs):
    """Views of images, and a memory of earlier batches, of which each batch's own rows are part."""

    def views(kind, symmetric):
        wrapped = losses.SelfSupervisedLoss(kind(), symmetric=symmetric)
        return loss_and_gradients(wrapped, references=16)

    def memory(kind):
        wrapped = losses.CrossBatchMemory(kind(), embedding_size=12, memory_size=24)
        return [loss_and_gradients(wrapped, labels, seed=n) for n, labels in enumerate(list(LABELS.values())[:2] * 2)]

    for symmetric in (True, False):
        agree(views(ours, symmetric), views(theirs, symmetric))
    for got, wanted in zip(memory(ours), memory(theirs), strict=True):
        agree(got, wanted)


def test_miners_may_choose_positives_alone():
    labels = LABELS["unequal, some alone"]
    rows = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    every = miners.BatchEasyHardMiner(pos_strategy="hard", neg_strategy="all")(rows, labels)
    assert len(every) == 4 and 0 < len(every[0]) < 40
    agree(loss_and_gradients(NTXentLoss(), labels, every), loss_and_gradients(losses.NTXentLoss(), labels, every))
    with pytest.raises(ValueError, match="wanted all 56 of equal labels but a row with itself"):
        loss_and_gradients(SupConLoss(), labels, every)
    for miner, words in (
        (miners.MultiSimilarityMiner(epsilon=0.0), "this loss takes no choice of negatives"),
        (miners.TripletMarginMiner(), "has triplets"),
    ):
        for kind in (NTXentLoss, SupConLoss):
            with pytest.raises(ValueError, match=words):
                loss_and_gradients(kind(), labels, miner(rows, labels))


@both
def test_what_it_cannot_do_is_refused(ours, theirs):
    for distance in (distances.LpDistance(), distances.CosineSimilarity(power=2), distances.SNRDistance()):
        with pytest.raises(ValueError, match=r"distance must be CosineSimilarity\(\) or DotProductSimilarity\(\)"):
            ours(distance=distance)
    with pytest.raises(ValueError, match="temperature"):
        ours(temperature=0.0)
    with pytest.raises(ValueError, match=f"{ours.__name__} needs labels"):
        ours()(torch.randn(4, 8), indices_tuple=(torch.tensor([0]), torch.tensor([1])) * 2)


@both
def test_half_precision(ours, theirs):
    rows, labels = torch.randn(16, 12), LABELS["two of each"]
    torch.testing.assert_close(ours()(rows.bfloat16(), labels).float(), theirs()(rows, labels), rtol=0.02, atol=0.02)


def peak_growth(loss_fn, n_rows):
    """Bytes that a loss and its gradient take beside rows of 64 numbers, two of each label."""

    def peak():
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

    rows, labels = torch.randn(n_rows, 64).requires_grad_(), torch.arange(n_rows // 2).repeat(2)
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    loss_fn(rows, labels).backward()
    return peak() - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_memory_is_of_the_rows_and_not_of_their_pairs():
    """Of 4,096 rows, 1 MB: a few copies. Theirs takes matrices of positive by negative pairs (here of 256 rows; of
    4,096 each would be 275 GB), or of rows by rows."""
    megabyte = 2**20
    assert peak_growth(losses.NTXentLoss(), 256) > 128 * megabyte
    assert peak_growth(losses.SupConLoss(), 2048) > 32 * megabyte
    for kind in (NTXentLoss, SupConLoss):
        peak_growth(kind(), 64)  # starts threads
        assert peak_growth(kind(), 4096) < 20 * megabyte
