"""What every kernel is made of: tiles of rows and their similarities."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_REST = tl.constexpr(1.9259629911266175e-8)  # what its rounding to float32 leaves
LN2 = tl.constexpr(0.6931471805599453)


# Rows are told by the number of the first one, so that only that offset needs 64 bits: the others are within a tile.


@triton.jit
def load_rows(matrix, first, valid, chunk, D: tl.constexpr, CHUNK: tl.constexpr):
    """Columns [chunk * CHUNK, ...) of rows [first, ...) of a (., D) matrix, (rows, CHUNK); zero where not valid."""
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    at = tl.arange(0, valid.shape[0])[:, None] * D + columns[None, :]
    inside = valid[:, None]
    if D % CHUNK != 0:
        inside &= (columns < D)[None, :]
    return tl.load(matrix + tl.cast(first, tl.int64) * D + at, mask=inside, other=0.0)


@triton.jit
def load_parts(matrix, first, valid, chunk, D: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    """The same, its columns in PARTS: a tuple."""
    parts = ()
    for part in tl.static_range(PARTS):
        rows = load_rows(matrix, first, valid, chunk * PARTS + part, D, CHUNK // PARTS)
        parts = parts + (rows,)  # type: ignore[assignment]
    return parts


@triton.jit
def load_column(matrix, first, valid, column, WIDTH: tl.constexpr, other):
    """One column of rows [first, ...) of a (., WIDTH) matrix, (rows,)."""
    at = tl.arange(0, valid.shape[0]) * WIDTH + column
    return tl.load(matrix + tl.cast(first, tl.int64) * WIDTH + at, mask=valid, other=other)


@triton.jit
def similarities(
    a, a_first, a_valid, b, b_first, b_valid,
    D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T for these rows of a and b, (a rows, b rows) float32."""
    s = tl.zeros((a_valid.shape[0], b_valid.shape[0]), tl.float32)
    for chunk in range(CHUNKS):
        x = load_rows(a, a_first, a_valid, chunk, D, CHUNK)
        y = load_rows(b, b_first, b_valid, chunk, D, CHUNK)
        s = tl.dot(x, tl.trans(y), s, input_precision=PRECISION)
    return s
