"""The update of a step: SGD, and the scaler that keeps gradients of float16 from underflow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ifnd_fast.config import OptimConfig
from ifnd_fast.runtime.compute import Compute
from ifnd_fast.runtime.spans import span


class Optimization:
    """SGD on an encoder's weights.

    Args:
        config: learning rate, momentum and weight decay.
        encoder: what is trained.
        compute: whose precision the scaler is for.
    """

    def __init__(self, config: OptimConfig, encoder: nn.Module, compute: Compute):
        self.optimizer = torch.optim.SGD(
            encoder.parameters(), config.lr, momentum=config.sgd_momentum, weight_decay=config.weight_decay
        )
        self.scaler = compute.scaler()
        self.updates = 0  # of the weights, in this process; the scaler skips those that would not be finite
        self.optimizer.register_step_post_hook(self._count_update)

    def _count_update(self, *_: object) -> None:
        self.updates += 1

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self, loss: Tensor, lr: float) -> bool:
        """One update by the gradient of `loss` at that learning rate; whether the scaler skipped it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with span("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
        with span("optimizer"):
            updates = self.updates
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return updates == self.updates

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint. Raises KeyError, ValueError: it is of another network, or holds none."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
