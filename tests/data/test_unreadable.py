"""Unreadable images: said once, with the reason, kept in checkpoints."""

from __future__ import annotations

import pytest
import torch

from ifnd_fast.data.sources import open_images
from ifnd_fast.data.unreadable import Unreadable
from ifnd_fast.runtime.errors import CommandError


def test_unreadable_images_are_named_once_with_the_reason(flat_folder, capfd):
    images = open_images(str(flat_folder))
    unreadable = Unreadable(images, strict=False)
    unreadable.note(torch.tensor([3, 5, 5]), torch.tensor([3, 4, 5]), ["", "it is broken", ""])
    unreadable.note(torch.tensor([5]), torch.tensor([4]), ["it is broken"])
    unreadable.add(9, "empty")
    assert capfd.readouterr().err.splitlines() == [
        f"warning: unreadable image skipped: {images.name(4)}: it is broken (1 so far)",
        f"warning: unreadable image skipped: {images.name(9)}: empty (2 so far)",
    ]
    assert unreadable.listed() == [{"image": images.name(4), "reason": "it is broken"},
                                   {"image": images.name(9), "reason": "empty"}]  # fmt: skip
    again = Unreadable(images, strict=True)
    again.load_state(unreadable.state())
    assert again.listed() == unreadable.listed()
    again.load_state([4])  # as checkpoints once had them
    again.add(4, "it is broken")
    with pytest.raises(CommandError, match=r"unreadable image \(--strict\): .*008.png: torn"):
        again.add(8, "torn")
