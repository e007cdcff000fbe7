"""Launches of the kernels of ifnd_fast._cuda, on the current stream: their arguments by name, tensors as addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from ifnd_fast.ops.address import address
from ifnd_fast.ops.backends import _cuda

# What the kernels read and write where it is always the same; rows of 16 bits, or of a kind that they are told, aside.
_DTYPES = {
    **dict.fromkeys(("query_labels", "negative_labels", "labels", "row_count", "near_rows", "near_count",
                     "level_count", "counts", "false_negative_counts"), torch.int32),
    **dict.fromkeys(("query_ids", "negative_ids", "order", "begins"), torch.int64),
    **dict.fromkeys(("half_norms", "query_units", "negative_units", "feature_units", "centroid_units", "units",
                     "query_summary", "negative_summary", "centroid_summary", "summary", "lengths", "margins",
                     "confidence", "split_max", "split_sum", "split_grad", "split_factor", "level_max", "level_sum",
                     "log_normalizer", "loss_grad", "negatives_grad", "loss", "positive_weight", "query_grad",
                     "distances"), torch.float32),
    "sums": torch.float64,
    "terms": torch.float16,
    "flags": torch.uint8,
}  # fmt: skip


def kernel(name: str, device: torch.device, **arguments: Tensor | bool | int | float | str | None) -> None:
    """Call this function of ifnd_fast._cuda; None is a null pointer."""
    values = {
        key: address(key, value, _DTYPES.get(key, value.dtype), device.type, None)
        if isinstance(value, Tensor)
        else (0 if value is None else value)
        for key, value in arguments.items()
    }
    getattr(_cuda, name)(stream=stream(device), **values)


def stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
