"""The images that could not be read."""

from __future__ import annotations

import torch
from torch import Tensor

from ifnd_fast.data.images import Images
from ifnd_fast.runtime.console import warn
from ifnd_fast.runtime.errors import CommandError


class Unreadable:
    """The images that turned out unreadable: each is named once; with --strict the first ends the run."""

    def __init__(self, images: Images, strict: bool):
        self.images, self.strict, self.indices = images, strict, set[int]()

    def add(self, index: int) -> None:
        """Raises CommandError: --strict."""
        if index in self.indices:
            return
        if self.strict:
            raise CommandError(f"unreadable image (--strict): {self.images.name(index)}")
        self.indices.add(index)
        warn(f"unreadable image skipped: {self.images.name(index)} ({len(self.indices)} so far)")

    def note(self, indices: Tensor, wanted: Tensor) -> None:
        """Add the images of a batch that others stand in for.

        Raises:
            CommandError: --strict, or an image that none could stand in for.
        """
        if torch.equal(indices, wanted):
            return
        if bool((indices < 0).any()):
            first = self.images.name(int(wanted[indices < 0][0]))
            raise CommandError(f"100 images in a row can't be read, from {first} on")
        for index in wanted[indices != wanted].tolist():
            self.add(index)
