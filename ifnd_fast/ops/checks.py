"""Argument checks that both operators share; each names the argument, what it got and what it wanted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_DIM = 2048
SMALLEST_TEMPERATURE = 1e-30  # logits of unit rows, and their inverse, stay finite in float32


def matrix(name: str, value: Tensor, like: Tensor | None = None, like_name: str = "") -> None:
    """`value` is a (rows, D) float tensor, 1 <= D <= 2048, of the same D, dtype and device as `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {value.layout}: pass {name}.to_dense()")
    if value.dim() != 2:
        raise ValueError(f"{name} must have two dimensions (rows, D), got shape {tuple(value.shape)}")
    if not 1 <= value.shape[1] <= MAX_DIM:
        raise ValueError(f"{name} must have 1 to {MAX_DIM} columns, got shape {tuple(value.shape)}")
    if like is None:
        return
    if value.dtype != like.dtype:
        raise TypeError(f"{name} must have {like_name}'s dtype {like.dtype}, got {value.dtype}")
    if value.shape[1] != like.shape[1]:
        raise ValueError(f"{name} must have {like_name}'s {like.shape[1]} columns, got {value.shape[1]}")
    same_device(name, value, like, like_name)


def same_device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like_name}'s device {like.device}, got {value.device}")


def integers(
    name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], like: Tensor, like_name: str
) -> None:
    """`value` is an integer tensor of this dtype and shape (None: any size) on `like`'s device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}: pass {name}.to({dtype})")
    if value.dim() != len(shape) or any(w not in (None, g) for w, g in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("L" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(value.shape)}")
    same_device(name, value, like, like_name)


def temperature(value: float) -> float:
    if isinstance(value, Tensor):
        raise TypeError(
            f"temperature must be a number, got a {tuple(value.shape)} tensor, which would get no gradient: "
            "pass its float(), or for a learned temperature scale query by it"
        )
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"temperature must be a number, got {value!r}") from None
    if not SMALLEST_TEMPERATURE <= value < math.inf:
        raise ValueError(f"temperature must be a finite number of {SMALLEST_TEMPERATURE} or more, got {value}")
    return value


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
