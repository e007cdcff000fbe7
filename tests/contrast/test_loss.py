"""IFNDLoss: `info_nce` with its settings kept."""

from __future__ import annotations

import pytest
import torch

import ifnd_fast
from tests.ops.cases import REDUCTIONS, make_case


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_module_equals_function(reduction):
    case = make_case(9, 50, 12, 2, false_negatives="attract", temperature=0.07)
    module = ifnd_fast.IFNDLoss(0.07, "attract", reduction)
    extras = (case.query_labels, case.negative_labels, case.query_ids, case.negative_ids)
    loss = module(case.query, case.positive, case.negatives, *extras)
    assert torch.equal(loss, case.loss(reduction=reduction))
    assert "attract" in repr(module) and "0.07" in repr(module)
    learned = ifnd_fast.IFNDLoss(torch.nn.Parameter(torch.tensor(0.07)))
    assert repr(learned) == "IFNDLoss(temperature=0.07 (learned), false_negatives='eliminate')"
    assert not list(module.parameters()) and not module.state_dict()


def test_module_refuses_wrong_settings():
    with pytest.raises(ValueError, match="false_negatives must be one of .* got 'drop'"):
        ifnd_fast.IFNDLoss(false_negatives="drop")
    with pytest.raises(ValueError, match="reduction must be one of .* got 'avg'"):
        ifnd_fast.IFNDLoss(reduction="avg")
    for temperature in (-1, 0.0):
        with pytest.raises(ValueError, match=f"temperature must be .* got {temperature}"):
            ifnd_fast.IFNDLoss(temperature=temperature)
