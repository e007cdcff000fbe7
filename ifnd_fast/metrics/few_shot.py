"""Accuracy with few labels: what pre-training is for, and what a test with all labels can hide."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ifnd_fast.data.sources import rank_in_class
from ifnd_fast.metrics.rows import check_count, check_pair, check_tests, unit_rows
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.console import say, track, warn

SHOTS = (1, 5, 10, 50)
DRAWS = 5
C = 10.0
"""Inverse of the penalty: on the demo, of raw pixels and of a trained encoder, at each of SHOTS, within a standard
deviation of the best of 1, 10, 100 and 1,000; too few labels to choose it by."""


def few_shot_accuracies(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    shots: Sequence[int] = SHOTS,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[int, list[float]]:
    """Top-1 accuracies of logistic regressions on few labelled rows of each class, which are drawn several times.

    Rows are L2-normalised; the regression is scikit-learn's, multinomial, with an L2 penalty (C = 10) and an
    unpenalised intercept. The rows drawn depend on ``train_labels``, ``draws`` and ``seed`` alone, so that different
    features of the same images are compared on the same draws, and a draw of fewer rows is part of one of more. A
    class with fewer than n rows gives all that it has. Under torch.distributed each rank fits a share of the draws,
    and all get all accuracies.

    Args:
        train_features: (N, D) floating point, to draw from.
        train_labels: (N,) integers, 0 or more, of two classes at least.
        test_features: (M, D) floating point on the same device, M >= 1.
        test_labels: (M,) integers. A class that training lacks simply counts as an error.
        shots: Numbers n of labelled rows of each class.
        draws: Of the labelled rows, for each n.
        seed: Of the draws.

    Returns:
        For each n the accuracy of each draw, percent.

    Raises:
        TypeError: For an argument that is not a tensor, or a count that is not an int.
        ValueError: For shapes, devices or values that do not fit, features that are not finite, training rows of one
            class, and an n that no class has.

    Examples:
        >>> import torch
        >>> rows, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
        >>> few_shot_accuracies(rows, labels, rows, labels, shots=(1, 2), draws=2)
        {1: [100.0, 100.0], 2: [100.0, 100.0]}
    """
    check_pair(train_features, train_labels, test_features)
    check_tests(test_features, test_labels)
    check_count("draws", draws)
    y, test_y = (labels.cpu().numpy() for labels in (train_labels, test_labels))
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"train_labels are all {classes[0]}: a classifier needs two classes or more")
    for n in shots:
        check_count("shots", n)
        if n > counts.max():
            raise ValueError(f"shots: no class has {n} training rows, the largest has {counts.max()}: ask for fewer")

    test_x = unit_rows(test_features.double()).cpu().numpy()
    own, found = [(draw, n) for draw in distributed.share(draws) for n in shots], {}
    for draw, n in track(own, "few labels", len(own)):
        rows = np.flatnonzero(rank_in_class(y, [seed, draw]) < n)
        x = unit_rows(train_features[torch.from_numpy(rows)].double()).cpu().numpy()
        found[draw, n] = _accuracy(x, y[rows], test_x, test_y)
    found = {key: value for part in distributed.all_gather_objects(found) for key, value in part.items()}
    return {n: [found[draw, n] for draw in range(draws)] for n in shots}


def _accuracy(x: np.ndarray, y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> float:
    """Percent."""
    if len(x) < x.shape[1]:  # the weights lie in the span of the rows, which is smaller
        basis, _ = np.linalg.qr(x.T)
        x, test_x = x @ basis, test_x @ basis
    return 100.0 * LogisticRegression(C=C, max_iter=1000).fit(x, y).score(test_x, test_y)


def usable_shots(labels: Tensor, shots: Sequence[int] = SHOTS) -> tuple[int, ...]:
    """Those of `shots` that some class of labels (N,) has rows for; none where there is one class only. A warning says
    which are left out, and where a class has to give all that it has."""
    counts = labels.unique(return_counts=True)[1]
    if len(counts) < 2:
        warn("few labels: all readable training images are of one class; a classifier needs two or more")
        return ()
    largest, smallest = int(counts.max()), int(counts.min())
    usable = tuple(n for n in shots if n <= largest)
    if left_out := [n for n in shots if n > largest]:
        numbers = ", ".join(map(str, left_out))
        say(f"few labels: {numbers} a class left out: no class has more than {largest} training images")
    if fewer := [n for n in usable if n > smallest]:
        short = int((counts < max(fewer)).sum())
        warn(f"few labels: {short} of {len(counts)} classes have fewer than {max(fewer)} training images and give all")
    return usable


def summary(accuracies: dict[int, list[float]]) -> dict[str, dict[str, Any]]:
    """As files hold them: {"10": {"mean", "sd", "values"}}; the sample standard deviation, 0 of one draw."""
    return {
        str(n): {
            "mean": statistics.mean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
            "values": values,
        }
        for n, values in accuracies.items()
    }
