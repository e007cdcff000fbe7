"""Features of labelled images, in two parts: one to learn from, one to be tested with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ifnd_fast.data.images import Images
from ifnd_fast.runtime.console import warn
from ifnd_fast.runtime.errors import CommandError


class LabelledFeatures(NamedTuple):
    """Of readable images alone, in the order that `knn_accuracy` and `few_shot_accuracies` take them."""

    train_features: Tensor
    """(N, D)"""
    train_labels: Tensor
    """(N,) int64"""
    test_features: Tensor
    """(M, D)"""
    test_labels: Tensor
    """(M,) int64"""


class LabelledImages:
    """Training images and test images with labels; without test images every tenth training image is one. Unreadable
    images are left out, of both parts.
    """

    def __init__(self, images: Images, test_images: Images | None):
        assert images.labels is not None
        self.images, self.test_images, self.labels = images, test_images, images.labels
        self.told: set[str] = set()  # warnings, each once
        if test_images is not None:
            assert test_images.labels is not None
            self.test_labels = test_images.labels

    def features(self, features_of: Callable[[Images], tuple[Tensor, Tensor]]) -> LabelledFeatures:
        """With `features_of(images)` -> features (N, D) of N images, and which of them were readable, (N,) bool.

        Raises:
            CommandError: no image to learn from, or none to test with, can be read.
        """
        features, readable = features_of(self.images)
        labels = torch.from_numpy(self.labels).to(features.device)
        if self.test_images is not None:
            tests, tests_readable = features_of(self.test_images)
            test_labels = torch.from_numpy(self.test_labels).to(features.device)
            kept, tested = readable, tests_readable
        else:
            held_out = torch.arange(len(labels), device=features.device) % 10 == 9
            tests, test_labels = features, labels
            kept, tested = readable & ~held_out, readable & held_out
        for what, there in (("to learn from", kept), ("to test with", tested)):
            if not there.any():
                raise CommandError(f"accuracy: none of the images {what} can be read")
        left_out = int((~readable).sum()) + (0 if self.test_images is None else int((~tests_readable).sum()))
        if left_out:
            self._warn(f"accuracy: {left_out} unreadable images are left out")
        lacking = len(labels.unique()) - len(labels[kept].unique())
        if lacking:
            without = f"{lacking} classes have no readable image to learn from"
            self._warn(f"accuracy: {without}: none of their images can be recognised")
        return LabelledFeatures(features[kept], labels[kept], tests[tested], test_labels[tested])

    def _warn(self, message: str) -> None:
        if message not in self.told:
            self.told.add(message)
            warn(message)
