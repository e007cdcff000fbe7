"""Matrices as the cuda kernels take them: 16-bit numbers, and of float32 two terms of float16 for each number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ifnd_fast.ops import launch

PIECE = 8  # numbers in the 16 bytes that the kernels read at a time


_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Operand(NamedTuple):
    """Rows of `dim` numbers, the matrix's own memory where that is aligned, or of two times `dim` terms."""

    numbers: Tensor
    dim: int  # divides by 8
    units: Tensor | None = None  # of terms: how many times these a row is; NaN where it isn't finite
    summary: Tensor | None = None  # the largest unit, and whether one is NaN
    lengths: Tensor | None = None  # (rows, 3): of a row, of its first terms, and of what these leave

    @staticmethod
    def of(x: Tensor, *, with_lengths: bool = False) -> Operand:
        if x.dtype == torch.float32:
            return two_terms(x.contiguous(), with_lengths)
        x = rows_of_pieces(x)
        return Operand(x, x.shape[1])

    @property
    def kind(self) -> str:
        """As the kernels call it."""
        return "two_terms" if self.units is not None else _NAMES[self.numbers.dtype]


def rows_of_pieces(x: Tensor) -> Tensor:
    """x, its rows contiguous, aligned to 16 bytes and of a multiple of 8 numbers: a copy only where they are not."""
    if x.shape[1] % PIECE:
        x = F.pad(x, (0, -x.shape[1] % PIECE))
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def two_terms(x: Tensor, with_lengths: bool = False) -> Operand:
    """Of contiguous float32 rows, in one pass over them."""
    (rows, columns), dim = x.shape, -(-x.shape[1] // PIECE) * PIECE
    terms, units = x.new_empty((rows, 2 * dim), dtype=torch.float16), x.new_empty(rows)
    summary, lengths = x.new_zeros(2), x.new_empty((rows, 3)) if with_lengths else None
    if rows:
        launch.kernel(
            "two_terms", x.device, rows=x, terms=terms, units=units, lengths=lengths, summary=summary, count=rows,
            columns=columns, D=dim,
        )  # fmt: skip
    return Operand(terms, dim, units, summary, lengths)


def margins_of(x: Operand, c: Operand) -> Tensor:
    """(N,): centroids whose similarities by the first terms differ by more than this are in the right order.

    x.c - high(x).high(c) = low(x).c + high(x).low(c), each at most the product of two lengths (low: what `high`
    leaves); sums on tensor cores are rounded, at every fourth product or more rarely, by at most 2^-23 of |x| |c|.
    """
    assert x.lengths is not None and c.lengths is not None
    x_length, x_high, x_low = x.lengths.unbind(1)
    c_length, _, c_low = c.lengths.amax(0)
    rounding = (x.dim / 4 + 2) * 2.0**-23 * c_length * torch.maximum(x_length, c_length)
    return 2.01 * (x_low * c_length + x_high * c_low + rounding)
