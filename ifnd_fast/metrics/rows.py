"""Labelled rows of features, as the figures on this floor take them: their checks, and rows of unit length."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor
from torch.nn import functional as F


def unit_rows(features: Tensor) -> Tensor:
    """Rows (N, D) scaled to length 1; a row of zeros stays zero."""
    # The largest entry goes first, so that squares neither overflow nor vanish.
    largest = features.abs().amax(dim=1, keepdim=True)
    return F.normalize(features / torch.where(largest > 0, largest, 1.0), dim=1)


def check_features(name: str, features: Tensor) -> None:
    """Raises TypeError, ValueError: not a finite floating point matrix (rows, D), D >= 1."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(features).__name__}")
    if not features.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {features.dtype}")
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must have shape (rows, D) with D >= 1, got {tuple(features.shape)}")
    if not features.isfinite().all():
        rows = int((~features.isfinite()).any(dim=1).sum())
        raise ValueError(f"{name} holds NaN or infinity in {rows} rows")


def check_pair(train_features: Tensor, train_labels: Tensor, test_features: Tensor) -> None:
    """Raises TypeError, ValueError: training rows, a label for each, and test rows, do not go together."""
    check_features("train_features", train_features)
    check_features("test_features", test_features)
    if len(train_features) == 0:
        raise ValueError("train_features has no rows: give at least one labelled training row")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"test_features has {test_features.shape[1]} columns, but train_features has "
            f"{train_features.shape[1]}: both must come from the same encoder"
        )
    if train_features.device != test_features.device:
        devices = f"test_features is on {test_features.device}, train_features on {train_features.device}"
        raise ValueError(f"{devices}: move them to one device")
    check_labels("train_labels", train_labels, len(train_features))


def check_tests(test_features: Tensor, test_labels: Tensor) -> None:
    """Raises TypeError, ValueError: no test rows, or not a label for each."""
    check_features("test_features", test_features)
    if len(test_features) == 0:
        raise ValueError("test_features has no rows: an accuracy needs at least one")
    check_labels("test_labels", test_labels, len(test_features))


def check_labels(name: str, labels: Tensor, rows: int) -> None:
    """Raises TypeError, ValueError: not one class number, 0 or more, for each row."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {labels.dtype}")
    if labels.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), a label for each row, got {tuple(labels.shape)}")
    if int(labels.min()) < 0:
        raise ValueError(f"{name} must be 0 or more, got {int(labels.min())}: leave unlabelled rows out")


def check_count(name: str, value: int) -> None:
    """Raises TypeError, ValueError: not a whole number, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
