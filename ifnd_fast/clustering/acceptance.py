"""How many pseudo labels are trusted, over the training."""

from __future__ import annotations

import math

from ifnd_fast.ops import checks


def acceptance_rate(progress: float, acceptance_end: float = 1.0, acceptance_max: float = 1.0) -> float:
    """The share of labels to accept: linear from 0 to `acceptance_max` over the first `acceptance_end` of the training.

    acceptance_max min(1, progress / acceptance_end), with progress the fraction of the training that is done, 0..1.

    Raises:
        TypeError, ValueError: progress is no number in 0..1, or one of the others none above 0 and at most 1.
    """
    progress = checks.fraction("progress", progress)
    for name, value in (("acceptance_end", acceptance_end), ("acceptance_max", acceptance_max)):
        if not 0 < checks.number(name, value) <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
    return acceptance_max * min(1.0, progress / acceptance_end)


def accepted_count(rate: float, n: int) -> int:
    """ceil(rate n) for a rate in 0..1, as if rate were the number that its float stands for.

    0.07 * 100 is 7.000000000000001 in floats and must give 7, so 1e-12 of n is forgiven.
    """
    return max(0, math.ceil(rate * n - 1e-12 * n))
