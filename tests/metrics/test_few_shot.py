from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from ifnd_fast.data.sources import rank_in_class
from ifnd_fast.metrics.few_shot import C, few_shot_accuracies, summary, usable_shots


def blobs(counts, dim=6, seed=0):
    """Rows (N, D) around a centre for each class, as many as counted, in a random order, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = torch.randn(len(counts), dim, generator=torch.Generator().manual_seed(99))
    return centres[labels] + dim**0.5 / 3 * torch.randn(len(labels), dim, generator=generator), labels


TESTS = blobs((60, 60, 60), seed=1)


@pytest.mark.parametrize("dim", [6, 80])  # more and fewer rows than columns
def test_is_scikit_learns_regression_of_the_rows_drawn(dim):
    (x, y), (test_x, test_y) = (blobs(counts, dim, seed) for counts, seed in (((9, 8, 7), 0), ((60, 60, 60), 1)))
    found = few_shot_accuracies(x, y, test_x, test_y, shots=(2, 5), draws=2, seed=3)
    for n in (2, 5):
        for draw in range(2):
            rows = rank_in_class(y.numpy(), [3, draw]) < n
            assert np.bincount(y[rows]).tolist() == [n, n, n]
            peer = LogisticRegression(C=C, max_iter=10_000, tol=1e-8)
            peer.fit(normalize(x[rows].double()), y[rows])
            expected = 100 * peer.score(normalize(test_x.double()), test_y)
            assert found[n][draw] == pytest.approx(expected, abs=1.2)  # two test rows, of 180
    assert found[2][0] != found[2][1] and 33 < min(found[2]) < max(found[5]) < 100


def test_draws_are_of_the_images_alone_and_the_same_again():
    """Features that tell rows by their number alone: equal accuracies mean equal draws."""
    x, y = blobs((20, 20, 20))
    once, again, other = (
        few_shot_accuracies(features, y, *TESTS, shots=(1,), draws=4, seed=seed)
        for features, seed in ((x, 0), (x.double() * 7, 0), (x, 1))
    )
    assert once == again != other
    assert few_shot_accuracies(x, y, *TESTS, shots=(1,), draws=2)[1] == once[1][:2]


def test_a_small_class_gives_all_and_a_class_that_training_lacks_is_missed():
    x, y = blobs((20, 3, 0))
    found = few_shot_accuracies(x, y, *TESTS, shots=(5,), draws=1)
    assert 40 < found[5][0] <= 100 * 2 / 3


def test_what_the_classes_have_no_rows_for_is_said(capsys):
    labels = torch.tensor([0] * 4 + [1] * 12 + [5] * 12)
    assert usable_shots(labels, (1, 4)) == (1, 4)
    assert capsys.readouterr().err == ""
    assert usable_shots(labels, (1, 10, 50)) == (1, 10)
    told = capsys.readouterr()
    assert "50 a class left out: no class has more than 12 training images" in " ".join(told.out.split())
    assert "1 of 3 classes have fewer than 10 training images and give all" in " ".join(told.err.split())


def test_summary_has_the_sample_deviation():
    found = summary({1: [40.0, 50.0], 10: [80.0]})
    assert found["1"] == {"mean": 45.0, "sd": pytest.approx(50**0.5), "values": [40.0, 50.0]}
    assert found["10"]["sd"] == 0.0


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"shots": (1, 21)}, ValueError, "no class has 21 training rows, the largest has 20"),
        ({"shots": (0,)}, ValueError, "shots must be at least 1, got 0"),
        ({"shots": (1.5,)}, TypeError, "shots must be an int"),
        ({"draws": 0}, ValueError, "draws must be at least 1"),
        ({"train_labels": torch.zeros(60, dtype=torch.int64)}, ValueError, "train_labels are all 0"),
        ({"train_labels": torch.full((60,), -1)}, ValueError, "train_labels must be 0 or more"),
        ({"train_features": torch.full((60, 6), torch.nan)}, ValueError, "train_features holds NaN"),
        ({"test_features": torch.ones(0, 6), "test_labels": torch.ones(0).long()}, ValueError, "no rows"),
        ({"test_labels": torch.zeros(3).long()}, ValueError, "test_labels must have shape"),
    ],
)
def test_bad_input_is_named(change, error, message):
    x, y = blobs((20, 20, 20))
    arguments = {"train_features": x, "train_labels": y, "test_features": TESTS[0], "test_labels": TESTS[1]} | change
    with pytest.raises(error, match=message):
        few_shot_accuracies(**arguments)
