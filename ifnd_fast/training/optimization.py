"""The update of a step: the optimizer, and the scaler that keeps gradients of float16 from underflow."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from ifnd_fast.config import OptimConfig
from ifnd_fast.runtime.compute import Compute
from ifnd_fast.runtime.spans import span
from ifnd_fast.training.lars import LARS


class Optimization:
    """The optimizer of an encoder's weights.

    Args:
        config: which optimizer, learning rate, momentum and weight decay.
        encoder: what is trained.
        compute: whose precision the scaler is for.
    """

    def __init__(self, config: OptimConfig, encoder: nn.Module, compute: Compute):
        self.optimizer = make_optimizer(config, encoder)
        self.scaler = compute.scaler()
        self.updates = 0  # of the weights, in this process; the scaler skips those that would not be finite
        self.optimizer.register_step_post_hook(self._count_update)

    def _count_update(self, *_: object) -> None:
        self.updates += 1

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to that of the step."""
        with span("backward"):
            self.scaler.scale(loss).backward()

    def step(self, lr: float) -> bool:
        """One update by the gradient so far, at that learning rate; whether the scaler skipped it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with span("optimizer"):
            updates = self.updates
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        return updates == self.updates

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint. Raises KeyError, ValueError: it is of another network, or holds none."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def make_optimizer(config: OptimConfig, encoder: nn.Module) -> Optimizer:
    """Of --optimizer. LARS and AdamW get biases and norms, all that has one dimension or none, as a group without decay
    and adaptation; SGD has one group, as MoCo has."""
    parameters = list(encoder.parameters())
    if config.optimizer == "sgd":
        return SGD(parameters, config.lr, momentum=config.sgd_momentum, weight_decay=config.weight_decay)
    weights = [parameter for parameter in parameters if parameter.ndim > 1]
    others: dict[str, Any] = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    if config.optimizer == "adamw":
        return AdamW([{"params": weights}, others], config.lr, weight_decay=config.weight_decay)
    groups = [{"params": weights}, others | {"adapt": False}]
    return LARS(groups, config.lr, config.sgd_momentum, config.weight_decay)
