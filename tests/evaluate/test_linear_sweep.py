from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from ifnd_fast.evaluate.classifier import TrainingOptions
from ifnd_fast.evaluate.linear_sweep import Heads, Setting, choose, held_out_figures, standardise, train_heads

OPTIONS = TrainingOptions(epochs=4, batch_size=20, drops=(0.5,), seed=3)


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """(90, 6) features of 3 classes, one of them without rows, far from the origin and of different scales."""
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0, 2, 3])[torch.arange(90) % 3]
    centres = torch.randn(4, 6, generator=generator)
    x = centres[y] + torch.randn(90, 6, generator=generator)
    x[:, 5] = 1.0
    x = x * torch.tensor([1.0, 100, 1, 1, 0.01, 1]) + 5
    standardise(x)
    return x, y


def train(rows, settings: list[Setting]) -> Heads:
    return train_heads(*rows, torch.arange(90), 4, settings, OPTIONS, "heads", torch.device("cpu"))


def test_features_are_standardised_whatever_their_scale(rows):
    x, _ = rows
    others = torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[5.0, 3.0]])
    standardise(*others)
    assert torch.allclose(others[1], torch.tensor([[3.0, 1.0]]) / 2**0.5)
    assert x.pow(2).sum(1).mean() == pytest.approx(5 / 6, rel=1e-4)  # a column is constant
    assert x.mean(0).abs().max() < 1e-5 and (x[:, 5] == 0).all()


def test_each_is_torchs_sgd_of_its_setting_alone(rows):
    x, y = rows
    settings = [Setting(0.1, 0.0), Setting(3.0, 0.0), Setting(3.0, 0.05)]
    heads = train(rows, settings)
    for index, (lr, decay) in enumerate(settings):
        linear = nn.Linear(6, 4)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        groups = [{"params": [linear.weight], "weight_decay": decay}, {"params": [linear.bias]}]
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        for epoch in range(4):
            order = np.random.default_rng([3, epoch]).permutation(90)
            losses = []
            for step in range(4):
                batch = order[20 * step : 20 * step + 20]
                loss = nn.functional.cross_entropy(linear(x[batch]), y[batch])
                optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr * (0.1 if epoch >= 2 else 1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        assert torch.allclose(heads.weights[index], linear.weight, atol=1e-5)
        assert torch.allclose(heads.biases[index], linear.bias, atol=1e-5)
        assert heads.losses[index].item() == pytest.approx(np.mean(losses), abs=1e-5)


def test_no_other_row_is_looked_at(rows):
    x, y = rows
    even, spoiled = torch.arange(0, 90, 2), x.clone()
    spoiled[1::2] = torch.nan
    cases = (spoiled, y, even), (x[even], y[even], torch.arange(45))
    first, second = (
        train_heads(*case, 4, [Setting(1.0, 0.0)], OPTIONS, "heads", torch.device("cpu")) for case in cases
    )
    assert torch.equal(first.weights, second.weights) and first.weights.isfinite().all() and first.weights.any()


def test_one_that_diverges_is_told_and_not_chosen_and_the_others_are_as_without_it(rows):
    x, y = rows
    good = [Setting(1.0, 0.0), Setting(0.01, 0.0)]
    wild = [Setting(1e4, 0.0), Setting(1e38, 1.0)]
    heads, alone = (train(rows, settings) for settings in (wild + good, good))
    assert torch.allclose(heads.weights[2:], alone.weights, atol=1e-6)
    best, found = choose(wild + good, heads, *held_out_figures(heads, x, y))
    assert best == 2 and [one["diverged"] for one in found] == [True, True, False, False]
    assert found[0]["loss"] > math.log(4) and found[1]["loss"] is None and found[2]["held_out_top1"] > 60
    heads = train(rows, wild)
    with pytest.raises(ValueError, match="all have diverged"):
        choose(wild, heads, *held_out_figures(heads, x, y))


def test_of_equal_accuracies_the_smaller_loss_is_chosen(rows):
    x, y = rows
    settings = [Setting(0.001, 0.0), Setting(0.002, 0.0)]
    heads = train(rows, settings)
    assert choose(settings, heads, torch.tensor([50.0, 50.0]), torch.tensor([1.2, 1.1]))[0] == 1
    assert choose(settings, heads, torch.tensor([51.0, 50.0]), torch.tensor([1.2, 1.1]))[0] == 0
