"""Launches of the kernels of ifnd_fast._cuda, on the current stream: their arguments by name, tensors as addresses."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from ifnd_fast.ops.address import address
from ifnd_fast.ops.backends import _cuda

ALIGNED = 32  # numbers of 4 bytes: lines of the caches
Argument = Tensor | bool | int | float | str | None

# What the kernels read and write where it is always the same; rows of 16 bits, or of a kind that they are told, aside.
_DTYPES = {
    **dict.fromkeys(("query_labels", "negative_labels", "labels", "row_count", "near_rows", "near_count",
                     "counts", "false_negative_counts"), torch.int32),
    **dict.fromkeys(("query_ids", "negative_ids", "order", "begins"), torch.int64),
    **dict.fromkeys(("half_norms", "query_units", "negative_units", "feature_units", "centroid_units", "units",
                     "query_summary", "negative_summary", "centroid_summary", "summary", "lengths", "margins",
                     "confidence", "log_normalizer", "loss_grad", "negatives_grad", "distances"), torch.float32),
    "sums": torch.float64,
    "terms": torch.float16,
}  # fmt: skip


def addresses(device: torch.device, **arguments: Argument) -> dict[str, int | float | str]:
    """What kernels of this device take: tensors as addresses, None as a null pointer. What several launches share is
    looked at once, and given to them as it comes from here."""
    kind = device.type
    return {
        key: address(key, value, _DTYPES.get(key, value.dtype), kind, None)
        if isinstance(value, Tensor)
        else (0 if value is None else value)
        for key, value in arguments.items()
    }


def buffers(like: Tensor, sizes: dict[str, int]) -> tuple[Tensor, dict[str, int]]:
    """One tensor on this device for so many numbers of 4 bytes, by name, and the addresses of each: it is to be
    held until what uses them is launched. An allocation for each would take the host longer than the launches."""
    places, numbers = {}, 0
    for name, size in sizes.items():
        places[name] = numbers
        numbers += -(-size // ALIGNED) * ALIGNED
    held = like.new_empty(numbers, dtype=torch.float32)
    first = held.data_ptr()
    return held, {name: first + 4 * place for name, place in places.items()}


def kernel(name: str, device: torch.device, **arguments: Argument) -> None:
    """Call this function of ifnd_fast._cuda."""
    getattr(_cuda, name)(stream=stream(device), **addresses(device, **arguments))


def kernel_at(name: str, device: torch.device, arguments: Mapping[str, int | float | str], **more: int | str) -> None:
    """The same with arguments that `addresses` gave."""
    getattr(_cuda, name)(stream=stream(device), **arguments, **more)


def stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
