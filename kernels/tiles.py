"""How much of the problem one program of each kernel holds, by card, width of the inputs and dimension."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

MAX_CHUNK = 128  # columns of D that one tile holds; wider rows are walked in chunks


HELD_LEVELS = 4  # so many of a query's labels are kept in registers; with more, tiles are narrower
MANY_LEVELS_REGISTERS = {4: 255, 8: 128}  # by warps: two programs fit a multiprocessor


@dataclass(frozen=True)
class Tile:
    """rows x columns of similarities, `warps` of 32 threads, `stages` of the software pipeline.

    `marked` columns at a time where levels are told apart, `negatives` where their gradient is summed: both take more
    registers. A thread may have `registers` of them, in the loss's dense pass `pass_registers`; without a number ptxas
    chooses, now and then too few or too many. That pass multiplies in `parts` a chunk that has more columns than there
    are rows.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    marked: int = 32
    negatives: int = 32
    registers: int | None = None
    pass_registers: int | None = None
    parts: int = 1

    @property
    def of_pass(self) -> Tile:
        return replace(self, registers=self.pass_registers or self.registers)

    def parts_of(self, chunk: int, chunks: int) -> int:
        return self.parts if chunk > self.rows and chunks == 1 else 1


# By (kernel, bytes of a number), then compute capability, then any other. Chosen by bench/audit.py: the widest that
# spills no register on that card and leaves room for two programs on a multiprocessor, so that one's softmax hides
# behind the other's products. Wide tiles of keys spread the rescaling of the loss's gradient (rows x 128) over more
# products; 128 keys would spill. Where levels are told apart ptxas spills at 64 keys, on 8.0 also at 32.
# Assignment holds scores alone: 128 rows read each centroid from the second-level cache for 128 products. Four warps
# take them where mma.sync multiplies, with 32 centroids: rows are shared out to the warps then, and each reduces its
# own, with 2 barriers for 5. Two such programs fit 100 KiB of shared memory; with 128 registers four fit 8.0's.
# For the same reason parts of a chunk leave the loss 2 barriers of 12; wgmma shares out rows anyway, and on 12.0 ptxas
# would spill.
# float32 has no tensor-core path at full precision, and its operands take twice the registers.
TILES: dict[tuple[str, int], dict[tuple[int, int] | None, Tile]] = {
    ("info_nce", 2): {
        (8, 0): Tile(64, 64, 4, 2, marked=16, registers=255, parts=2),
        (8, 6): Tile(64, 64, 4, 2, registers=255, parts=2),
        (8, 9): Tile(64, 64, 4, 2, registers=255, parts=2),
        None: Tile(64, 64, 4, 2, registers=255),
    },
    ("info_nce", 4): {
        (8, 0): Tile(16, 32, 8, 1, marked=16, negatives=16, pass_registers=64),
        None: Tile(16, 32, 8, 1, marked=16, negatives=16),
    },
    ("assign_clusters", 2): {
        (8, 0): Tile(128, 32, 4, 2, registers=128),
        (8, 6): Tile(128, 32, 4, 2),
        (8, 9): Tile(128, 32, 4, 2),
        (12, 0): Tile(128, 32, 4, 2),
        (10, 0): Tile(128, 64, 8, 2, registers=128),
        None: Tile(128, 64, 8, 2),
    },
    ("assign_clusters", 4): {None: Tile(32, 64, 4, 1)},
}


def tile_of(kernel: str, dtype: torch.dtype, capability: tuple[int, int] | None, levels: int = 1) -> Tile:
    by_card = TILES[kernel, dtype.itemsize]
    tile = by_card.get(capability, by_card[None])
    if levels <= HELD_LEVELS:
        return tile
    return replace(tile, columns=tile.columns // 2, registers=MANY_LEVELS_REGISTERS[tile.warps])


def chunk_of(dim: int) -> tuple[int, int]:
    """Columns of D in a tile (a power of two, at least the 16 that a tensor core takes), and how many such chunks."""
    chunk = min(MAX_CHUNK, max(16, triton.next_power_of_2(dim)))
    return chunk, triton.cdiv(dim, chunk)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def multiprocessors(device: torch.device) -> int:
    """Of this GPU; for tensors on the CPU, where kernels are interpreted, a small number."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
