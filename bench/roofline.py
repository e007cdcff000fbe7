"""What the cards allow and what the kernels need of them, on paper: no GPU is used and nothing is timed.

Floors: operations over the tensor cores' peak, bytes over the memory's rate. Traffic: counted from the tiling, where no
tile is visited again; most of what exceeds the floor are the splits' gradients, "of it in between", which a
second-level cache larger than that keeps from the memory. Share of peak: instructions of the loop over whole tiles and
the cycles that they take of each unit, counted in SASS for triton, in PTX for cuda (whose branches that load rows anew,
for rows wider than 128, are left out, all others counted as taken). The higher figure is for units that overlap wholly,
shuffles and shared memory being one unit, the lower for tensor cores that wait while anything else is issued and at
every barrier. Both suppose a full card, and the loss of 32 queries does not fill it: V100's multiprocessors then hold 4
warps in place of 8, and half of the others' 64 rows are empty.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from audit import Shape, assemble, only_entry, recorded, triton_ptx
from nvrtc import ptx_of

from ifnd_fast.kernels.tiles import tile_of

MMA = re.compile(r"mma(?:_async)?\.sync\.aligned\.m(\d+)n(\d+)k(\d+)|HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(16)")
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
    cache: float  # bytes of the second level
    backend: str  # that "auto" takes there for 16-bit inputs


CARDS = (
    Card("V100", 70, 125e12, 900e9, 80, 128, 6e6, "cuda"),
    Card("A100", 80, 312e12, 2039e9, 108, 256, 40e6, "triton"),
    Card("H100", 90, 989e12, 3350e9, 132, 512, 50e6, "triton"),
)
# Cycles of a quarter of a multiprocessor for one warp's instruction (CUDA C++ Programming Guide, arithmetic
# throughput): one of issue for any; 4 lanes for exponentials; shared memory gives 128 bytes a cycle to all quarters, or
# shuffles 32 lanes.
EXPONENTIAL, SHARED_WAVE = 8, 4
# Assumed: for a block's warps to meet, and then to read what the others wrote; the slowest warp's lead is not in it.
BARRIER = 40


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
        """Keys once: blocks of one split run side by side and share them in the second-level cache."""
        return self.floor_bytes() + self.between(card)

    def between(self, card: Card) -> float:
        """The splits' parts, written and read: gradients twice, as the false negatives' part is added to each."""
        return 2 * self.splits(card) * self.B * (2 * 4 * self.D + 12 * self.L + 12)

    def block_rows(self, card: Card) -> int:
        return min(128, -(-self.B // 32) * 32) if card.backend == "cuda" else 64

    def splits(self, card: Card) -> int:
        resident = 4 if card.backend == "cuda" and self.B <= 32 else 2
        return max(1, resident * card.multiprocessors // -(-self.B // self.block_rows(card)))


# The loss's targets by estimate, microseconds, by card and number of queries.
TARGETS = {"V100": {256: 260, 32: 90}, "A100": {256: 110, 32: 50}, "H100": {256: 60, 32: 40}}
# Assumed: from one kernel's end to the next one's full speed, in one stream; and normalise's chain of reads.
START, CHAIN = 3e-6, 6e-6
# A pair is a false negative: half of the labels accepted, ImageNet's three levels, clusters of equal size.
FALSE_NEGATIVE = (1 / 25_000 + 1 / 50_000 + 1 / 100_000) / 4


def launches(shape: Loss, card: Card, share: tuple[float, float]) -> list[tuple[str, float, float, float]]:
    """Of the loss with the query's gradient: name, bytes, and seconds at the higher and the lower share of peak."""
    rows, grad = shape.block_rows(card), shape.splits(card) * shape.B * 4 * shape.D
    operations = shape.operations() * -(-shape.B // rows) * rows / shape.B
    flagged = 1 - (1 - FALSE_NEGATIVE) ** (rows * (32 if card.backend == "cuda" else 64))
    sums = shape.splits(card) * shape.B * (8 + 12 * shape.L)
    parts = (
        ("dense", operations, shape.floor_bytes() + grad, 0.0),
        ("marked sums", flagged * operations / 2, flagged * shape.floor_bytes() + sums, 0.0),
        ("normalise", 0.0, sums, CHAIN),
        ("marked gradient", flagged * operations, flagged * shape.floor_bytes() + 2 * grad, 0.0),
        ("add splits", 0.0, grad, 0.0),
    )
    best, worst = share if shape.B > 32 else (share[1], share[1])  # few warps: nothing overlaps
    found = []
    for name, work, size, wait in parts:
        least, most = (START + wait + max(work / card.tensor / s, size / card.memory) for s in (best, worst))
        found.append((name, size, least, most))
    return found


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
        on_cuda = card.backend == "cuda"
        name = "cuda assign confidence" if on_cuda else self.triton
        rows = 256 if on_cuda else tile_of("assign_clusters", torch.float16, divmod(card.capability, 10)).rows
        blocks = recorded()[name, "fp16", card.capability, 3].blocks
        waves = -(-self.N // (rows * blocks * card.multiprocessors))
        return self.floor_bytes() + (waves - 1) * 2 * self.D * self.C

    def between(self, card: Card) -> float:
        return 0.0


SHAPES: tuple[Loss | Assignment, ...] = (
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
    tensor_instructions: int
    shuffles: int
    barriers: int

    @staticmethod
    def of(body: list[str]) -> Mix:
        """Of these instructions, PTX or SASS."""
        shapes = [tuple(int(n) for n in found.groups() if n) for line in body if (found := MMA.search(line))]
        # m8n8k4 is four products of a warp; m64 is a product of four warps.
        products = sum(m * n * k * (4 if m == 8 else 1) // (4 if m == 64 else 1) for m, n, k in shapes)
        return Mix(
            products, sum("ex2" in line.lower() for line in body), sum(map(waves, body)),
            sum(not line.startswith("mov") for line in body), len(shapes),
            sum(bool(re.search(r"\bshfl\.", line, re.I)) for line in body), sum(map(is_barrier, body)),
        )  # fmt: skip

    def tensor_cycles(self, card: Card) -> float:
        return self.products / card.products

    def share(self, card: Card) -> tuple[float, float]:
        """Of the tensor cores' peak: units wholly overlapped, and tensor cores waiting for all others' issue."""
        tensor = self.tensor_cycles(card)
        shared = (self.shared_waves + self.shuffles) * SHARED_WAVE
        busiest = max(tensor, self.instructions, self.exponentials * EXPONENTIAL, shared)
        others = self.instructions - self.tensor_instructions
        return tensor / busiest, tensor / (tensor + others + self.barriers * BARRIER)


def mix_of(shape: Loss | Assignment, card: Card) -> Mix:
    return counted(shape.triton, shape.cuda, card)


@functools.cache
def counted(triton_kernel: str, cuda_kernel: tuple[str, str], card: Card) -> Mix:
    if card.backend == "triton":
        ptx = triton_ptx(triton_kernel, "fp16", card.capability, Shape())[0]
        return Mix.of(first_loop(sass_of(ptx)))
    header, kernel = cuda_kernel
    return Mix.of(hot(first_loop(only_entry(ptx_of(header, kernel, card.capability), re.split(r"::|<", kernel)[2]))))


def sass_of(ptx: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        assemble(ptx, triton.knobs.nvidia.ptxas.path, cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", cubin]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def first_loop(code: str) -> list[str]:
    """Lines of the first of the outermost loops that multiply on tensor cores; a later one does the last tile."""
    lines = [line.strip() for line in code.splitlines()]
    labels = {line.partition(":")[0]: i for i, line in enumerate(lines) if re.match(r"[$.]\w+:", line)}
    jumps = [(i, target) for i, line in enumerate(lines) for target in re.findall(r"\bbra\b.*?([$.]L\w+)", line, re.I)]
    loops = [(labels[target], i) for i, target in jumps if labels[target] < i]
    loops = [(a, b) for a, b in loops if any(MMA.search(line) for line in lines[a:b])]
    first, last = min(loops, key=lambda loop: (loop[0], -loop[1]))
    body = lines[first : last + 1]
    sass = [found.group(1) for line in body if (found := re.match(r"/\*[0-9a-f]{4,}\*/\s*(.*;)", line))]
    return sass or body


def waves(line: str) -> int:
    """Times 128 bytes that a warp's access to shared memory takes: by PTX's .v4 or .x4, SASS's .M88.4 or .128."""
    if not re.search(r"\.shared|\b(LDS|STS|LDGSTS|LDSM)\b", line):
        return 0
    if bits := re.search(r"\.(64|128)\b", line):
        return int(bits.group(1)) // 32
    words = re.search(r"\.(?:[vx]|\w+88\.)([24])\b", line)
    return int(words.group(1)) if words else 1


def is_barrier(line: str) -> bool:
    """Of the whole block, in PTX or SASS."""
    return bool(re.search(r"\b(bar(rier)?(\.cta)?\.(sync|red)|BAR\.(SYNC|RED))\b", line))


def hot(loop: list[str]) -> list[str]:
    """PTX's instructions without the basic blocks that load rows anew, 32 bits at a time (on Volta: 16 loads, kept)."""
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
    header = (
        "shape", "card, backend", "floor, operations", "floor, bytes", "traffic / floor", "of it in between (cache)",
        "share of peak",
    )  # fmt: skip
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
                    f"{shape.traffic(card) / shape.floor_bytes():.2f}",
                    f"{shape.between(card) / 1e6:.0f} MB ({card.cache / 1e6:.0f} MB)", f"{worst:.0%} to {best:.0%}",
                )
            )  # fmt: skip
    return lines


ESTIMATES = (
    "The loss with the query's gradient, K=65,536 D=128 L=3, float16, launch by launch: at each, "
    f"{START * 1e6:.0f} us to start and, of normalise, {CHAIN * 1e6:.0f} us of reads that wait for each other, both "
    "assumed; then the longer of operations, at the share of peak above, and bytes at the memory's rate, as if no "
    "cache kept any. Tiles are visited again as often as clusters of equal size, half of the labels accepted, flag "
    "them. Nothing here was timed on a card."
)


def host_time() -> str:
    """What bench/host_time.py last wrote."""
    last = json.loads((RESULT.parent / "host_time.json").read_text())
    times = last["microseconds"]
    each = ", ".join(
        f"{times[f'{backend} forward']} us to go forward and {times[f'{backend} and backward']} with the way back by "
        f"{backend}"
        for backend in ("cuda", "triton")
    )
    return (
        f"The host's own time, beside all that: {each} (`python bench/host_time.py --write`, {last['date']}, "
        f"{last['CPU']}, torch {last['torch']}: process time, tensors on the CPU, launches that do nothing)."
    )


def estimates() -> list[str]:
    header = ("B", "card, backend", "launch", "bytes", "estimate", "target")
    lines = [row(*header), row(*["---"] * len(header))]
    for shape in (shape for shape in SHAPES[:2] if isinstance(shape, Loss)):
        for card in CARDS:
            parts = launches(shape, card, mix_of(shape, card).share(card))
            name = f"{card.name}, {card.backend}"
            lines += [
                row(shape.B, name, part, f"{size / 1e6:.1f} MB", f"{best * 1e6:.0f} to {worst * 1e6:.0f} us", "")
                for part, size, best, worst in parts
            ]
            best, worst = 1e6 * sum(part[2] for part in parts), 1e6 * sum(part[3] for part in parts)
            target = TARGETS[card.name][shape.B]
            met = "met" if worst <= target else "missed" if best > target else "met at best"
            size = f"{sum(part[1] for part in parts) / 1e6:.1f} MB"
            estimate = f"{best:.0f} to {worst:.0f} us"
            lines.append(row(shape.B, name, f"all {len(parts)}", size, estimate, f"{target} us: {met}"))
    return lines


def mixes() -> list[str]:
    header = (
        "kernel", "card, backend", "tensor cycles", "instructions", "tensor instructions", "exponentials",
        "shared-memory waves", "shuffles", "barriers",
    )  # fmt: skip
    lines = [row(*header), row(*["---"] * len(header))]
    for shape in (SHAPES[0], SHAPES[3]):
        for card in CARDS:
            mix = mix_of(shape, card)
            numbers = (
                mix.tensor_cycles(card), mix.instructions, mix.tensor_instructions, mix.exponentials, mix.shared_waves,
                mix.shuffles, mix.barriers,
            )  # fmt: skip
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
    text = "\n".join([*title, *table(), *between, *mixes(), "", ESTIMATES, "", *estimates(), "", host_time()]) + "\n"
    print(text)
    RESULT.write_text(text)


if __name__ == "__main__":
    main()
