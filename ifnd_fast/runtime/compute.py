"""Which device a command computes on, and in which precision."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from ifnd_fast.ops import backends
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.errors import UsageError


@dataclass(frozen=True)
class Compute:
    """Where a command computes, and in which precision; `pick_compute` makes it, once for each command.

    Attributes:
        device: of networks, labels and features.
        amp: the dtype of mixed precision; None: off.
    """

    device: torch.device
    amp: torch.dtype | None = None

    def autocast(self) -> AbstractContextManager:
        """The context in which networks are evaluated."""
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def scaler(self, enabled: bool = True) -> torch.amp.GradScaler:
        """Of losses, whose gradients would underflow in float16; with other dtypes it changes nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=enabled and self.amp == torch.float16)

    @property
    def contrast_dtype(self) -> torch.dtype:
        """The dtype of queries, keys, queue and clustered features.

        float16 on GPUs with mixed precision: half the bytes and tensor cores at their full rate; for numbers up to 1 it
        is finer than bfloat16. A CPU computes it no faster.
        """
        return torch.float16 if self.device.type == "cuda" and self.amp is not None else torch.float32


def pick_compute(device: str, amp: str, on_cpu: str = "") -> Compute:
    """What --device and --amp ask for; see `pick_device` and `pick_amp`.

    Raises:
        UsageError: there is no such device here.
    """
    picked = pick_device(device)
    return Compute(picked, pick_amp(amp, picked, on_cpu))


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto": this rank's GPU if there is one, else the CPU; "cuda": this rank's GPU.

    Raises:
        UsageError: no such device here, or of a kind that nothing here computes on.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no name of a device; {_possible()}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise UsageError(f"--device {name}: ifnd_fast computes on the CPU and on CUDA GPUs only; {_possible()}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", distributed.local_rank())
    if device.type == "cpu":
        return torch.device("cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if torch.cuda.is_available() and (device.index or 0) >= torch.cuda.device_count():
            reason = f"there is no GPU {device.index}; a process takes the one of its LOCAL_RANK where none is named"
        raise UsageError(f"--device {name}: {reason}; {_possible()}") from error
    return device


def _possible() -> str:
    """What --device can be here."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    why = "" if gpus else f" (torch {torch.__version__} can use no CUDA GPU here)"
    return f"possible here: {', '.join(['auto', 'cpu', *gpus])}{why}"


def pick_amp(amp: str, device: torch.device, on_cpu: str = "") -> torch.dtype | None:
    """The dtype of mixed precision on this device; None: off.

    Args:
        on_cpu: what a run found "auto" to be on a CPU, by measuring; "": bfloat16 where the CPU multiplies it.
    """
    if amp == "auto":
        if device.type == "cuda":
            amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        else:
            amp = on_cpu or ("bf16" if backends.cpu_has_bfloat16() else "off")
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[amp]


def leave_cores_to_workers(device: torch.device, workers: int) -> None:
    """Compute on as many threads fewer as there are loading processes, at least one; OMP_NUM_THREADS overrides.

    Training on a CPU waits for its slowest thread at every operator: one that shares its core with a loading
    process holds up all the others.
    """
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - workers))
