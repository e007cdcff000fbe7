"""Ranks: how a process finds the others, and the few collectives that training needs.

Without torch.distributed everything here is the identity on one rank.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: torch.device) -> None:
    """Join the other ranks if torchrun started this process: NCCL on GPUs, gloo on CPUs."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its own machine: the GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def all_gather(tensor: Tensor) -> Tensor:
    """(B, ...) of every rank, joined to (world_size * B, ...) in rank order; no gradient."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """As `all_gather`; the gradient of every rank's use comes back to the rank that sent it."""
    if world_size() == 1:
        return tensor
    return torch.cat(_AllGather.apply(tensor))


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return tuple(parts)

    @staticmethod
    def backward(ctx, *grads):
        everyones = torch.stack(grads)
        dist.all_reduce(everyones)
        return everyones[rank()]


def own_share(tensor: Tensor) -> Tensor:
    """This rank's equal part of (world_size * B, ...)."""
    share = len(tensor) // world_size()
    return tensor[rank() * share : (rank() + 1) * share]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's tensor on every rank, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
