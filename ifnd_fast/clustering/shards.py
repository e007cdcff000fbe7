"""The rows of one matrix, dealt out to the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from ifnd_fast.runtime.distributed import all_gather, broadcast, every, gather_rows, rank, sum_over_ranks, world_size


class Shards:
    """The rows of one matrix, dealt out to the ranks in contiguous shares; or, not `together`, all on this rank.

    Attributes:
        sizes: rows of each rank. first: the number, among all rows, of this rank's first. total: all rows.
    """

    def __init__(self, rows: int, device: torch.device, together: bool = True):
        self.together = together and world_size() > 1
        self.sizes = [rows]
        if self.together:
            self.sizes = all_gather(torch.tensor([rows], dtype=torch.int64, device=device)).tolist()
        self.first = sum(self.sizes[: rank()]) if self.together else 0
        self.total = sum(self.sizes)

    @staticmethod
    def alone(rows: Tensor) -> Shards:
        """All rows are these."""
        return Shards(len(rows), rows.device, together=False)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, in place."""
        return sum_over_ranks(tensor) if self.together else tensor

    def every(self, holds: bool, device: torch.device) -> bool:
        """Whether it holds on every rank."""
        return every(holds, device) if self.together else holds

    def gather(self, rows: Tensor) -> Tensor:
        """Every rank's rows (n, ...), as many as it has, in rank order."""
        return gather_rows(rows) if self.together else rows

    def from_first(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, in place."""
        return broadcast(tensor) if self.together else tensor
