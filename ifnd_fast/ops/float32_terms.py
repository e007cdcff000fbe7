"""float32 matrices as the cuda kernels take them: each number as two terms of float16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE = 8  # numbers in the 16 bytes that the kernels read at a time


def rows_of_pieces(x: Tensor) -> Tensor:
    """x, its rows contiguous, aligned to 16 bytes and of a multiple of 8 numbers: a copy where they are not."""
    x = F.pad(x, (0, -x.shape[1] % PIECE)).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def shift_of(x: Tensor) -> Tensor:
    """The power of 2, as float64 (), that brings x's largest finite number between 2^14 and 2^15, within float16."""
    sizes = torch.where(x.isfinite(), x.abs(), 0.0)
    largest = sizes.amax().clamp(min=2.0**-100) if x.numel() else x.new_ones(())
    return 15.0 - torch.frexp(largest).exponent.double()


def two_terms(x: Tensor, shift: Tensor) -> Tensor:
    """[high | low] (rows, 2 D) float16 with high + low = 2^shift x, to about 22 bits."""
    scaled = x * torch.exp2(shift).float()
    high = scaled.half()
    return torch.cat([high, (scaled - high).half()], 1)


@dataclass(frozen=True)
class Operand:
    """A matrix as the kernels take it: rows of `terms` * `dim` 16-bit numbers, 1 / unit times as large."""

    numbers: Tensor
    dim: int
    shift: Tensor | None  # of float32 rows, which are two terms

    @staticmethod
    def of(x: Tensor) -> Operand:
        x = rows_of_pieces(x)
        if x.dtype != torch.float32:
            return Operand(x, x.shape[1], None)
        shift = shift_of(x)
        return Operand(two_terms(x, shift), x.shape[1], shift)


def unit_of(*operands: Operand) -> Tensor | None:
    """What a product of these is to be multiplied by."""
    shifts = [operand.shift for operand in operands if operand.shift is not None]
    return torch.exp2(-sum(shifts, torch.zeros_like(shifts[0]))).float() if shifts else None


def margins_of(
    x: Tensor, x_terms: Tensor, x_shift: Tensor, c: Tensor, c_terms: Tensor, c_shift: Tensor
) -> Tensor:
    """(N,): centroids whose similarities by the first terms differ by more than this are in the right order.

    x.c - high(x).high(c) = low(x).c + high(x).low(c), each at most the product of two lengths (low: what `high`
    leaves); sums on tensor cores are rounded, at every fourth product or more rarely, by at most 2^-23 of |x| |c|.
    """

    def lengths(rows: Tensor, terms: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        high = terms[:, : rows.shape[1]].float() * torch.exp2(-shift).float()
        return rows.norm(dim=1), high.norm(dim=1), (rows - high).norm(dim=1)

    x_length, x_high, x_low = lengths(x, x_terms, x_shift)
    c_length, _, c_low = (length.amax() for length in lengths(c, c_terms, c_shift))
    rounding = (x.shape[1] / 4 + 2) * 2.0**-23 * c_length * torch.maximum(x_length, c_length)
    return 2.01 * (x_low * c_length + x_high * c_low + rounding)
