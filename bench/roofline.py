"""What the cards allow and what the CUDA kernels need of them, on paper: no GPU is used and nothing is timed.

Floors: operations over the tensor cores' peak, bytes over the memory's rate. Traffic: counted from the tiling. Share of
peak: instructions of the loop over tiles, counted in the PTX, and the cycles that they take of each unit. Of branches,
those that load rows anew (chunks after the first of rows wider than 128) are left out, all others counted as taken.
The higher figure is for units that overlap wholly, the lower for tensor cores that wait while anything else is issued.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nvrtc import ptx_of

RESULT = Path(__file__).parent / "results" / "roofline.md"


@dataclass(frozen=True)
class Card:
    """From the vendor's data sheets (V100 SXM2, A100 SXM 80 GB, H100 SXM): dense float16 with float32 sums."""

    name: str
    capability: int
    tensor: float  # operations per second
    memory: float  # bytes per second
    multiprocessors: int
    mma_cycles: int  # of a quarter of a multiprocessor, for the instruction that the kernel uses, at that peak


CARDS = (
    Card("V100", 70, 125e12, 900e9, 80, 8),  # m8n8k4: 4 x 256 products at 128 a cycle
    Card("A100", 80, 312e12, 2039e9, 108, 8),  # m16n8k16: 2048 at 256
    Card("H100", 90, 989e12, 3350e9, 132, 4),  # m16n8k16: 2048 at 512
)
# Cycles of a quarter of a multiprocessor for one warp's instruction (CUDA C++ Programming Guide, arithmetic
# throughput): one of issue for any; 4 lanes for exponentials; shared memory gives 128 bytes a cycle to all quarters.
EXPONENTIAL, SHARED_WAVE = 8, 4


@dataclass(frozen=True)
class Loss:
    B: int
    K: int
    D: int = 128
    L: int = 3
    kernel: str = "info_nce.h", "ifnd::cuda::info_nce_kernel<ifnd::cuda::Half, 128, ifnd::cuda::Pass::DENSE>"

    def operations(self) -> float:
        return 2 * 2 * self.B * self.K * self.D

    def floor_bytes(self) -> float:
        return self.K * (2 * self.D + 4 * self.L + 8) + self.B * (3 * 2 * self.D + 4 * self.L + 8)

    def traffic(self, card: Card) -> float:
        """Keys once: blocks of one split run side by side and share them in the second-level cache. The splits' parts
        of the gradient are written and read."""
        blocks = -(-self.B // min(128, -(-self.B // 32) * 32))
        splits = -(-2 * card.multiprocessors // blocks)
        return self.floor_bytes() + 2 * splits * self.B * (4 * self.D + 12 * self.L + 12)


@dataclass(frozen=True)
class Assignment:
    N: int
    C: int
    D: int = 128
    kernel: str = "assign.h", "ifnd::cuda::assign_kernel<ifnd::cuda::Half, 128, ifnd::cuda::Assign::CONFIDENCE>"

    def operations(self) -> float:
        return 2 * self.N * self.C * self.D

    def floor_bytes(self) -> float:
        return 2 * self.D * (self.N + self.C) + 8 * self.N

    def traffic(self, card: Card) -> float:
        """Centroids once for each wave of blocks of 256 rows, which walk them together."""
        waves = -(-self.N // (256 * 2 * card.multiprocessors))
        return self.floor_bytes() + (waves - 1) * 2 * self.D * self.C


SHAPES = (
    Loss(256, 65536),
    Loss(32, 65536),
    Loss(4096, 4096),
    Assignment(100_000, 3_000),
    *(Assignment(1_281_167, C) for C in (25_000, 50_000, 100_000)),
)


@dataclass(frozen=True)
class Mix:
    """Instructions of one turn of the loop over tiles, for one warp."""

    tensor: int
    exponentials: int
    shared_waves: int
    all: int

    @staticmethod
    def of(header: str, kernel: str, card: int) -> Mix:
        lines = [line.strip() for line in ptx_of(header, kernel, card).splitlines()]
        labels = {line.partition(":")[0]: i for i, line in enumerate(lines) if re.match(r"\$\w+:", line)}
        loops = [(labels[target], i) for i, line in enumerate(lines) for target in re.findall(r"bra.*?(\$\w+);", line)
                 if labels.get(target, i) < i]  # fmt: skip
        loops = [(a, b) for a, b in loops if any("mma.sync" in line for line in lines[a:b])]
        first, last = max(loops, key=lambda loop: loop[1] - loop[0])
        body = hot(lines[first:last])
        waves = sum(4 if ".v4" in line else 2 if ".v2" in line or "ldmatrix" in line else 1
                    for line in body if ".shared" in line)  # fmt: skip
        return Mix(
            sum("mma.sync" in line for line in body), sum("ex2" in line for line in body), waves,
            sum(not line.startswith("mov") for line in body),
        )  # fmt: skip

    def share(self, card: Card) -> tuple[float, float]:
        """Of the tensor cores' peak: units wholly overlapped, and tensor cores waiting for all others' issue."""
        tensor = self.tensor * card.mma_cycles
        other = self.all - self.tensor
        busiest = max(tensor, self.all, self.exponentials * EXPONENTIAL, self.shared_waves * SHARED_WAVE)
        return tensor / busiest, tensor / (tensor + other)


def hot(loop: list[str]) -> list[str]:
    """Its instructions without the basic blocks that load rows anew, 32 bits at a time (on Volta: 16 loads, kept)."""
    block: list[str] = []
    blocks = [block]
    for line in loop:
        if line.startswith("$"):
            blocks.append(block := [])
        elif line.endswith(";") and not line.startswith((".", "//")):
            block.append(line)
            if "bra" in line:
                blocks.append(block := [])

    kept: list[str] = []
    for block in blocks:
        if any("ld.global.u32" in line for line in block):
            if kept and "bra" in kept[-1]:  # around it
                kept.pop()
        else:
            kept += block
    return kept


def table() -> list[str]:
    header = ("shape", "card", "floor, operations", "floor, bytes", "device-memory traffic / floor", "share of peak")
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header))]
    for shape in SHAPES:
        for card in CARDS:
            best, worst = Mix.of(*shape.kernel, card.capability).share(card)
            of_what = {k: v for k, v in vars(shape).items() if k != "kernel"}
            sizes = " ".join(f"{name}={size:,}" for name, size in of_what.items())
            cells = (
                f"{type(shape).__name__.lower()} {sizes}", card.name,
                f"{shape.operations() / card.tensor * 1e6:,.0f} us",
                f"{shape.floor_bytes() / card.memory * 1e6:,.0f} us",
                f"{shape.traffic(card) / shape.floor_bytes():.2f}", f"{worst:.0%} to {best:.0%}",
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def mixes() -> list[str]:
    header = ("kernel", "card", "tensor", "exponentials", "shared-memory cycles", "all instructions", "tensor cycles")
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header))]
    for shape in (SHAPES[0], SHAPES[3]):
        for card in CARDS:
            mix = Mix.of(*shape.kernel, card.capability)
            numbers = (mix.tensor, mix.exponentials, mix.shared_waves, mix.all, mix.tensor * card.mma_cycles)
            name = re.search(r"(\w+)>$", shape.kernel[1]).group(1).lower()  # type: ignore[union-attr]
            lines.append(f"| {type(shape).__name__.lower()}, {name} | {card.name} | {' | '.join(map(str, numbers))} |")
    return lines


def main() -> None:
    title = [
        "# Rooflines of the CUDA kernels, on paper",
        "",
        f"`python bench/roofline.py`. {' '.join(__doc__.split())}",
        "",
    ]
    between = ["", "Instructions of one warp for one tile (32 keys; 16 centroids), 32 rows, D=128, float16:", ""]
    text = "\n".join([*title, *table(), *between, *mixes()]) + "\n"
    print(text)
    RESULT.write_text(text)


if __name__ == "__main__":
    main()
