"""The cuda backend: tensors in, tensors out, around the kernels of ifnd_fast._cuda, on the current stream."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ifnd_fast.ops.backends import _cuda

# float32 rows are split into terms of 16 bits this many at a time: the terms take as much memory as the rows.
ROWS_AT_A_TIME = 1 << 18
PIECE = 8  # numbers in the 16 bytes that the kernels read at a time
LOG2E = math.log2(math.e)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _rows_of_pieces(x: Tensor) -> Tensor:
    """x, its rows contiguous, aligned to 16 bytes and of a multiple of 8 numbers: a copy where they are not."""
    x = F.pad(x, (0, -x.shape[1] % PIECE)).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _shift_of(x: Tensor) -> Tensor:
    """The power of 2, as float64 (), that brings the largest number of x between 2^14 and 2^15, within float16."""
    largest = x.abs().amax().clamp(min=2.0**-100)
    return 15.0 - torch.frexp(largest).exponent.double()


def _two_terms(x: Tensor, shift: Tensor) -> Tensor:
    """[high | low] (rows, 2 D) float16 with high + low = 2^shift x, to about 22 bits."""
    scaled = x * torch.exp2(shift).float()
    high = scaled.half()
    return torch.cat([high, (scaled - high).half()], 1)


def assign_clusters(
    features: Tensor, centroids: Tensor, temperature: float, metric: str, return_confidence: bool
) -> tuple[Tensor, Tensor]:
    """Labels (N,) int32 and confidences (N,) float32, or an empty tensor in their place."""
    features, centroids = _rows_of_pieces(features), _rows_of_pieces(centroids)
    labels = features.new_empty(len(features), dtype=torch.int32)
    confidence = features.new_empty(len(features) if return_confidence else 0, dtype=torch.float32)
    shared = {
        "half_norms": centroids.float().square().sum(1) / 2 if metric == "l2" else None,
        "scale": LOG2E / temperature,
        "bfloat16": features.dtype == torch.bfloat16,
        "mode": "confidence" if return_confidence else "labels",
    }
    if features.dtype != torch.float32:
        _assign(features, centroids, labels=labels, confidence=confidence, **shared)
        return labels, confidence
    shift = _shift_of(centroids)
    terms = _two_terms(centroids, shift)
    for first in range(0, len(features), ROWS_AT_A_TIME):
        rows = slice(first, first + ROWS_AT_A_TIME)
        out = {"labels": labels[rows], "confidence": confidence[rows]}
        _assign_float32(features[rows], centroids, terms, shift, return_confidence, **out, **shared)
    return labels, confidence


def _assign_float32(
    features: Tensor, centroids: Tensor, centroid_terms: Tensor, centroid_shift: Tensor, return_confidence: bool, **how
) -> None:
    """With confidence, three products of terms; without, one, and three for the rows whose two best are too close."""
    shift = _shift_of(features)
    terms = _two_terms(features, shift)
    unit = torch.exp2(-(shift + centroid_shift)).float()
    how |= {"unit": unit, "stored_terms": 2}
    if return_confidence:
        _assign(terms, centroid_terms, terms=3, **how)
        return
    near_rows = torch.empty_like(how["labels"])
    near_count = torch.zeros_like(near_rows[:1])
    margins = _margins(features, terms, shift, centroids, centroid_terms, centroid_shift)
    near = {"margins": margins, "near_rows": near_rows, "near_count": near_count}
    _assign(terms, centroid_terms, **near, **how | {"mode": "screen"})
    _assign(terms, centroid_terms, terms=3, rows=near_rows, row_count=near_count, **how)


def _margins(
    x: Tensor, x_terms: Tensor, x_shift: Tensor, c: Tensor, c_terms: Tensor, c_shift: Tensor
) -> Tensor:
    """(N,): centroids whose similarities by the first terms differ by more than this are in the right order.

    x.c - high(x).high(c) = low(x).c + high(x).low(c), each at most the product of two lengths (low: what `high` leaves);
    sums on tensor cores are rounded, at every fourth product or more rarely, by at most 2^-23 of |x| |c|.
    """

    def lengths(rows: Tensor, terms: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        high = terms[:, : rows.shape[1]].float() * torch.exp2(-shift).float()
        return rows.norm(dim=1), high.norm(dim=1), (rows - high).norm(dim=1)

    x_length, x_high, x_low = lengths(x, x_terms, x_shift)
    c_length, _, c_low = (length.amax() for length in lengths(c, c_terms, c_shift))
    rounding = (x.shape[1] / 4 + 2) * 2.0**-23 * c_length * torch.maximum(x_length, c_length)
    return 2.01 * (x_low * c_length + x_high * c_low + rounding)


def _assign(
    features: Tensor, centroids: Tensor, *, labels: Tensor, stored_terms: int = 1, mode: str, scale: float,
    bfloat16: bool, terms: int = 1, **tensors: Tensor | None,
) -> None:  # fmt: skip
    _cuda.assign_clusters(
        features=features.data_ptr(), centroids=centroids.data_ptr(), labels=labels.data_ptr(),
        **{name: _address(tensor) for name, tensor in tensors.items()},
        N=len(features), C=len(centroids), D=features.shape[1] // stored_terms, terms=terms, stored_terms=stored_terms,
        scale=scale, bfloat16=bfloat16, mode=mode, stream=_stream(features.device),
    )  # fmt: skip
