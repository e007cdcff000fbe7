"""The images that could not be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ifnd_fast.data.images import Named
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.console import warn
from ifnd_fast.runtime.errors import CommandError


class Unreadable:
    """The images that turned out unreadable: each is named once, with the reason; with --strict the first ends the run.

    Attributes:
        reasons: by index.
    """

    def __init__(self, images: Named, strict: bool):
        self.images, self.strict, self.reasons = images, strict, dict[int, str]()

    def add(self, index: int, reason: str) -> None:
        """Raises CommandError: --strict."""
        if index in self.reasons:
            return
        if self.strict:
            raise CommandError(f"unreadable image (--strict): {self.images.name(index)}: {reason}")
        self.reasons[index] = reason
        warn(f"unreadable image skipped: {self.images.name(index)}: {reason} ({len(self.reasons)} so far)")

    def note(self, indices: Tensor, wanted: Tensor, reasons: Sequence[str]) -> None:
        """Add the images of a batch that others stand in for. Raises CommandError: --strict."""
        if torch.equal(indices, wanted):
            return
        for index, other, reason in zip(indices.tolist(), wanted.tolist(), reasons, strict=True):
            if index != other:
                self.add(other, reason)

    def listed(self) -> list[dict[str, str]]:
        """What a result says of them: {"image", "reason"} each, in order."""
        return [{"image": self.images.name(index), "reason": self.reasons[index]} for index in sorted(self.reasons)]

    def share(self) -> None:
        """Every rank learns of those of all, which all have to call it; what only others met is named now.

        Raises:
            CommandError: --strict.
        """
        for part in distributed.all_gather_objects(self.reasons):
            for index, reason in part.items():
                self.add(index, reason)

    def readable(self, device: torch.device) -> Tensor:
        """Which of the N images are readable, as far as any rank has met them, (N,) bool; all ranks have to call it."""
        self.share()
        readable = torch.ones(len(self.images), dtype=torch.bool, device=device)
        readable[torch.tensor(sorted(self.reasons), dtype=torch.int64, device=device)] = False
        return readable

    def state(self) -> dict[int, str]:
        """For a checkpoint: see `share`."""
        self.share()
        return dict(sorted(self.reasons.items()))

    def load_state(self, state: Mapping[int, str] | Sequence[int]) -> None:
        """From a checkpoint; of an older one the indices alone."""
        self.reasons = dict(state) if isinstance(state, Mapping) else dict.fromkeys(state, "")
