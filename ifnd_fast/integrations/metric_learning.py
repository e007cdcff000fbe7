"""In place of two losses of pytorch-metric-learning, without their matrices of pairs and of similarities:
`from ifnd_fast.integrations.metric_learning import NTXentLoss, SupConLoss`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ifnd_fast.ops import checks
from ifnd_fast.ops.info_nce import info_nce

try:
    from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
    from pytorch_metric_learning.losses import BaseMetricLossFunction
    from pytorch_metric_learning.reducers import AvgNonZeroReducer
except ImportError as error:
    raise ImportError(f"{error}: pip install 'ifnd-fast[metric-learning]'") from error


class _Batch(NamedTuple):
    """Rows (B, D) and references (R, D) as they are multiplied, and their labels (B,), (R,) int32 from 0."""

    rows: Tensor
    references: Tensor
    labels: Tensor
    reference_labels: Tensor
    same: bool  # the references are the rows: none is its own positive or negative


class _Fused(BaseMetricLossFunction):
    """What the losses have in common: labelled rows against references."""

    def __init__(self, temperature: float, backend: str = "auto", **others: Any):
        super().__init__(**others)
        self.temperature, self.backend = checks.temperature(temperature), backend
        if type(self.distance) not in (CosineSimilarity, DotProductSimilarity) or self.distance.power != 1:
            raise ValueError(f"distance must be CosineSimilarity() or DotProductSimilarity(), got {self.distance}")
        self.add_to_recordable_attributes(list_of_names=["temperature"], is_stat=False)

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor | None
    ) -> dict[str, Any]:
        """The losses, for the reducer; called by BaseMetricLossFunction.forward."""
        if labels is None or ref_labels is None:
            raise ValueError(f"{type(self).__name__} needs labels, and ref_labels with ref_emb")
        rows = self.distance.maybe_normalize(embeddings)
        references = rows if ref_emb is embeddings else self.distance.maybe_normalize(ref_emb)
        numbers = torch.unique(torch.cat([labels, ref_labels]), return_inverse=True)[1].int()
        batch = _Batch(rows, references, numbers[: len(labels)], numbers[len(labels) :], ref_labels is labels)
        return self._losses(batch, indices_tuple)

    def _losses(self, batch: _Batch, indices_tuple: Any) -> dict[str, Any]:
        raise NotImplementedError


class NTXentLoss(_Fused):
    """pytorch_metric_learning.losses.NTXentLoss, with memory for the positive pairs alone. For each such pair (a, p):

        -log( e^{s(a,p)} / (e^{s(a,p)} + sum over n of other labels of e^{s(a,n)}) )

    It also goes into SelfSupervisedLoss, CrossBatchMemory and DistributedLossWrapper. Miners may choose the positive
    pairs; every row of another label is a negative.

    Args:
        temperature: softmax temperature, 1e-6 to 1e6.
        backend: see `ifnd_fast.info_nce`.
        others: of BaseMetricLossFunction: reducer, distance (CosineSimilarity or DotProductSimilarity), ...

    Raises:
        TypeError, ValueError: a parameter of the wrong type or out of range, or another distance; in a call, no labels,
            or an indices_tuple that leaves negatives out or is of triplets.

    Example:
        >>> loss_fn = NTXentLoss(temperature=0.1)
        >>> loss_fn(torch.randn(8, 16), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])).shape
        torch.Size([])
    """

    def __init__(self, temperature: float = 0.07, backend: str = "auto", **others: Any):
        super().__init__(temperature, backend, **others)

    def _losses(self, batch: _Batch, indices_tuple: Any) -> dict[str, Any]:
        if indices_tuple is None:
            anchors, positives = _positive_pairs(batch)
        else:
            anchors, positives = _pairs(indices_tuple, batch)
        if len(anchors) == 0:
            return self.zero_losses()
        losses = info_nce(
            batch.rows[anchors], batch.references[positives], batch.references, temperature=self.temperature,
            query_labels=batch.labels[anchors, None], negative_labels=batch.reference_labels[:, None],
            reduction="none", backend=self.backend,
        )  # fmt: skip
        return {"loss": {"losses": losses, "indices": (anchors, positives), "reduction_type": "pos_pair"}}


class SupConLoss(_Fused):
    """pytorch_metric_learning.losses.SupConLoss (Khosla et al., 2020), with memory for the rows alone. For each row a
    with positives P(a), rows of its label:

        log( sum over x but a of e^{s(a,x)} ) - mean over p in P(a) of s(a,p)

    averaged over the rows where that is above 0. It also goes into SelfSupervisedLoss, CrossBatchMemory and
    DistributedLossWrapper. It takes no miner's choice of pairs.

    Args, Raises: see `NTXentLoss`; an indices_tuple has to have all pairs.

    Example:
        >>> loss_fn = SupConLoss(temperature=0.1)
        >>> loss_fn(torch.randn(8, 16), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])).shape
        torch.Size([])
    """

    def __init__(self, temperature: float = 0.1, backend: str = "auto", **others: Any):
        super().__init__(temperature, backend, **others)

    def get_default_reducer(self) -> AvgNonZeroReducer:
        return AvgNonZeroReducer()

    def _losses(self, batch: _Batch, indices_tuple: Any) -> dict[str, Any]:
        """With any p in P(a):  InfoNCE of a and p against all x but a and p,  + s(a,p) - mean over P(a) of s(a,.)"""
        own = _own_references(batch, indices_tuple)
        order, first, counts = _groups(batch)
        n_positives = counts - (own >= 0).long()
        anchors = (n_positives > 0).nonzero().flatten()
        if len(anchors) == 0 or bool((counts == len(batch.references)).all()):  # no positive, or no negative
            return self.zero_losses()
        rows, own = batch.rows[anchors], own[anchors]
        positives = order[first[anchors]]
        positives = torch.where(positives == own, order[(first[anchors] + 1).clamp(max=len(order) - 1)], positives)
        numbers = torch.arange(len(batch.references), device=own.device)
        against_one = info_nce(
            rows, batch.references[positives], batch.references, temperature=self.temperature,
            query_ids=positives, negative_ids=numbers,  # p is in no sum but the positive's,
            query_labels=own.int()[:, None], negative_labels=numbers.int()[:, None],  # and a itself in none
            reduction="none", backend=self.backend,
        )  # fmt: skip
        sums = torch.zeros(int(batch.reference_labels.max()) + 1, rows.shape[1], dtype=rows.dtype, device=rows.device)
        sums = sums.index_add(0, batch.reference_labels, batch.references)[batch.labels[anchors]]
        sums = sums - torch.where(own[:, None] >= 0, batch.references[own], 0)
        means = sums / n_positives[anchors, None]
        to_mean = (rows * (batch.references[positives] - means)).sum(1) / self.temperature
        losses = against_one.new_zeros(len(batch.rows)).index_copy(0, anchors, against_one + to_mean)
        indices = torch.arange(len(losses), device=losses.device)
        return {"loss": {"losses": losses, "indices": indices, "reduction_type": "element"}}


def _groups(batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The references' numbers ordered by label (R,); where in that order each row's label begins, and how many
    references have it, (B,)."""
    order = batch.reference_labels.argsort(stable=True)
    ordered = batch.reference_labels[order]
    first = torch.searchsorted(ordered, batch.labels)
    return order, first, torch.searchsorted(ordered, batch.labels, right=True) - first


def _positive_pairs(batch: _Batch) -> tuple[Tensor, Tensor]:
    """Rows and references of equal labels, (P,) each, by row and then by reference."""
    order, first, counts = _groups(batch)
    anchors = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    before = (counts.cumsum(0) - counts)[anchors]  # pairs of earlier rows
    positives = order[first[anchors] + torch.arange(len(anchors), device=counts.device) - before]
    if not batch.same:
        return anchors, positives
    other = anchors != positives
    return anchors[other], positives[other]


def _pairs(indices_tuple: Any, batch: _Batch) -> tuple[Tensor, Tensor]:
    """The positive pairs of an indices_tuple.

    Raises:
        ValueError: it is of triplets, or its negatives are not all those of other labels, each once.
    """
    if len(indices_tuple) != 4:
        raise ValueError("indices_tuple has triplets: this loss takes pairs (anchors, positives, anchors, negatives)")
    anchors, positives, other_anchors, negatives = indices_tuple
    differ = batch.labels[:, None] != batch.reference_labels
    given = torch.zeros_like(differ)
    given[other_anchors, negatives] = True
    if len(negatives) != int(differ.sum()) or not torch.equal(given, differ):
        raise ValueError(
            f"indices_tuple has {len(negatives)} negative pairs, wanted all {int(differ.sum())} of different labels: "
            "this loss takes no choice of negatives; use pytorch_metric_learning's with such a miner"
        )
    return anchors, positives


def _own_references(batch: _Batch, indices_tuple: Any) -> Tensor:
    """Which reference is the row itself, (B,) int64: it is in no pair. -1: none.

    Raises:
        ValueError: the indices_tuple lacks other pairs too.
    """
    if indices_tuple is None:
        numbers = torch.arange(len(batch.rows), device=batch.rows.device)
        return numbers if batch.same else torch.full_like(numbers, -1)
    anchors, positives = _pairs(indices_tuple, batch)
    lacking = batch.labels[:, None] == batch.reference_labels
    n_wanted = int(lacking.sum())
    lacking[anchors, positives] = False
    if n_wanted - len(positives) != int(lacking.sum()) or int(lacking.sum(1).max()) > 1:
        raise ValueError(
            f"indices_tuple has {len(positives)} positive pairs, wanted all {n_wanted} of equal labels but a row with "
            "itself: this loss takes no choice of pairs; use pytorch_metric_learning's with a miner"
        )
    return torch.where(lacking.any(1), lacking.int().argmax(1), -1)
