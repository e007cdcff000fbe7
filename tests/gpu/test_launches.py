"""How the work is cut up: on no card a second wave of a few blocks, no part of the work left out; and launched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ifnd_fast.ops import cuda, launch
from tests.gpu import emulated
from tests.ops.cases import make_case

MULTIPROCESSORS = {"V100": 80, "T4": 40, "A100": 108, "H100": 132}
ROWS = (1, 32, 33, 256, 320, 384, 768, 1024, 2048, 4096)


@pytest.mark.parametrize("card", MULTIPROCESSORS)
@pytest.mark.parametrize("B", ROWS)
@pytest.mark.parametrize("K", [1, 31, 1024, 4096, 65536])
def test_cuda_blocks_run_in_one_wave(card, B, K):
    warps = cuda._warps(B, 3)
    blocks = -(-B // (32 * warps))
    resident = 2 * MULTIPROCESSORS[card] * (2 if warps == 1 else 1)
    splits, columns, tiles = cuda.splits_of(K, blocks, resident)
    assert splits * blocks <= max(resident, blocks) and tiles == -(-K // 32)
    assert columns % 32 == 0 and (splits - 1) * columns < K <= splits * columns
    if K == 65536 and blocks <= resident // 2:
        assert splits * blocks > resident / 2  # and the card is full


@pytest.mark.parametrize("card", MULTIPROCESSORS)
@pytest.mark.parametrize("B", ROWS)
@pytest.mark.parametrize("K", [1, 31, 1024, 4096, 65536])
def test_triton_programs_run_in_one_wave(card, B, K):
    pytest.importorskip("triton")
    from ifnd_fast.kernels import info_nce
    from ifnd_fast.kernels.tiles import Tile

    programs, resident = -(-B // 64), 2 * MULTIPROCESSORS[card]
    plan = info_nce.plan_of(B, K, Tile(64, 64, 4, 2), 1, MULTIPROCESSORS[card])
    assert plan.splits * programs <= max(resident, programs)
    assert plan.split_keys % 64 == 0 and (plan.splits - 1) * plan.split_keys < K <= plan.splits * plan.split_keys


@pytest.mark.parametrize("card", MULTIPROCESSORS)
@pytest.mark.parametrize("B", ROWS)
@pytest.mark.parametrize("K", [1, 32, 1024, 2048, 65536])
def test_triton_splits_queries_where_keys_are_few(card, B, K):
    pytest.importorskip("triton")
    from ifnd_fast.kernels import info_nce
    from ifnd_fast.kernels.tiles import Tile

    programs, resident, tiles = -(-K // 32), 2 * MULTIPROCESSORS[card], -(-B // 64)
    plan = info_nce.negatives_plan_of(B, K, Tile(64, 64, 4, 2), 1, MULTIPROCESSORS[card])
    assert plan.splits * programs <= max(resident, programs)
    assert plan.split_keys % 64 == 0 and (plan.splits - 1) * plan.split_keys < B <= plan.splits * plan.split_keys
    assert plan.splits == 1 or plan.split_keys >= 128  # what adding two of them up costs
    if tiles >= 4 and programs <= resident // 2:
        assert plan.splits > 1


def test_buffers_lie_apart():
    """In one allocation, each from the start of a line of the caches."""
    sizes = {"a": 5, "b": 64, "c": 1, "d": 33}
    held, places = launch.buffers(torch.empty(1, dtype=torch.float16), sizes)
    assert held.dtype == torch.float32 and list(places) == list(sizes)
    begins = [(place - held.data_ptr()) // 4 for place in places.values()]
    assert begins == [0, 32, 96, 128] and begins[-1] + 33 <= len(held)


def test_each_tensor_is_looked_at_once(monkeypatch):
    """Five launches share them: of the host's time addresses were the largest part."""
    looked_at, launched = [], []
    address = launch.address
    monkeypatch.setattr(launch, "address", lambda name, *rest: looked_at.append(name) or address(name, *rest))
    functions = ("info_nce", "info_nce_normalise", "info_nce_add_splits")
    card = SimpleNamespace(**{name: lambda name=name, **given: launched.append((name, given)) for name in functions})
    emulated.use(monkeypatch, card, "Ampere")
    case = make_case(4, 40, 16, 3, dtype=torch.float16)
    case.query.requires_grad_()
    case.loss(backend="cuda")
    passes = [given["step"] for name, given in launched if name == "info_nce"]
    assert passes == ["dense", "marked_sums", "marked_grad"] and len(launched) == 5
    assert set(looked_at) > {"query", "negatives", "negative_labels"} and "split_grad" in launched[0][1]
    assert len(looked_at) - len(set(looked_at)) <= 1  # the query, as an operand and as it was given
    assert not any(isinstance(value, torch.Tensor) for _, given in launched for value in given.values())
