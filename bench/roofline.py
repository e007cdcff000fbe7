"""What the cards allow and what the kernels need of them, on paper: no GPU is used and nothing is timed.

Floors: operations over the tensor cores' peak, bytes over the memory's rate. Traffic: counted from the tiling. Share of
peak: instructions of the loop over tiles, counted in the PTX, and the cycles that they take of each unit. Of branches,
those that load rows anew (chunks after the first of rows wider than 128) are left out, all others counted as taken.
The higher figure is for units that overlap wholly, the lower for tensor cores that wait while anything else is issued.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from audit import Shape, only_entry, triton_ptx
from nvrtc import ptx_of

MMA = re.compile(r"mma(?:_async)?\.sync\.aligned\.m(\d+)n(\d+)k(\d+)")
RESULT = Path(__file__).parent / "results" / "roofline.md"


@dataclass(frozen=True)
class Card:
    """From the vendor's data sheets (V100 SXM2, A100 SXM 80 GB, H100 SXM): dense float16 with float32 sums."""

    name: str
    capability: int
    tensor: float  # operations per second
    memory: float  # bytes per second
    multiprocessors: int
    products: int  # multiply-adds that a quarter of a multiprocessor's tensor cores do in a cycle, at that peak
    backend: str  # that "auto" takes there for 16-bit inputs


CARDS = (
    Card("V100", 70, 125e12, 900e9, 80, 128, "cuda"),
    Card("A100", 80, 312e12, 2039e9, 108, 256, "triton"),
    Card("H100", 90, 989e12, 3350e9, 132, 512, "triton"),
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
    cuda: tuple[str, str] = (
        "info_nce.h",
        "ifnd::cuda::info_nce_kernel<ifnd::cuda::Half, 128, ifnd::cuda::Pass::DENSE>",
    )
    triton: str = "info_nce pass, eliminate"

    def operations(self) -> float:
        return 2 * 2 * self.B * self.K * self.D

    def floor_bytes(self) -> float:
        return self.K * (2 * self.D + 4 * self.L + 8) + self.B * (3 * 2 * self.D + 4 * self.L + 8)

    def traffic(self, card: Card) -> float:
        """Keys once: blocks of one split run side by side and share them in the second-level cache. The splits' parts
        of the gradient are written and read."""
        rows = 128 if card.backend == "cuda" else 64
        blocks = -(-self.B // min(rows, -(-self.B // 32) * 32))
        splits = -(-2 * card.multiprocessors // blocks)
        return self.floor_bytes() + 2 * splits * self.B * (4 * self.D + 12 * self.L + 12)


@dataclass(frozen=True)
class Assignment:
    N: int
    C: int
    D: int = 128
    cuda: tuple[str, str] = (
        "assign.h",
        "ifnd::cuda::assign_kernel<ifnd::cuda::Half, 128, ifnd::cuda::Assign::CONFIDENCE>",
    )
    triton: str = "assign labels and confidence"

    def operations(self) -> float:
        return 2 * self.N * self.C * self.D

    def floor_bytes(self) -> float:
        return 2 * self.D * (self.N + self.C) + 8 * self.N

    def traffic(self, card: Card) -> float:
        """Centroids once for each wave of blocks, which walk them together."""
        rows = 256 if card.backend == "cuda" else 128
        waves = -(-self.N // (rows * 2 * card.multiprocessors))
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
    """Of one warp in one turn of the loop over tiles."""

    products: int  # multiply-adds on tensor cores
    exponentials: int
    shared_waves: int
    instructions: int

    @staticmethod
    def of(ptx: str) -> Mix:
        lines = [line.strip() for line in ptx.splitlines()]
        labels = {line.partition(":")[0]: i for i, line in enumerate(lines) if re.match(r"\$\w+:", line)}
        jumps = [(i, target) for i, line in enumerate(lines) for target in re.findall(r"bra.*?(\$\w+);", line)]
        loops = [(labels[target], i) for i, target in jumps if labels[target] < i]
        loops = [(a, b) for a, b in loops if any(MMA.search(line) for line in lines[a:b])]
        first, last = max(loops, key=lambda loop: loop[1] - loop[0])
        body = hot(lines[first:last])
        shapes = [tuple(map(int, found.groups())) for line in body if (found := MMA.search(line))]
        # m8n8k4 is four products of a warp; m64 is a product of four warps.
        products = sum(m * n * k * (4 if m == 8 else 1) // (4 if m == 64 else 1) for m, n, k in shapes)
        widths = [re.findall(r"\.[vx]([24])", line) for line in body if ".shared" in line]
        waves = sum(int(width[0]) if width else 1 for width in widths)
        return Mix(
            products, sum("ex2" in line for line in body), waves,
            sum(not line.startswith("mov") for line in body),
        )  # fmt: skip

    def tensor_cycles(self, card: Card) -> float:
        return self.products / card.products

    def share(self, card: Card) -> tuple[float, float]:
        """Of the tensor cores' peak: units wholly overlapped, and tensor cores waiting for all others' issue."""
        tensor = self.tensor_cycles(card)
        busiest = max(tensor, self.instructions, self.exponentials * EXPONENTIAL, self.shared_waves * SHARED_WAVE)
        return tensor / busiest, tensor / (tensor + self.instructions)


def mix_of(shape: Loss | Assignment, card: Card) -> Mix:
    if card.backend == "triton":
        return Mix.of(triton_ptx(shape.triton, "fp16", card.capability, Shape())[0])
    header, kernel = shape.cuda
    return Mix.of(only_entry(ptx_of(header, kernel, card.capability), re.split(r"::|<", kernel)[2]))


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


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table() -> list[str]:
    header = ("shape", "card, backend", "floor, operations", "floor, bytes", "traffic / floor", "share of peak")
    lines = [row(*header), row(*["---"] * len(header))]
    for shape in SHAPES:
        sizes = " ".join(f"{name}={size:,}" for name, size in vars(shape).items() if isinstance(size, int))
        for card in CARDS:
            best, worst = mix_of(shape, card).share(card)
            operations, bytes_ = shape.operations() / card.tensor, shape.floor_bytes() / card.memory
            lines.append(
                row(
                    f"{type(shape).__name__.lower()} {sizes}", f"{card.name}, {card.backend}",
                    f"{operations * 1e6:,.0f} us", f"{bytes_ * 1e6:,.0f} us",
                    f"{shape.traffic(card) / shape.floor_bytes():.2f}", f"{worst:.0%} to {best:.0%}",
                )
            )  # fmt: skip
    return lines


def mixes() -> list[str]:
    header = ("kernel", "card, backend", "tensor cycles", "instructions", "exponentials", "shared-memory waves")
    lines = [row(*header), row(*["---"] * len(header))]
    for shape in (SHAPES[0], SHAPES[3]):
        for card in CARDS:
            mix = mix_of(shape, card)
            numbers = (mix.tensor_cycles(card), mix.instructions, mix.exponentials, mix.shared_waves)
            lines.append(row(type(shape).__name__.lower(), f"{card.name}, {card.backend}", *map(round, numbers)))
    return lines


def main() -> None:
    title = [
        "# Rooflines on paper",
        "",
        f"`python bench/roofline.py`. {' '.join(__doc__.split())}",
        "",
    ]
    between = ["", "Of one warp for one tile, D=128, float16, with the cycles that its products take at the peak:", ""]
    text = "\n".join([*title, *table(), *between, *mixes()]) + "\n"
    print(text)
    RESULT.write_text(text)


if __name__ == "__main__":
    main()
