"""Linear classifiers of several learning rates and weight decays, trained together on features computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ifnd_fast.evaluate.classifier import TrainingOptions
from ifnd_fast.runtime.console import track


class Setting(NamedTuple):
    lr: float
    weight_decay: float


class Heads(NamedTuple):
    """H linear classifiers."""

    weights: Tensor
    """(H, C, D)"""
    biases: Tensor
    """(H, C)"""
    losses: Tensor
    """(H,) float64, mean cross-entropy of the last epoch's steps; not finite of one that diverged far"""

    def logits(self, x: Tensor) -> Tensor:
        """(N, D) -> (H, N, C)."""
        return torch.baddbmm(self.biases[:, None], x.expand(len(self.weights), -1, -1), self.weights.mT)


def standardise(x: Tensor, *others: Tensor) -> None:
    """In place: features (N, D), and others with them, less the means of `x`, in units of its deviations, and divided
    by sqrt(D): rows of about length 1, so that learning rates mean the same whatever the encoder."""
    mean, deviation = x.mean(0), x.std(0, correction=0)
    scale = torch.where(deviation > 0, deviation, 1.0) * math.sqrt(x.shape[1])
    for features in (x, *others):
        features.sub_(mean).div_(scale)


def train_heads(
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    n_classes: int,
    settings: Sequence[Setting],
    options: TrainingOptions,
    description: str,
    device: torch.device,
) -> Heads:
    """SGD on cross-entropy from zero weights, one classifier for each setting, all on the same batches.

    Args:
        x: (N, D) float32 features after `standardise`; on the CPU, where they may be larger than a GPU's memory.
        y: (N,) int64 classes.
        rows: (M,) numbers of those to train on.
        options: epochs, batch size, drops, momentum and seed of the batches' order; not its learning rate and decay.
        device: of the classifiers.
    """
    heads = len(settings)
    rates, decays = (torch.tensor(column, device=device) for column in zip(*settings, strict=True))
    weights = torch.zeros(heads, n_classes, x.shape[1], device=device)
    biases = torch.zeros(heads, n_classes, device=device)
    velocities = torch.zeros_like(weights), torch.zeros_like(biases)
    size = min(options.batch_size, len(rows))
    steps = len(rows) // size
    losses = torch.zeros(heads, dtype=torch.float64, device=device)
    for epoch in track(range(options.epochs), description, options.epochs):
        order = rows[torch.from_numpy(np.random.default_rng([options.seed, epoch]).permutation(len(rows)))]
        rate = rates * options.drop_factor ** sum(epoch >= round(drop * options.epochs) for drop in options.drops)
        losses.zero_()
        for batch in order[: steps * size].split(size):
            loss, weight_grads, bias_grads = _gradients(x[batch].to(device), y[batch].to(device), weights, biases)
            losses += loss / steps
            weight_grads += decays[:, None, None] * weights
            for values, velocity, grads in zip((weights, biases), velocities, (weight_grads, bias_grads), strict=True):
                velocity.mul_(options.sgd_momentum).add_(grads)
                values.sub_(rate.view(-1, *[1] * (values.ndim - 1)) * velocity)
    return Heads(weights, biases, losses)


def _gradients(x: Tensor, y: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy (H,) of a batch, and its gradients: softmax less one-hot, times the features."""
    logs = F.log_softmax(Heads(weights, biases, biases).logits(x), dim=2)  # (H, B, C)
    rows = torch.arange(len(x), device=x.device)
    loss = -logs[:, rows, y].double().mean(1)
    errors = logs.exp()
    errors[:, rows, y] -= 1
    errors /= len(x)
    return loss, errors.mT @ x, errors.sum(1)


def held_out_figures(heads: Heads, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 in percent and mean cross-entropy (H,) of held-out rows."""
    top1, losses = [], []
    for weights, biases in zip(heads.weights, heads.biases, strict=True):  # one by one: (N, C) logits, not (H, N, C)
        logits = F.linear(x, weights, biases)
        top1.append(100.0 * (logits.argmax(1) == y).double().mean())
        losses.append(F.cross_entropy(logits, y))
    return torch.stack(top1), torch.stack(losses)


def choose(settings: Sequence[Setting], heads: Heads, top1: Tensor, losses: Tensor) -> tuple[int, list[dict[str, Any]]]:
    """The setting with the best top-1 on held-out rows, of equal ones that with the smallest loss there; and a record
    of each. One whose training loss ended above log(classes), which guessing has, has diverged and is not chosen.

    Raises:
        ValueError: all have diverged.
    """
    chance = math.log(heads.weights.shape[1])
    found = [
        {
            **setting._asdict(), "loss": loss if math.isfinite(loss) else None,
            "diverged": not loss <= chance, "held_out_top1": accuracy,
        }
        for setting, loss, accuracy in zip(settings, heads.losses.tolist(), top1.tolist(), strict=True)
    ]  # fmt: skip
    usable = [index for index, one in enumerate(found) if not one["diverged"]]
    if not usable:
        raise ValueError("all have diverged")
    held_out = losses.tolist()
    return max(usable, key=lambda index: (found[index]["held_out_top1"], -held_out[index])), found
