"""The rows that a clustering takes: their type, their range, their lengths."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ifnd_fast.ops import checks
from ifnd_fast.ops.chunks import chunk_buffer, chunks

LARGEST_NORM = 1e18  # squares stay finite in float32,
SMALLEST_NORM = 1e-12  # and squared differences stay above its smallest normal number


def as_matrix(name: str, x: Tensor | np.ndarray, device: torch.device | str | None = None) -> Tensor:
    """x as a contiguous (N, D) float32, float16 or bfloat16 tensor, N >= 1, on the device."""
    x = torch.as_tensor(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
    checks.matrix(name, x)
    if len(x) == 0:
        raise ValueError(f"{name} must have at least one row, got shape {tuple(x.shape)}")
    dtype = torch.float32 if x.dtype == torch.float64 else x.dtype
    return x.detach().to(device=device, dtype=dtype).contiguous()


def check_rows(name: str, x: Tensor) -> Tensor:
    """Lengths of the rows, (N,) float64, which have to be finite and within float32's reach squared."""
    norms = torch.empty(len(x), dtype=torch.float64, device=x.device)
    buffer = chunk_buffer(x, torch.float64)
    for part in chunks(x):
        rows = buffer[: part.stop - part.start].copy_(x[part])
        torch.linalg.vector_norm(rows, dim=1, out=norms[part])
    if not bool(norms.isfinite().all()):
        bad = (~norms.isfinite()).nonzero()
        raise ValueError(f"{name} has NaN or infinite values in {len(bad)} rows, first in row {int(bad[0])}")
    largest = float(norms.max())
    if largest > LARGEST_NORM or 0 < largest < SMALLEST_NORM:
        raise ValueError(
            f"{name} has rows of length up to {largest:.3g}, wanted {SMALLEST_NORM} to {LARGEST_NORM}, "
            f"or float32 can't tell their squares apart: scale {name}"
        )
    return norms


def unit_rows(name: str, x: Tensor, norms: Tensor) -> Tensor:
    """x itself when its rows are of unit length up to rounding, else a copy scaled to that."""
    if bool((norms == 0).any()):
        first = int((norms == 0).nonzero()[0])
        raise ValueError(f"{name} has a zero vector in row {first}, which has no direction: leave it out")
    if float((norms - 1).abs().max()) <= 4 * torch.finfo(x.dtype).eps:
        return x
    unit = torch.empty_like(x)
    for part in chunks(x):
        unit[part] = (x[part] / norms[part, None]).to(x.dtype)
    return unit
