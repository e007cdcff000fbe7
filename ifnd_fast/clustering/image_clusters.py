"""The clusters that images fall in, as a checkpoint holds them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ImageClusters(NamedTuple):
    """The last clustering in a checkpoint, of N images at L levels."""

    levels: tuple[int, ...]  # clusters at each
    labels: Tensor  # (N, L) int32, accepted or not; -1 for images that had no features
    confidence: Tensor  # (N, L) float32; 0 for those

    def explains(self, accepted: Tensor) -> bool:
        """Whether the accepted labels (N, L) are of this clustering: with --cluster-async those in use can be older."""
        return bool((accepted == self.labels)[accepted >= 0].all())
