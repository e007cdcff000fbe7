"""Coordinates to cluster in, for data that lie far from the origin or are of extreme size."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ifnd_fast.clustering.shards import Shards
from ifnd_fast.ops.assign_clusters import FAR

# Root mean squares between which float32 has room for squares, and for squares of small differences.
SMALLEST_SPREAD, LARGEST_SPREAD = 1e-9, 1e9
CHUNK_ELEMENTS = 1 << 20  # of a float64 temporary: 8 MiB


class Frame(NamedTuple):
    """u = scale (x - centre), in float32: near the origin and of size 1, where digits count. All distances are `scale`
    times as long.

    The scale is a power of 2, and of rows in float32 or less the centre is a float32: rows then keep all their digits.
    """

    centre: Tensor  # (D,) float64
    scale: float

    def enter(self, name: str, x: Tensor) -> Tensor:
        """x (n, D) in this frame, as float32 on x's device.

        Raises:
            ValueError: a row is too far away for float32.
        """
        inside, first = torch.empty(x.shape, dtype=torch.float32, device=x.device), 0
        for part in _parts(x):
            inside[first : first + len(part)] = self._shift(part) * self.scale
            first += len(part)
        if not bool(inside.isfinite().all()):
            raise ValueError(
                f"{name} has rows that are {torch.finfo(torch.float32).max / self.scale:.3g} or more away from the "
                "data that was fitted, too far for float32 in the scale of that: leave them out"
            )
        return inside

    def leave(self, inside: Tensor) -> Tensor:
        """Rows (n, D) of this frame in the coordinates of x, as float64."""
        return inside.double() / self.scale + self.centre.to(inside.device)

    def _shift(self, x: Tensor) -> Tensor:
        return x.double() - self.centre.to(x.device)


def frame_of(x: Tensor, sums: Tensor, squares: Tensor, shards: Shards) -> Frame | None:
    """The frame of all ranks' rows; None where float32 can take them as they are.

    Args:
        x: (n, D) this rank's rows. sums: (D,) float64, of these rows. squares: () float64, of their lengths' squares.
    """
    totals = shards.sum(torch.cat([sums, squares[None]])) / shards.total
    centre, size = totals[:-1], float(totals[-1])
    about = float(centre.square().sum())
    if not about > FAR * (size - about):
        if size == 0 or SMALLEST_SPREAD <= math.sqrt(size) <= LARGEST_SPREAD:
            return None
        centre = torch.zeros_like(centre)
    if x.dtype != torch.float64:
        centre = centre.float().double()
    frame = Frame(centre, 1.0)
    added = squares.new_zeros(())
    for part in _parts(x):
        added += frame._shift(part).square().sum()
    spread = float(shards.sum(added)) / shards.total
    return Frame(centre, 2.0 ** -round(math.log2(spread) / 2) if spread > 0 else 1.0)


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, CHUNK_ELEMENTS // x.shape[1]))
