"""How the work is cut up: on no card a second wave of a few blocks, no part of the work left out."""

from __future__ import annotations

import pytest

from ifnd_fast.ops import cuda

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
