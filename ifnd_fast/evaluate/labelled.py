"""Labelled images to evaluate with: a training part and a test part that number their classes alike."""

from __future__ import annotations

import numpy as np

from ifnd_fast.config import DataConfig
from ifnd_fast.data import Images, Subset, open_images
from ifnd_fast.errors import UsageError


def open_labelled(data: DataConfig) -> tuple[Images, Images]:
    """Training and test images with labels; without a test part, every tenth image is one.

    Raises:
        UsageError: no such data, or no labels, or one class, or a class of the test part that training lacks.
        CommandError: a download failed.
    """
    name = f"--data {data.data}"
    train = open_images(data.data, "train", data.data_root)
    test = open_images(data.data, "test", data.data_root)
    assert train is not None
    if train.labels is None or (test is not None and test.labels is None):
        raise UsageError(f"{name}: an evaluation needs labels, that is images in one folder per class")
    if test is None:
        held_out = np.arange(len(train)) % 10 == 9
        train, test = Subset(train, np.flatnonzero(~held_out)), Subset(train, np.flatnonzero(held_out))
    assert train.labels is not None and test.labels is not None
    if len(test) == 0:
        raise UsageError(f"{name}: no test images: {len(train)} images are too few to hold out every tenth")
    if train.class_names is not None and test.class_names is not None:
        lacking = sorted(set(test.class_names) - set(train.class_names))
        if lacking:
            few = ", ".join(lacking[:4]) + (", ..." if len(lacking) > 4 else "")
            raise UsageError(f"{name}: training lacks {len(lacking)} classes of the test part: {few}")
        number = {class_name: n for n, class_name in enumerate(train.class_names)}
        test.labels = np.array([number[class_name] for class_name in test.class_names])[test.labels]
        test.class_names = train.class_names
    if len(np.unique(train.labels)) < 2:
        raise UsageError(f"{name}: all training images are of one class; a classifier needs two or more")
    return train, test
