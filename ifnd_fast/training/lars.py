"""LARS: SGD whose steps are as long as each layer's weights allow, for large batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

TRUST = 0.001


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017), as SimCLR, BYOL and MoCo v3 train with it:

        d = g + weight_decay w,   u = momentum u + d trust |w| / |d|,   w = w - lr u

    With "adapt" False in a parameter group, d = g and its rate is not scaled: for biases and norms. Where |w| or |d| is
    0, neither is it.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate.
        momentum: of the update.
        weight_decay: L2 penalty, of what is adapted.
        trust: the trust coefficient.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0,
                 trust: float = TRUST):  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust,
                                  "adapt": True})  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; no value is read back from the device."""
        assert closure is None, "LARS evaluates the loss once"
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            steps = [weight.grad for weight in weights]
            if group["adapt"]:
                steps = _adapted(weights, steps, group["weight_decay"], group["trust"])
            buffers = [self._buffer(weight) for weight in weights]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps)
            torch._foreach_add_(weights, buffers, alpha=-group["lr"])

    def _buffer(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state["momentum_buffer"]


def _adapted(weights: list[Tensor], gradients: list[Tensor], weight_decay: float, trust: float) -> list[Tensor]:
    steps = torch._foreach_add(gradients, weights, alpha=weight_decay)
    rates = [
        torch.where((size > 0) & (length > 0), trust * size / length, 1.0)
        for size, length in zip(torch._foreach_norm(weights), torch._foreach_norm(steps), strict=True)
    ]
    return list(torch._foreach_mul(steps, rates))
