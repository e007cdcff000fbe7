"""Argument checks that both operators share; each names the argument, what it got and what it wanted."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ifnd_fast.ops.pair_labels import PairLabels

# The kernels on the CPU know each by its place here (csrc/cpu/problem.h).
STRATEGIES = ("eliminate", "attract", "keep", "margin")  # which the kernels are told as "keep" below a ceiling
COMBINATIONS = ("mean", "any", "all")
METRICS = ("inner_product", "l2")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_DIM = 16384  # raw pictures of 64 x 64 in color have 12,288
# Beyond, a softmax of unit rows in float32 is one-hot, or uniform, to the last bit: no temperature that is meant.
SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-6, 1e6


def tensor(name: str, value: Any, axes: tuple[str, ...], like: Tensor | None = None, like_name: str = "") -> None:
    """`value` is a dense float tensor of these dimensions, of the same dtype and device as `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {value.layout}: pass {name}.to_dense()")
    if value.dim() != len(axes):
        count = {2: "two", 3: "three"}[len(axes)]
        raise ValueError(f"{name} must have {count} dimensions ({', '.join(axes)}), got shape {tuple(value.shape)}")
    if like is not None and value.dtype != like.dtype:
        raise TypeError(f"{name} must have {like_name}'s dtype {like.dtype}, got {value.dtype}")
    if like is not None:
        same_device(name, value, like, like_name)


def matrix(name: str, value: Tensor, like: Tensor | None = None, like_name: str = "") -> None:
    """`value` is a (rows, D) float tensor, 1 <= D <= MAX_DIM, of the same D, dtype and device as `like`."""
    tensor(name, value, ("rows", "D"), like, like_name)
    if not 1 <= value.shape[1] <= MAX_DIM:
        raise ValueError(f"{name} must have 1 to {MAX_DIM} columns, got shape {tuple(value.shape)}")
    if like is not None and value.shape[1] != like.shape[1]:
        raise ValueError(f"{name} must have {like_name}'s {like.shape[1]} columns, got {value.shape[1]}")


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
    got = value.shape
    if got != shape and (len(got) != len(shape) or any(w not in (None, g) for w, g in zip(shape, got, strict=True))):
        wanted = ", ".join("L" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(value.shape)}")
    same_device(name, value, like, like_name)


def label_range(labels: PairLabels) -> None:
    """Of query and negatives, -1 or more. On the CPU only: on a GPU it would stall the stream, and there any negative
    label counts as -1."""
    if torch.compiler.is_compiling() or transformed():
        return
    for name, given in (("query_labels", labels.query_labels), ("negative_labels", labels.negative_labels)):
        if given is not None and given.device.type == "cpu" and given.numel() and int(given.min()) < -1:
            raise ValueError(f"{name} must be -1 (no label) or a cluster number, got {int(given.min())}")


def transformed() -> bool:
    """Whether torch.func differentiates or batches this call: its tensors have no values of their own to look at."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def temperature(value: float) -> float:
    """As a float, from 1e-6 to 1e6. Whatever takes a temperature of these operators checks it here."""
    if isinstance(value, Tensor):
        raise TypeError(
            f"temperature must be a number, got a {tuple(value.shape)} tensor, which would get no gradient: "
            "pass its float()"
        )
    value = number("temperature", value)
    if not SMALLEST_TEMPERATURE <= value <= LARGEST_TEMPERATURE:
        raise ValueError(f"temperature must be a number from 1e-6 to 1e6, got {value}")
    return value


def learned_temperature(value: Tensor, like: Tensor | None = None) -> None:
    """A float tensor of one number in range, on the CPU or on `like`'s device: there the kernels' callers read it."""
    if not value.is_floating_point() or value.numel() != 1:
        raise TypeError(
            f"temperature must be a number, or a float tensor of one, got {value.dtype} of shape {tuple(value.shape)}"
        )
    if value.device.type != "cpu" and like is not None:
        same_device("temperature", value, like, "query")
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed():
        temperature(value.detach().item())


def number(name: str, value: Any) -> float:
    """Python's and NumPy's real numbers as a float; not True and False, which are meant for another argument."""
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return -math.inf if str(value).startswith("-") else math.inf


def finite(name: str, value: Any) -> float:
    value = number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return value


def fraction(name: str, value: Any) -> float:
    """A number from 0 to 1."""
    value = number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in 0..1, got {value}")
    return value


def integer(name: str, value: Any, least: int) -> int:
    """Python's and NumPy's integers of at least `least` as an int; not True and False."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """Python's and NumPy's True and False as a bool; no other thing that is true or false to `if`."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
