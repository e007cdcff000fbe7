"""Ranks: how a process finds the others, and the few collectives that training needs.

Without torch.distributed everything here is the identity on one rank.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ifnd_fast.runtime.errors import CommandError, PeerError, UsageError

T = TypeVar("T")
_store: dist.Store | None = None  # a board that all ranks read and write
_of_thread = threading.local()  # .group: the process group that this thread's collectives go over


def start(device: torch.device, timeout_minutes: float = 30.0) -> None:
    """Join the other ranks if torchrun started this process: NCCL on GPUs, gloo on CPUs.

    A rank that doesn't answer within the timeout counts as lost.

    Raises:
        UsageError: the environment names a rank only in part, or is one of several processes without ranks.
    """
    global _store
    if ranks_in_environment() > 0 and not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        _store, number, count = next(dist.rendezvous("env://", timeout=timeout))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=timeout)


def ranks_in_environment() -> int:
    """How many ranks the launcher started, as torchrun tells it: 0 without a launcher.

    Raises:
        UsageError: part of what torchrun sets is missing or wrong; or srun or mpirun started several processes without
            it, each of which would do everything alone.
    """
    environment = os.environ
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        _refuse_strangers()
        return 0
    lacking = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if lacking:
        given = [f"{name}={environment[name]}" for name in ("RANK", "WORLD_SIZE") if name in environment]
        raise UsageError(f"{' '.join(given)} in the environment, but no {', '.join(lacking)}: {START_BY_TORCHRUN}")
    try:
        number, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        int(environment["MASTER_PORT"]), local_rank()
    except ValueError as error:
        names = "RANK, WORLD_SIZE, MASTER_PORT, LOCAL_RANK"
        raise UsageError(f"{names} in the environment must be numbers: {error}: {START_BY_TORCHRUN}") from None
    if not 0 <= number < count:
        raise UsageError(f"RANK={number} must be from 0 to below WORLD_SIZE={count}: {START_BY_TORCHRUN}")
    return count


def refuse_ranks(task: str) -> None:
    """Raises UsageError: several processes were started for a task that one does."""
    count = ranks_in_environment()
    if count > 1:
        raise UsageError(f"{task} computes in one process, but {count} were started: start it without torchrun")


def _refuse_strangers() -> None:
    """Several processes of another launcher than torchrun would each train the whole run alone, in one folder."""
    for launcher, number, counts in LAUNCHERS:
        count = next((os.environ[name] for name in counts if name in os.environ), "1")
        if number in os.environ and count.isdecimal() and int(count) > 1:
            raise UsageError(
                f"{launcher} started {count} processes ({number}={os.environ[number]}), each of which would do "
                f"everything alone: {START_BY_TORCHRUN}. If this is the only process, run it with env -u {number}"
            )


START_BY_TORCHRUN = (
    "start one torchrun on each machine, which starts a process for each GPU: srun --ntasks-per-node=1 torchrun "
    "--nnodes=$SLURM_NNODES --nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint=FIRST_MACHINE:29500 "
    "$(which ifnd-fast-train) ...; on one machine torchrun --standalone --nproc-per-node=GPUS $(which ifnd-fast-train)"
    " ...; for a single process unset RANK and WORLD_SIZE"
)
# What tells a process its number, and what tells how many there are: the first that is set counts.
LAUNCHERS = (
    ("srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
    ("mpirun", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
    ("mpirun", "PMI_RANK", ("PMI_SIZE",)),
)


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


def new_group() -> dist.ProcessGroup | None:
    """A second connection among all ranks, for collectives beside those of the main thread; all ranks have to call."""
    return cast(dist.ProcessGroup, dist.new_group()) if world_size() > 1 else None


@contextmanager
def use_group(group: dist.ProcessGroup | None) -> Iterator[None]:
    """This thread's collectives go over that group (None: the default one)."""
    _of_thread.group = group
    try:
        yield
    finally:
        _of_thread.group = None


def _group() -> dist.ProcessGroup | None:
    return getattr(_of_thread, "group", None)


def all_gather(tensor: Tensor) -> Tensor:
    """(B, ...) of every rank, joined to (world_size * B, ...) in rank order; no gradient."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous(), group=_group())
    return torch.cat(parts)


def all_gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`all_gather` of several tensors of B rows each, of any dtypes, in one collective."""
    if world_size() == 1:
        return tensors
    parts = [tensor.reshape(len(tensor), -1).contiguous().view(torch.uint8) for tensor in tensors]
    gathered = all_gather(torch.cat(parts, dim=1)).split([part.shape[1] for part in parts], dim=1)
    return tuple(
        rows.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:])
        for rows, tensor in zip(gathered, tensors, strict=True)
    )


def gather_rows(rows: Tensor) -> Tensor:
    """Every rank's rows (n, ...), as many as it has, in rank order; no gradient."""
    if world_size() == 1:
        return rows
    sizes = all_gather(torch.tensor([len(rows)], dtype=torch.int64, device=rows.device)).tolist()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = all_gather(padded).split(max(sizes)) if max(sizes) else (padded,) * len(sizes)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def every(holds: bool, device: torch.device) -> bool:
    """Whether it holds on every rank."""
    return int(sum_over_ranks(torch.tensor(int(not holds), dtype=torch.int64, device=device))) == 0


def same_everywhere(*tensors: Tensor) -> bool:
    """Whether every rank has the same bits in these tensors, by a digest of 8 bytes; all ranks have to call it."""
    if world_size() == 1:
        return True
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().data)
    value = int.from_bytes(digest.digest(), "little", signed=True)
    own = torch.tensor([value], dtype=torch.int64, device=tensors[0].device)
    return bool((all_gather(own) == own).all())


def all_gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order; whatever pickle takes."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value, group=_group())
    return values


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
        gathered = torch.stack(grads)
        dist.all_reduce(gathered)
        return gathered[rank()]


def own_share(tensor: Tensor) -> Tensor:
    """This rank's equal part of (world_size * B, ...)."""
    share = len(tensor) // world_size()
    return tensor[rank() * share : (rank() + 1) * share]


def share(n: int) -> range:
    """The numbers, out of n, that are this rank's: contiguous, in rank order, of sizes that differ by at most 1."""
    return range(rank() * n // world_size(), (rank() + 1) * n // world_size())


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, group=_group())
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's tensor on every rank, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, 0, group=_group())
    return tensor


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def lost_contact(error: RuntimeError, patience: float = 5.0) -> str | None:
    """What to say of an error that a collective raised because a rank is gone; None: it is of another kind.

    Ranks that are alive meet the same error, and sign the board within `patience` seconds; the others are named.
    """
    signs = ("closed by peer", "Connection reset", "Connection refused", "Broken pipe", "imed out", "imeout", "NCCL")
    if world_size() == 1 or not (isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)):
        return None
    silent = [number for number in range(world_size()) if number != rank()]
    try:
        store = cast(dist.Store, _store)
        store.set(f"alive {rank()}", "")
        deadline = time.monotonic() + patience
        while silent and time.monotonic() < deadline:
            time.sleep(0.05)
            silent = [number for number in silent if not store.check([f"alive {number}"])]
    except (RuntimeError, AttributeError):  # the board itself is gone
        return f"rank {rank()} lost contact with the other ranks"
    named = f"no word from rank {', '.join(map(str, silent))}" if silent else "all ranks are alive: the network failed"
    return f"rank {rank()} lost contact with the others: {named}"


@contextmanager
def raise_on_all_ranks(together: bool) -> Iterator[None]:
    """A ValueError, TypeError or CommandError of one rank is raised on all: none waits for a rank that gave up."""
    error: Exception | None = None
    try:
        yield
    except (TypeError, ValueError, CommandError) as own:
        error = own
    if together and world_size() > 1:
        code = error.exit_code if isinstance(error, CommandError) else None
        failures = all_gather_objects(None if error is None else (str(error), code))
        if error is None:
            for number, failed in enumerate(failures):
                if failed is not None:
                    message, code = f"on rank {number}: {failed[0]}", failed[1]
                    raise ValueError(message) if code is None else PeerError(message, code)
    if error is not None:
        raise error
