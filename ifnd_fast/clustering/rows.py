"""The rows that a clustering takes: their type, their range, their lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ifnd_fast.ops import checks
from ifnd_fast.ops.address import plain
from ifnd_fast.ops.chunks import chunk_buffer, chunks

LARGEST_NORM, SMALLEST_NORM = 1e28, 1e-28  # float32 holds centroids of this size to all digits


def as_matrix(name: str, x: Any, device: torch.device | str | None = None) -> Tensor:
    """x as a contiguous (N, D) tensor of its own float dtype, N >= 1, on the device; without gradient.

    What is no tensor (an array, a list, a data frame) may be of integers, which become float64.
    """
    if not isinstance(x, Tensor):
        x = torch.from_numpy(as_floats(name, x))
        if x.dim() != 2:
            raise ValueError(
                f"{name} must have two dimensions (rows, D), got shape {tuple(x.shape)}. Reshape your data: "
                f"{name}.reshape(-1, 1) has one column, {name}.reshape(1, -1) one row"
            )
        if x.shape[1] == 0:  # in scikit-learn's words
            raise ValueError(f"{name} has 0 feature(s) (shape={tuple(x.shape)}) while a minimum of 1 is required.")
    checks.matrix(name, x)
    if len(x) == 0:
        raise ValueError(f"{name} must have at least one row, got shape {tuple(x.shape)}")
    return plain(x.detach().to(device=device))


def as_floats(name: str, x: Any) -> np.ndarray:
    """What NumPy makes of x, of a float type that torch has and in this machine's byte order."""
    if hasattr(x, "toarray"):
        raise TypeError(f"{name} must be dense, got a sparse {type(x).__name__}: pass {name}.toarray()")
    try:
        array = np.asarray(x)
        if array.dtype.kind == "O":
            array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be of numbers: {error}") from error
    if array.dtype.kind == "c":
        raise ValueError(f"{name} must be of real numbers, got {array.dtype}. Complex data not supported")
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be of numbers, got {type(x).__name__} of {array.dtype}")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    # torch warns of arrays that are read-only, and takes no foreign byte order
    return np.require(array, array.dtype.newbyteorder("="), ("C_CONTIGUOUS", "WRITEABLE"))


def as_tensor(found: Tensor | np.ndarray) -> Tensor:
    """What `as_given` gave, as a tensor again. torch.as_tensor would take an array to torch's default device."""
    return found if isinstance(found, Tensor) else torch.from_numpy(found)


def as_given(result: Tensor, x: Any) -> Tensor | np.ndarray:
    """A result for rows x: a tensor for a tensor, an array for whatever else."""
    return result if isinstance(x, Tensor) else result.cpu().numpy()


def check_rows(name: str, x: Tensor, sums: Tensor | None = None) -> Tensor:
    """Lengths of the rows, (N,) float64, which have to be finite and of a size that float32 holds. Rows are added to
    `sums` (D,) float64."""
    norms = torch.empty(len(x), dtype=torch.float64, device=x.device)
    buffer = chunk_buffer(x, torch.float64)
    for part in chunks(x):
        rows = buffer[: part.stop - part.start].copy_(x[part])
        torch.linalg.vector_norm(rows, dim=1, out=norms[part])
        if sums is not None:
            sums += rows.sum(0)
    if not bool(norms.isfinite().all()):
        bad = (~norms.isfinite()).nonzero()
        raise ValueError(f"{name} has NaN or infinite values in {len(bad)} rows, first in row {int(bad[0])}")
    largest = float(norms.max())
    if largest > LARGEST_NORM or 0 < largest < SMALLEST_NORM:
        raise ValueError(
            f"{name} has rows of length up to {largest:.3g}, wanted {SMALLEST_NORM} to {LARGEST_NORM}, "
            f"or float32 can't hold their means: scale {name}"
        )
    return norms


def unit_rows(name: str, x: Tensor, norms: Tensor) -> Tensor:
    """x itself when its rows are of unit length up to rounding, else a copy scaled to that."""
    if bool((norms == 0).any()):
        first = int((norms == 0).nonzero()[0])
        raise ValueError(f"{name} has a zero vector in row {first}, which has no direction: leave it out")
    if float((norms - 1).abs().max()) <= 4 * torch.finfo(x.dtype).eps:
        return x
    unit = torch.empty(x.shape, dtype=single(x[:0]).dtype, device=x.device)
    for part in chunks(x):
        unit[part] = (x[part] / norms[part, None]).to(unit.dtype)
    return unit


def single(x: Tensor) -> Tensor:
    """x itself, or float64 as float32, which k-means computes in."""
    return x.float() if x.dtype == torch.float64 else x
