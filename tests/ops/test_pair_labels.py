"""Labels and ids as backends get them."""

from __future__ import annotations

import pytest
import torch

from ifnd_fast import info_nce
from ifnd_fast.ops import cpu
from ifnd_fast.ops.pair_labels import PairLabels
from tests.ops.cases import make_case


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("ids", [False, True])
def test_backends_get_what_was_given_by_name(levels, ids, monkeypatch):
    """Forward and backward: transposed labels and every other id, row by row as they read."""
    B, K, D = 4, 9, 8
    case, found = make_case(B, K, D, max(1, levels)), []
    given = dict.fromkeys(PairLabels._fields)
    if levels:
        given["query_labels"] = torch.arange(levels * B, dtype=torch.int32).view(levels, B).t()
        given["negative_labels"] = torch.arange(levels * K, dtype=torch.int32).view(levels, K).t()
    if ids:
        given |= {"query_ids": torch.arange(2 * B)[::2], "negative_ids": torch.arange(5, 5 + 3 * K)[::3]}
    for name in ("info_nce_forward", "info_nce_negatives_grad"):
        function = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, function=function: (found.append(args[3]), function(*args))[1])
    negatives = case.negatives.float().requires_grad_()
    info_nce(case.query.float(), case.positive.float(), negatives, backend="cpu", **given).backward()
    assert len(found) == 2
    for labels in found:
        assert isinstance(labels, PairLabels) and labels.levels == levels and labels.has_ids == ids
        assert labels.n_losses("mean") == max(1, levels) and labels.n_losses("any") == labels.n_losses("all") == 1
        for name, tensor in labels.plain()._asdict().items():
            assert (tensor is None) == (given[name] is None)
            assert tensor is None or (tensor.is_contiguous() and torch.equal(tensor, given[name]))
