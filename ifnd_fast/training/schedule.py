"""The learning rate over a training."""

from __future__ import annotations

import math

from ifnd_fast.config import OptimConfig


def learning_rate(step: int, steps_per_epoch: int, config: OptimConfig) -> float:
    """Linear warm-up, then half a cosine from lr to 0 over the rest of the training."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
