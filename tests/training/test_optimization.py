"""LARS by its definition in float64, and which weights each optimizer decays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ifnd_fast.config import OptimConfig
from ifnd_fast.training.lars import LARS
from ifnd_fast.training.optimization import make_optimizer


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)).double()


def defined(weights, gradients, buffers, lr, momentum, decay, trust=0.001):
    """One step of LARS, a weight at a time."""
    for weight, gradient, buffer in zip(weights, gradients, buffers, strict=True):
        step = gradient
        if weight.ndim > 1:
            step = gradient + decay * weight
            size, length = weight.square().sum().sqrt(), step.square().sum().sqrt()
            if size > 0 and length > 0:
                step = step * (trust * size / length)
        buffer.mul_(momentum).add_(step)
        weight.sub_(lr * buffer)


def test_lars_is_its_definition():
    network = encoder()
    with torch.no_grad():
        network[3].weight.zero_()  # its rate is then not scaled
    optimizer = make_optimizer(OptimConfig(optimizer="lars", lr=0.3, weight_decay=1e-2, sgd_momentum=0.8), network)
    weights = [parameter.detach().clone() for parameter in network.parameters()]
    buffers = [torch.zeros_like(weight) for weight in weights]
    for step in range(4):
        optimizer.zero_grad()
        network(torch.randn(5, 3, 3, 3, dtype=torch.float64)).square().sum().backward()
        network[0].bias.grad = None if step == 2 else network[0].bias.grad  # a part that took no part
        gradients = [parameter.grad for parameter in network.parameters()]
        kept = [n for n, gradient in enumerate(gradients) if gradient is not None]
        defined(*([values[n] for n in kept] for values in (weights, gradients, buffers)), 0.3, 0.8, 1e-2)
        optimizer.step()
        for parameter, weight in zip(network.parameters(), weights, strict=True):
            torch.testing.assert_close(parameter.detach(), weight, rtol=1e-12, atol=1e-14)


def test_lars_goes_on_from_its_state():
    ended = []
    for interrupted in (False, True):
        network, optimizer = encoder(), None
        for step in range(4):
            if optimizer is None or (interrupted and step == 2):
                state = None if optimizer is None else optimizer.state_dict()
                optimizer = make_optimizer(OptimConfig(optimizer="lars", lr=0.3), network)
                if state is not None:
                    optimizer.load_state_dict(state)
            optimizer.zero_grad()
            network(torch.full((2, 3, 3, 3), step + 1.0, dtype=torch.float64)).sum().backward()
            optimizer.step()
        ended.append(network[0].weight.detach())
    assert torch.equal(*ended)


@pytest.mark.parametrize("name, kind", [("sgd", torch.optim.SGD), ("lars", LARS), ("adamw", torch.optim.AdamW)])
def test_biases_and_norms_are_left_out_but_of_sgd(name, kind):
    optimizer = make_optimizer(OptimConfig(optimizer=name, weight_decay=0.1), encoder())
    groups = [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    assert type(optimizer) is kind and groups == ([(6, 0.1)] if name == "sgd" else [(2, 0.1), (4, 0.0)])
