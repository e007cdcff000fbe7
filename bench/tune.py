"""Times the Triton kernels' tiles on the GPU at hand and prints entries for kernels/tiles.py. Nothing is changed.

Sizes are the presets' (a queue of 65,536 keys; 25,000 centroids); the fastest tile of several runs is printed with how
much it gains on the table's. An entry is worth keeping when it gains at other sizes too: try --D, --B, --C.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import tyro
from torch.nn.functional import normalize
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from ifnd_fast import assign_clusters, info_nce
from ifnd_fast.kernels import assign_clusters as assign_kernels
from ifnd_fast.kernels import info_nce as loss_kernels
from ifnd_fast.kernels.tiles import Tile, tile_of

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Options:
    """Time the tiles of the Triton kernels on this GPU."""

    operator: tuple[str, ...] = ("info_nce", "assign_clusters")
    """which"""
    dtype: tuple[str, ...] = ("float16", "float32")
    """of the inputs"""
    B: int = 256
    """queries"""
    K: int = 65536
    """keys in the queue"""
    N: int = 100_000
    """rows to assign"""
    C: int = 25_000
    """centroids"""
    D: int = 128
    """numbers in a row"""


def rows(n: int, options: Options, dtype: torch.dtype) -> torch.Tensor:
    return normalize(torch.randn(n, options.D, device="cuda")).to(dtype)


def step_of(operator: str, options: Options, dtype: torch.dtype) -> Callable[[], object]:
    if operator == "assign_clusters":
        x, c = rows(options.N, options, dtype), rows(options.C, options, dtype)
        return lambda: assign_clusters(x, c, backend="triton")
    query, positive = (rows(options.B, options, dtype) for _ in range(2))
    query.requires_grad_()
    negatives = rows(options.K, options, dtype)
    labels = [torch.randint(-1, 25_000, (n, 3), device="cuda", dtype=torch.int32) for n in (options.B, options.K)]
    loss = partial(info_nce, query_labels=labels[0], negative_labels=labels[1], backend="triton")
    return lambda: torch.autograd.grad(loss(query, positive, negatives), query)


def milliseconds(operator: str, step: Callable[[], object], tile: Tile) -> float | None:
    """Median; None where the card has too few registers or too little shared memory."""
    module: Any = assign_kernels if operator == "assign_clusters" else loss_kernels
    module.tile_of = lambda *_: tile
    try:
        return do_bench(step, return_mode="median")
    except OutOfResources:
        return None
    finally:
        module.tile_of = tile_of


def main(options: Options) -> None:
    if not torch.cuda.is_available():
        sys.exit("bench/tune.py times kernels on a GPU, and torch sees none")
    capability = torch.cuda.get_device_capability()
    sizes = itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    tiles = [Tile(*size) for size in sizes]
    for operator, name in itertools.product(options.operator, options.dtype):
        dtype = DTYPES[name]
        step, table = step_of(operator, options, dtype), tile_of(operator, dtype, capability)
        times = {}
        for i, tile in enumerate(replace(tile, marked=table.marked, negatives=table.negatives) for tile in tiles):
            print(f"\r{operator} {name}: tile {i + 1} of {len(tiles)}", end="", file=sys.stderr, flush=True)
            if (time := milliseconds(operator, step, tile)) is not None:
                times[tile] = time
        best = min(times, key=times.__getitem__)
        before = milliseconds(operator, step, table)
        print(f"\n{operator} {name}: {times[best]:.3f} ms, the table's {before:.3f} ms. Entry of TILES:")
        print(f"    ({operator!r}, {dtype.itemsize}): {{{capability}: {best}}}")


if __name__ == "__main__":
    main(tyro.cli(Options))
