from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ifnd_fast.contrast.queue import NegativeQueue


def batch(first: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys number first, first + 1, ...: features, labels and indices that tell which one it is."""
    number = torch.arange(first, first + size)
    features = torch.stack([number, -number], dim=1).float()
    labels = torch.stack([number % 5, number % 3 - 1, number], dim=1).int()
    return features, labels, number + 1000


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 30), st.booleans(), st.booleans()), max_size=8))
def test_same_as_a_deque(size, batches):
    queue, expected = NegativeQueue(size, 2, 3), deque(maxlen=size)
    first = 0
    for length, with_labels, with_indices in batches:
        keys, labels, indices = batch(first, length)
        queue.enqueue(keys, labels if with_labels else None, indices if with_indices else None)
        for i in range(length):
            row = labels[i].tolist() if with_labels else [-1, -1, -1]
            expected.append((keys[i].tolist(), row, int(indices[i]) if with_indices else -1))
        first += length
        features, labels, indices = queue.negatives()
        assert len(features) == len(labels) == len(indices) == len(expected) == queue.count
        oldest = queue.pointer if queue.count == size else 0  # documented order
        rows = list(zip(features.tolist(), labels.tolist(), indices.tolist(), strict=True))
        assert rows[oldest:] + rows[:oldest] == list(expected)


def test_starts_empty():
    features, labels, indices = NegativeQueue(4, 2, 3).negatives()
    assert features.shape == (0, 2) and labels.shape == (0, 3) and indices.shape == (0,)
    assert labels.dtype == torch.int32 and indices.dtype == torch.int64


def test_negatives_are_views_without_gradient():
    queue = NegativeQueue(4, 2, 3)
    keys, labels, indices = batch(0, 3)
    queue.enqueue(keys.requires_grad_(), labels, indices)
    features, _, _ = queue.negatives()
    assert not features.requires_grad
    assert features.data_ptr() == queue.features.data_ptr()
    assert queue.negatives()[0].data_ptr() != keys.data_ptr()


def test_enqueue_before_backward_is_an_error_not_a_wrong_gradient():
    queue = NegativeQueue(4, 2, 3)
    queue.enqueue(*batch(0, 4))
    query = torch.ones(1, 2, requires_grad=True)
    loss = (query @ queue.negatives()[0].T).sum()
    queue.enqueue(*batch(4, 2))
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_are_stored_in_the_queues_dtype(dtype):
    queue = NegativeQueue(4, 2, 1, dtype=dtype)
    queue.enqueue(torch.tensor([[0.1, 0.2]]))
    assert torch.equal(queue.negatives()[0], torch.tensor([[0.1, 0.2]]).to(dtype))


def test_state_round_trip_bit_for_bit(tmp_path):
    queue = NegativeQueue(7, 2, 3)
    queue.enqueue(*batch(0, 5))
    queue.enqueue(*batch(5, 4))
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    other = NegativeQueue(7, 2, 3)
    other.load_state_dict(torch.load(tmp_path / "queue.pt", weights_only=True))
    for q in (queue, other):
        q.enqueue(*batch(9, 3))
    assert (other.pointer, other.count) == (queue.pointer, queue.count) == (5, 7)
    assert all(map(torch.equal, other.negatives(), queue.negatives()))


@pytest.mark.parametrize("state", [(3, 2), (7, 7), (-1, 7), (0, 8), (-1, -1)])
def test_impossible_states_are_refused(state):
    with pytest.raises(ValueError, match="don't fit a queue of size 7"):
        NegativeQueue(7, 2, 3).set_extra_state(torch.tensor(state))


def test_relabel():
    queue = NegativeQueue(6, 2, 2)
    queue.enqueue(torch.ones(3, 2), torch.full((3, 2), 9, dtype=torch.int32), torch.tensor([2, 0, 2]))
    queue.enqueue(torch.ones(1, 2), torch.full((1, 2), 9, dtype=torch.int32))
    table = torch.tensor([[5, -1], [6, 7], [-1, 8]], dtype=torch.int32)
    queue.relabel(table)
    assert queue.labels.tolist() == [[-1, 8], [5, -1], [-1, 8], [-1, -1], [-1, -1], [-1, -1]]
    NegativeQueue(6, 2, 2).relabel(table)  # empty
    with pytest.raises(ValueError, match="table has 2 rows, but the queue has a key of image 2"):
        queue.relabel(table[:2])
    assert queue.labels[0].tolist() == [-1, 8]
    with pytest.raises(TypeError, match="table must be torch.int32"):
        queue.relabel(table.long())
    with pytest.raises(ValueError, match=r"table must have shape \(L, 2\)"):
        queue.relabel(table[:, :1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, 4),), ValueError, r"keys must have shape \(B, 2\), got \(3, 4\)"),
        ((torch.ones(2),), ValueError, "keys must have shape"),
        ((torch.ones(3, 2).int(),), TypeError, "keys must be floating point"),
        (([[1.0, 2.0]],), TypeError, "keys must be a torch.Tensor, got list"),
        ((torch.ones(3, 2, device="meta"),), ValueError, "keys must be on the queue's device cpu, got meta"),
        ((torch.ones(3, 2), torch.ones(3, 3)), TypeError, "labels must be torch.int32"),
        ((torch.ones(3, 2), torch.ones(2, 3).int()), ValueError, r"labels must have shape \(3, 3\)"),
        ((torch.ones(3, 2), None, torch.ones(3).int()), TypeError, "indices must be torch.int64"),
        ((torch.ones(3, 2), None, torch.ones(4).long()), ValueError, r"indices must have shape \(3\)"),
    ],
)
def test_unfit_arguments(arguments, error, message):
    queue = NegativeQueue(4, 2, 3)
    with pytest.raises(error, match=message):
        queue.enqueue(*arguments)
    assert queue.count == 0


@pytest.mark.parametrize("name", ["size", "dim", "levels"])
def test_unfit_sizes(name):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
        NegativeQueue(**{"size": 1, "dim": 1, "levels": 1, name: 0})
    with pytest.raises(TypeError, match="dtype must be"):
        NegativeQueue(1, 1, 1, dtype=torch.int32)


def test_an_empty_slot_or_unknown_image_is_minus_one():
    queue = NegativeQueue(4, 2, 1)
    queue.enqueue(torch.ones(2, 2), indices=torch.tensor([5, -1]))
    assert queue.indices.tolist() == [5, -1, -1, -1] and queue.negatives()[2].tolist() == [5, -1]
    queue.relabel(torch.zeros(6, 1, dtype=torch.int32))
    assert queue.labels.flatten().tolist() == [0, -1, -1, -1]
