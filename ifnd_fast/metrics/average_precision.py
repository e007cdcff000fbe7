"""Average precision by the rules of the PASCAL VOC challenge."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import precision_recall_curve

RULES = ("11-point", "area")


def average_precision(scores: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """Average precision (0 to 1) of scores (N,) that should rank the positive (N,) bool first, by each of RULES.

    With p(r) the highest precision at a recall of at least r, from the ranking's points (equal scores are one point):
    "11-point" (VOC 2007) is the mean of p at 0, 0.1, ..., 1; "area" (VOC since 2010) the area under p
    (Everingham et al., IJCV 2015, section 2.2).

    Raises:
        ValueError: nothing is positive, or a score is not finite.
    """
    if not positive.any():
        raise ValueError("average precision needs at least one positive")
    precision, recall, _ = precision_recall_curve(positive, scores)
    precision, recall = precision[:-1][::-1], recall[:-1][::-1]  # by rising recall, without the made-up point (0, 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, np.linspace(0, 1, 11) - 1e-9)  # 3 of 10 is 0.3, which linspace has as 0.3 + 4e-17
    return {
        "11-point": float(envelope[at].mean()),
        "area": float((np.diff(recall, prepend=0.0) * envelope).sum()),
    }
