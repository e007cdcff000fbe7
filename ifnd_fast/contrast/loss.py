"""IFNDLoss: the loss as a module, for one's own training code."""

from __future__ import annotations

from torch import Tensor, nn

from ifnd_fast.ops import checks
from ifnd_fast.ops.backends import BACKENDS
from ifnd_fast.ops.info_nce import COMBINATIONS, REDUCTIONS, STRATEGIES, info_nce


class IFNDLoss(nn.Module):
    """`ifnd_fast.info_nce` with its settings kept: InfoNCE without its false negatives.

    Args:
        temperature: softmax temperature, 1e-6 to 1e6 (MoCo v2: 0.2). A tensor of one number is learned: hand in a
            torch.nn.Parameter, which is then this module's.
        false_negatives: "eliminate" (default), "attract", "keep" (plain InfoNCE) or "margin".
        margin: of "margin".
        level_combination: "mean" (default), "any" or "all": see `ifnd_fast.info_nce`.
        reduction: "mean", "sum" or "none".
        backend: "auto", or one of "cuda", "triton", "cpu", "reference" by name.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of range.

    Example:
        >>> loss_fn = IFNDLoss(temperature=0.5)
        >>> query, positive, keys = torch.eye(2)[:1], torch.eye(2)[:1], torch.eye(2)
        >>> loss_fn(query, positive, keys)
        tensor(0.7586)
        >>> labels, key_labels = torch.tensor([[3]]).int(), torch.tensor([[3], [-1]]).int()
        >>> loss_fn(query, positive, keys, query_labels=labels, negative_labels=key_labels)  # leaves the first key out
        tensor(0.1269)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        false_negatives: str = "eliminate",
        reduction: str = "mean",
        level_combination: str = "mean",
        backend: str = "auto",
        margin: float = 0.1,
    ):
        super().__init__()
        checks.choice("false_negatives", false_negatives, STRATEGIES)
        checks.choice("reduction", reduction, REDUCTIONS)
        checks.choice("level_combination", level_combination, COMBINATIONS)
        checks.choice("backend", backend, ("auto", *BACKENDS))
        if isinstance(temperature, Tensor):
            checks.learned_temperature(temperature)
            self.temperature: float | Tensor = temperature
        else:
            self.temperature = checks.temperature(temperature)
        self.margin = checks.finite("margin", margin)
        self.false_negatives = false_negatives
        self.reduction = reduction
        self.level_combination = level_combination
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        positive: Tensor,
        negatives: Tensor,
        query_labels: Tensor | None = None,
        negative_labels: Tensor | None = None,
        query_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        hard_negatives: Tensor | None = None,
    ) -> Tensor:
        """Loss of queries (B, D) against positives (B, D) and negatives (K, D); see `ifnd_fast.info_nce`."""
        return info_nce(
            query,
            positive,
            negatives,
            temperature=self.temperature,
            query_labels=query_labels,
            negative_labels=negative_labels,
            query_ids=query_ids,
            negative_ids=negative_ids,
            hard_negatives=hard_negatives,
            false_negatives=self.false_negatives,
            margin=self.margin,
            level_combination=self.level_combination,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        learned = isinstance(self.temperature, Tensor)
        temperature = f"{float(self.temperature):.4g} (learned)" if learned else self.temperature
        return f"temperature={temperature}, false_negatives={self.false_negatives!r}"
