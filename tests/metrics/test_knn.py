from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode

from ifnd_fast.metrics.knn import knn_accuracy, knn_classify


def brute_force(train, labels, test, k, temperature):
    """The definition, one test row and one vote at a time, in float64."""

    def unit(row):
        norm = math.sqrt(sum(x * x for x in row))
        return [x / norm for x in row] if norm else row

    train = [unit(row) for row in train.double().tolist()]
    predictions = []
    for row in test.double().tolist():
        row = unit(row)
        similarity = [sum(a * b for a, b in zip(row, other, strict=True)) for other in train]
        nearest = sorted(range(len(train)), key=lambda j: (-similarity[j], j))[:k]
        votes = [0.0] * (int(labels.max()) + 1)
        for j in nearest:
            votes[int(labels[j])] += math.exp(similarity[j] / temperature)
        predictions.append(max(range(len(votes)), key=lambda c: (votes[c], -c)))
    return torch.tensor(predictions)


def blobs(n, m, dim=8, classes=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator, dtype=dtype)
    labels = torch.randint(classes, (n + m,), generator=generator)
    rows = centres[labels] + torch.randn(n + m, dim, generator=generator, dtype=dtype)
    return rows[:n], labels[:n], rows[n:], labels[n:]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 12),
    dim=st.integers(2, 9),
    k=st.integers(1, 50),
    chunk=st.integers(1, 45),
    temperature=st.sampled_from([0.05, 0.07, 1.0]),
    seed=st.integers(0, 999),
)
def test_equals_the_definition(n, m, dim, k, chunk, temperature, seed):
    train, labels, test, _ = blobs(n, m, dim, seed=seed)
    expected = brute_force(train, labels, test, k, temperature)
    found = knn_classify(train, labels, test, k=k, temperature=temperature, chunk=chunk)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("temperature", [0.07, math.inf])
def test_agrees_with_scikit_learn(k, temperature):
    train, labels, test, truth = blobs(500, 200, seed=3)

    def weights(distance):  # of unit rows: distance^2 = 2 - 2 s
        return np.exp((1 - distance**2 / 2) / temperature)

    unit = torch.nn.functional.normalize
    uniform = math.isinf(temperature)
    peer = KNeighborsClassifier(k, weights="uniform" if uniform else weights, algorithm="brute")
    peer.fit(unit(train).numpy(), labels.numpy())
    expected = peer.predict(unit(test).numpy())
    found = knn_classify(train, labels, test, k=k, temperature=temperature, chunk=64)
    assert np.array_equal(found.numpy(), expected)
    accuracy = knn_accuracy(train, labels, test, truth, k=k, temperature=temperature)
    assert accuracy == pytest.approx(100 * (expected == truth.numpy()).mean())
    assert 25 < accuracy < 100  # neither chance nor trivial


def test_weights_matter():
    # One neighbour at s = 1 against two at s = 0.8: the near one wins at a low temperature, both at a high.
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels, test = torch.tensor([1, 0, 0]), torch.tensor([[3.0, 0.0]])
    assert knn_classify(train, labels, test, temperature=0.07).tolist() == [1]
    assert knn_classify(train, labels, test, temperature=1.0).tolist() == [0]


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_ties_go_to_the_lower_index_then_to_the_lower_class(chunk):
    train = torch.tensor([[1.0, 0.0]]).repeat(40, 1)
    labels = torch.full((40,), 5)
    labels[:3] = torch.tensor([2, 7, 7])
    test = torch.tensor([[2.0, 1.0], [0.0, 0.0]])
    assert knn_classify(train, labels, test, k=1, chunk=chunk).tolist() == [2, 2]
    assert knn_classify(train, labels, test, k=2, chunk=chunk).tolist() == [2, 2]
    assert knn_classify(train, labels, test, k=3, chunk=chunk).tolist() == [7, 7]
    assert knn_classify(train, labels, test, k=5, chunk=chunk).tolist() == [5, 5]


def test_k_is_clipped_to_the_training_rows():
    train, labels, test, _ = blobs(30, 20)
    assert torch.equal(knn_classify(train, labels, test, k=1000), knn_classify(train, labels, test, k=30))


@pytest.mark.parametrize("scale", [1e-44, 1e-25, 1e30])
def test_scale_of_the_rows_does_not_matter(scale):
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0]]) * scale
    test = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert knn_classify(train, torch.tensor([0, 1]), test, k=1).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [1e-6, 0.07])
def test_low_precision_and_low_temperature_stay_finite(dtype, temperature):
    train, labels, test, truth = blobs(300, 100, dim=32)
    exact = knn_accuracy(train, labels, test, truth, temperature=temperature)
    found = knn_accuracy(train.to(dtype), labels.int(), test.to(dtype), truth, temperature=temperature)
    assert exact > 80 and abs(found - exact) <= 3


def test_memory_is_bounded_by_chunk():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    train, labels, test, _ = blobs(700, 600, dim=4)
    with Watch():
        knn_classify(train, labels, test, k=5, chunk=50)
    assert 50 * 50 <= largest <= 700 * 4  # a block of similarities at work, nothing larger than the features


def test_a_class_that_training_lacks_counts_as_an_error():
    train, test = torch.eye(2), torch.eye(2)
    assert knn_accuracy(train, torch.tensor([0, 1]), test, torch.tensor([0, 9]), k=1) == 50.0


def test_no_test_rows():
    found = knn_classify(torch.eye(2), torch.tensor([0, 1]), torch.empty(0, 2))
    assert found.shape == (0,) and found.dtype == torch.int64
    with pytest.raises(ValueError, match="test_features has no rows"):
        knn_accuracy(torch.eye(2), torch.tensor([0, 1]), torch.empty(0, 2), torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train_features": [[1.0]]}, TypeError, "train_features must be a torch.Tensor, got list"),
        ({"train_features": torch.ones(3, 2).int()}, TypeError, "train_features must be floating point"),
        ({"train_features": torch.ones(6)}, ValueError, r"train_features must have shape .*got \(6,\)"),
        ({"train_features": torch.empty(0, 2)}, ValueError, "train_features has no rows"),
        ({"test_features": torch.full((2, 2), math.nan)}, ValueError, "test_features holds NaN .* in 2 rows"),
        ({"test_features": torch.ones(2, 3)}, ValueError, "test_features has 3 columns, but train_.* has 2"),
        ({"train_labels": torch.zeros(3)}, TypeError, "train_labels must hold integers"),
        ({"train_labels": torch.zeros(2).int()}, ValueError, r"train_labels must have shape \(3,\)"),
        ({"train_labels": torch.tensor([0, -1, 1])}, ValueError, "train_labels must be 0 or more, got -1"),
        ({"n_classes": 1}, ValueError, "train_labels has label 1, but n_classes is 1"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2.5}, TypeError, "k must be an int, got 2.5"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be positive, got nan"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "train_features": torch.ones(3, 2),
        "train_labels": torch.tensor([0, 1, 1]),
        "test_features": torch.ones(2, 2),
    } | change
    with pytest.raises(error, match=message):
        knn_classify(**arguments)
