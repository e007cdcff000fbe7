"""What tells which pairs of a query and a negative are false negatives, or views of one image."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ifnd_fast.ops.address import plain


class PairLabels(NamedTuple):
    """Labels and ids of B queries and K negatives as `info_nce` takes them: both of a pair, or neither."""

    query_labels: Tensor | None  # (B, L) int32; below 0: no label
    negative_labels: Tensor | None  # (K, L) int32
    query_ids: Tensor | None  # (B,) int64; below 0: unknown
    negative_ids: Tensor | None  # (K,) int64

    @property
    def levels(self) -> int:
        """L, 0 without labels."""
        return 0 if self.query_labels is None else self.query_labels.shape[1]

    @property
    def has_ids(self) -> bool:
        return self.query_ids is not None

    def n_losses(self, level_combination: str) -> int:
        """Of each query: one for each level, or one where they are combined."""
        return max(1, self.levels) if level_combination == "mean" else 1

    def plain(self) -> PairLabels:
        """The same, each with its numbers row by row as they read."""
        return PairLabels(*(None if t is None else plain(t) for t in self))
