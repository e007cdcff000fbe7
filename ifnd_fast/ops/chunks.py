"""Rows a chunk at a time, so that temporaries stay small."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18  # of a float32 temporary on the CPU: 1 MiB, of a core's own cache;
GPU_CHUNK_ELEMENTS = 1 << 26  # on a GPU: 256 MiB, worth the launches


def chunk_rows(x: Tensor) -> int:
    """Rows of x in CHUNK_ELEMENTS (on a GPU, GPU_CHUNK_ELEMENTS), at least 1."""
    return max(1, (CHUNK_ELEMENTS if x.device.type == "cpu" else GPU_CHUNK_ELEMENTS) // x.shape[1])


def chunk_buffer(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """For a copy of any of `chunks(x)`."""
    return torch.empty(min(len(x), chunk_rows(x)), x.shape[1], dtype=dtype, device=x.device)


def chunks(x: Tensor, rows: int | None = None) -> Iterator[slice]:
    """Slices of that many rows of x each; by default `chunk_rows`."""
    rows = chunk_rows(x) if rows is None else rows
    for first in range(0, len(x), max(rows, 1)):
        yield slice(first, min(first + rows, len(x)))
