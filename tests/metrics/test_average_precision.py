"""Average precision against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ifnd_fast.metrics.average_precision import average_precision


@pytest.mark.parametrize(
    "ranked, eleven, area",
    [
        ([1, 1, 0, 0], 1, 1),
        # precision 1 up to recall 1/2, then 2/3: recalls 0 to .5 are six of the eleven points
        ([1, 0, 1, 0], (6 * 1 + 5 * 2 / 3) / 11, 1 / 2 + 1 / 2 * 2 / 3),
        # precision 1/2 and 2/3 as they come; the later, higher one counts for all recalls
        ([0, 1, 1, 0], 2 / 3, 2 / 3),
        ([0, 0, 0, 1], 1 / 4, 1 / 4),
        # recall 3/10 is the point .3: the first four points have precision 1
        ([1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], (4 + 7 * 10 / 13) / 11, 0.3 + 0.7 * 10 / 13),
    ],
)
def test_by_hand(ranked, eleven, area):
    scores = -np.arange(len(ranked), dtype=float)
    found = average_precision(scores, np.array(ranked, dtype=bool))
    assert found == {"11-point": pytest.approx(eleven), "area": pytest.approx(area)}


def test_equal_scores_are_one_point_whatever_their_order():
    for ranked in ([1, 0, 0, 0], [0, 0, 0, 1]):
        assert average_precision(np.ones(4), np.array(ranked, dtype=bool))["area"] == 0.25


def test_nothing_positive():
    with pytest.raises(ValueError, match="at least one positive"):
        average_precision(np.ones(3), np.zeros(3, dtype=bool))
