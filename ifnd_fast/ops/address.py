"""The one place where tensors become addresses: native code can't see what is there, so it is checked here."""

from __future__ import annotations

import torch
from torch import Tensor


def address(name: str, tensor: Tensor | None, dtype: torch.dtype, device: str, shape: tuple[int, ...] | None) -> int:
    """Where the numbers of a contiguous tensor are, 0 for None.

    Raises:
        RuntimeError: it is not of this dtype, kind of device and shape (None: any), or not laid out row by row as it
            reads. That is a mistake of this package: what callers give is checked before, by name.
    """
    if tensor is None:
        return 0
    wrong = (
        tensor.dtype != dtype
        or tensor.device.type != device
        or tensor.layout != torch.strided
        or (shape is not None and tensor.shape != shape)
        or not tensor.is_contiguous()
        or tensor.is_neg()
    )
    if wrong:
        found = f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, {tensor.layout}"
        if tensor.layout == torch.strided:
            found += f", strides {tensor.stride()}" + ", negated" * tensor.is_neg()
        wanted = f"contiguous {dtype} " + ("" if shape is None else f"of shape {shape} ") + f"on {device}"
        raise RuntimeError(f"internal error of ifnd_fast: {name} must be {wanted}, got {found}: please report it")
    return tensor.data_ptr()


def plain(tensor: Tensor) -> Tensor:
    """The tensor with its numbers row by row as they read: a copy where it is a transpose, a slice or a negative."""
    return tensor if tensor.is_contiguous() and not tensor.is_neg() else tensor.resolve_neg().contiguous()
