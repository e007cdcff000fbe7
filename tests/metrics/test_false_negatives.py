from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ifnd_fast.clustering.pseudo_labels import PseudoLabels
from ifnd_fast.metrics.false_negatives import detection_by_rate, detection_statistics


def brute_force(labels, queue_labels, queue_indices, truth):
    n, levels = labels.shape
    per_query, precision, recall = [], [], []
    for level in range(levels):
        flagged = known_flagged = hits = positives = 0
        for i in range(n):
            for k, index in enumerate(queue_indices):
                if index == i:
                    continue
                flag = labels[i, level] == queue_labels[k, level] and labels[i, level] >= 0
                flagged += flag
                if truth is not None and index >= 0 and truth[i] >= 0 and truth[index] >= 0:
                    known_flagged += flag
                    hits += flag and truth[i] == truth[index]
                    positives += truth[i] == truth[index]
        per_query.append(flagged / n)
        precision.append(hits / known_flagged if known_flagged else None)
        recall.append(hits / positives if positives else None)
    if truth is None:
        return {"false_negatives_per_query": per_query}
    return {
        "false_negatives_per_query": per_query,
        "false_negative_precision": precision,
        "false_negative_recall": recall,
    }


@st.composite
def cases(draw):
    n, k, levels = draw(st.integers(1, 9)), draw(st.integers(0, 12)), draw(st.integers(1, 3))
    label = st.sampled_from([-1, 0, 1, 2, 2**31 - 1])
    labels = draw(hnp.arrays(np.int32, (n, levels), elements=label))
    indices = draw(hnp.arrays(np.int64, (k,), elements=st.integers(-1, n - 1)))
    # Either the images' own labels, or older ones.
    own = np.where(indices[:, None] >= 0, labels[indices], -1)
    queue_labels = draw(st.just(own) | hnp.arrays(np.int32, (k, levels), elements=label))
    truth = draw(st.none() | hnp.arrays(np.int64, (n,), elements=st.integers(-1, 2)))
    return labels, queue_labels, indices, truth


@settings(max_examples=300, deadline=None)
@given(cases())
def test_same_as_counting_every_pair(case):
    labels, queue_labels, indices, truth = case
    tensors = [torch.from_numpy(a) for a in (labels, queue_labels.astype(np.int32), indices)]
    assert detection_statistics(*tensors, truth) == brute_force(*case)


def test_perfect_labels_have_precision_and_recall_one():
    truth = torch.arange(300) % 7
    labels = truth[:, None].int()
    indices = torch.randint(300, (1000,))
    statistics = detection_statistics(labels, labels[indices], indices, truth)
    assert statistics["false_negative_precision"] == statistics["false_negative_recall"] == [1.0]


def test_a_large_queue_costs_no_matrix_of_pairs():
    n, k = 200_000, 65_536  # the (N, K) matrix would take 13 GB even as bytes
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 25_000, (n, 2), dtype=torch.int32, generator=generator)
    indices = torch.randint(n, (k,), generator=generator)
    truth = torch.randint(1000, (n,), generator=generator)
    statistics = detection_statistics(labels, labels[indices], indices, truth)
    assert statistics["false_negatives_per_query"][0] == pytest.approx(k / 25_000, rel=0.05)
    assert statistics["false_negative_precision"][0] == pytest.approx(1e-3, rel=0.2)  # of some 500 true pairs


def test_unfit_arguments():
    labels, queue_labels = torch.zeros(4, 2, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)
    indices = torch.tensor([0, 1, -1])
    with pytest.raises(TypeError, match="labels must be torch.int32"):
        detection_statistics(labels.long(), queue_labels, indices)
    with pytest.raises(ValueError, match="labels must have at least one row"):
        detection_statistics(labels[:0], queue_labels, indices)
    with pytest.raises(ValueError, match=r"queue_labels must have shape \(L, 2\)"):
        detection_statistics(labels, queue_labels[:, :1], indices)
    with pytest.raises(ValueError, match=r"queue_indices must have shape \(3\)"):
        detection_statistics(labels, queue_labels, indices[:2])
    with pytest.raises(ValueError, match="queue_indices must be below the 4 rows of labels, got 4"):
        detection_statistics(labels, queue_labels, torch.tensor([0, 4, 1]))
    with pytest.raises(ValueError, match=r"true_labels must have shape \(4,\)"):
        detection_statistics(labels, queue_labels, indices, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="true_labels must be integers"):
        detection_statistics(labels, queue_labels, indices, np.zeros(4))


# ---- at every acceptance rate ----


@settings(max_examples=150, deadline=None)
@given(data=st.data(), n=st.integers(1, 12), levels=st.integers(1, 2))
def test_by_rate_is_what_accepting_that_share_would_give(data, n, levels):
    labels = data.draw(hnp.arrays(np.int32, (n, levels), elements=st.integers(0, 3)))
    confidence = data.draw(hnp.arrays(np.float32, (n, levels), elements=st.sampled_from([0.1, 0.2, 0.9])))  # ties too
    truth = data.draw(hnp.arrays(np.int64, (n,), elements=st.integers(-1, 2)))
    rates = [0.0, 0.05, 0.3, 1 / 3, 0.5, 1.0]
    found = detection_by_rate(torch.from_numpy(labels), torch.from_numpy(confidence), truth, rates)
    pseudo_labels = PseudoLabels((4,) * levels)
    pseudo_labels.labels, pseudo_labels.confidence = torch.from_numpy(labels), torch.from_numpy(confidence)
    for at, rate in enumerate(rates):
        accepted = pseudo_labels.accept(rate).numpy()
        expected = brute_force(accepted, accepted, np.arange(n), truth)
        for level in range(levels):
            assert found.per_query[level][at] == expected["false_negatives_per_query"][level]
            assert found.precision[level][at] == expected["false_negative_precision"][level]
            assert found.recall[level][at] == expected["false_negative_recall"][level]


def test_by_rate_of_known_labels():
    labels = torch.tensor([[0], [0], [0], [1]], dtype=torch.int32)
    confidence = torch.tensor([[0.9], [0.8], [0.7], [0.6]])
    found = detection_by_rate(labels, confidence, np.array([5, 5, 6, 6]), [0.0, 0.5, 0.75, 1.0])
    assert found.precision == [[None, 1.0, 1 / 3, 1 / 3]]  # of 0, 2, 6 and 6 ordered pairs
    assert found.recall == [[0.0, 0.5, 0.5, 0.5]]  # of 4


def test_by_rate_forms_no_pairs():
    n = 300_000
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(100_000, (n, 1), dtype=torch.int32, generator=generator)
    found = detection_by_rate(labels, torch.rand(n, 1, generator=generator), torch.zeros(n).long(), [0.5, 1.0])
    assert found.precision == [[1.0, 1.0]]
    assert found.per_query[0][1] == pytest.approx(3, rel=0.02)
    assert found.per_query[0][0] == pytest.approx(3 / 4, rel=0.03)


def test_by_rate_refuses_confidence_of_another_shape():
    with pytest.raises(ValueError, match=r"confidence must have shape \(3, 1\)"):
        detection_by_rate(torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3), torch.zeros(3).long(), [1.0])
