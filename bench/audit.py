"""python bench/audit.py: compile every GPU kernel for every card, without a GPU, and table what came of it.

Writes bench/results/audit.md: registers, spills, stack, shared memory, blocks that fit a multiprocessor, and the tensor
core instruction, each as ptxas reports it or as it stands in the PTX. tests/gpu/test_audit.py fails when a kernel
differs from the committed table for the worse.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import tyro
from nvrtc import ptx_of, wheel_file
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ifnd_fast.kernels import assign_clusters, dense, info_nce, marked, negatives, normalise, tiles
from ifnd_fast.kernels.tiles import Tile

JSON = Path(__file__).parent / "results" / "audit.json"
CARDS = (70, 75, 80, 86, 89, 90, 100, 120)
TRITON_CARDS = CARDS[2:]
# Registers, KiB of shared memory and warps of a multiprocessor (CUDA C++ Programming Guide,
# table of technical specifications by compute capability).
REGISTERS = 65536
SHARED = {70: 96, 75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
WARPS = {70: 64, 75: 32, 80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Audit:
    """One kernel on one card."""

    kernel: str
    dtype: str
    card: int
    registers: int
    spills: int  # bytes stored and loaded
    stack: int  # bytes
    shared: int  # bytes
    blocks: int  # per multiprocessor
    tensor_core: str  # the instruction, or "" for none
    levels: int = 3

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.kernel, self.dtype, self.card, self.levels


@dataclass(frozen=True)
class Shape:
    """What is compiled in: rows of `dim` numbers, `levels` levels of labels."""

    dim: int = 128
    levels: int = 3
    combination: str = "mean"
    """of levels: mean, any or all"""

    @property
    def n_losses(self) -> int:
        return self.levels if self.combination == "mean" else 1


def kernels(dtype: torch.dtype, card: int, size: Shape) -> dict[str, tuple[Any, dict[str, Any], Tile]]:
    """Every kernel, by name: function, constants, warps and stages."""
    capability = divmod(card, 10)
    loss = tiles.tile_of("info_nce", dtype, capability, size.levels)
    nearest = tiles.tile_of("assign_clusters", dtype, capability)
    chunk, chunks = tiles.chunk_of(size.dim)
    of_rows = {"D": size.dim, "CHUNK": chunk, "CHUNKS": chunks}
    losses = {"N_LOSSES": size.n_losses, "PADDED": triton.next_power_of_2(size.n_losses), "HAS_MARKED_PASS": True}
    levels = {**losses, "L": size.levels, "ALL": size.combination == "all", "HAS_LABELS": True}
    products = {"PRECISION": "ieee", "HAS_IDS": True, "SHIFT": info_nce.shift_of(dtype), "WITH_GRAD": True}
    of_loss = {**of_rows, **levels, **products, "ROWS": loss.rows, "KEYS": loss.columns}
    of_marked = {**of_loss, "KEYS": loss.marked, "FLAG_KEYS": loss.columns}
    rows, numbers = normalise.ROWS_BY_SPLITS, normalise.NUMBERS_BY_SPLITS
    of_splits = {"ROWS": rows.rows, "SPLITS": rows.columns}
    out: dict[str, tuple[Any, dict[str, Any], Tile]] = {}
    for attract in (False, True):
        name = "attract" if attract else "eliminate"
        for kernel, constants, tile in (
            (dense.pass_kernel, {**of_loss, "PARTS": loss.parts_of(chunk, chunks)}, loss.of_pass),
            (marked.marked_sums_kernel, of_marked, loss),
            (normalise.normalise_kernel, {**of_rows, **losses, **of_splits}, rows),
            (marked.marked_grad_kernel, of_marked, loss),
            (negatives.negatives_grad_kernel, {**of_loss, "KEYS": loss.negatives}, loss),
        ):
            label = kernel.fn.__name__.removesuffix("_kernel")
            out[f"info_nce {label}, {name}"] = (kernel, {**constants, "ATTRACT": attract}, tile)
    constants = {"D": size.dim, "NUMBERS": numbers.rows, "SPLITS": numbers.columns, "SCALED": True}
    out["info_nce add_splits"] = (normalise.add_splits_kernel, constants, numbers)
    for with_confidence in (True, False):
        name = "labels and confidence" if with_confidence else "labels"
        constants = {**of_rows, "PRECISION": "ieee", "ROWS": nearest.rows, "COLUMNS": nearest.columns, "L2": True}
        with_its = {**constants, "WITH_CONFIDENCE": with_confidence}
        out[f"assign {name}"] = (assign_clusters.assign_kernel, with_its, nearest)
    few = assign_clusters.INFINITIES
    out["assign infinities"] = (
        assign_clusters.infinities_kernel, {**constants, "ROWS": few.rows, "COLUMNS": few.columns}, few,
    )  # fmt: skip
    return out


def signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """Argument types, by the arguments' names."""
    of_inputs = {"query", "positive", "negatives", "features", "centroids"}
    integers = {"query_labels": "*i32", "negative_labels": "*i32", "query_ids": "*i64", "negative_ids": "*i64",
                "labels": "*i32", "false_negative_counts": "*i32", "level_count": "*i32", "flags": "*i8"}  # fmt: skip
    numbers = {"B": "i32", "K": "i32", "N": "i32", "C": "i32", "split_keys": "i32", "split_rows": "i32", "tiles": "i32",
               "splits": "i32", "scale": "fp32", "inverse_temperature": "fp32"}  # fmt: skip
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in of_inputs:
            types[name] = f"*{dtype}"
        else:
            types[name] = integers.get(name) or numbers.get(name) or "*fp32"
    return types


@dataclass(frozen=True)
class CudaKernel:
    header: str  # in csrc/cuda
    expression: str
    warps: int
    shared: int  # bytes, as the launch asks for


def cuda_kernels(dtype: torch.dtype, card: int, size: Shape) -> dict[str, CudaKernel]:
    """Every kernel of csrc/cuda, by name."""
    if dtype == torch.bfloat16 and card < 80:
        return {}
    chunk, float32 = 64 if size.dim <= 64 else 128, dtype == torch.float32
    of_type = {torch.float16: "Half", torch.bfloat16: "Bfloat16", torch.float32: "TwoTerms"}[dtype]
    of_type = f"ifnd::cuda::{of_type}, {chunk}, ifnd::cuda"
    row = 2 * (chunk + 8)  # bytes in shared memory
    out = {}
    for mode in ("LABELS", "CONFIDENCE") + (("SCREEN",) if float32 else ()):
        kernel = f"ifnd::cuda::assign_kernel<{of_type}::Assign::{mode}>"
        out[f"cuda assign {mode.lower()}"] = CudaKernel("assign.h", kernel, 8, 2 * 16 * row)
    for step in ("DENSE", "MARKED_SUMS", "MARKED_GRAD", "NEGATIVES"):
        kernel = f"ifnd::cuda::info_nce_kernel<{of_type}::Pass::{step}>"
        warps = 4 if size.levels <= 4 else 2
        shared = (32 * warps + 32) * (row + 8 + 4 * size.levels) + 32 * (8 if float32 else 0)
        shared += {"MARKED_SUMS": 32 * warps * size.levels * 12, "NEGATIVES": 32 * 12}.get(step, 0)
        out[f"cuda info_nce {step.lower()}"] = CudaKernel("info_nce.h", kernel, warps, shared)
    out["cuda info_nce normalise"] = CudaKernel("normalise.h", "ifnd::cuda::normalise_kernel", 4, 0)
    out["cuda info_nce add_splits"] = CudaKernel("normalise.h", "ifnd::cuda::add_splits_kernel", 8, 1024)
    if float32:
        out["cuda two_terms"] = CudaKernel("two_terms.h", "ifnd::cuda::two_terms_kernel", 8, 0)
        out["cuda assign exact"] = CudaKernel("assign.h", "ifnd::cuda::exact_kernel", 8, 0)
    return out


def compile_one(name: str, dtype: str, card: int, size: Shape) -> Audit:
    if name.startswith("cuda "):
        kernel = cuda_kernels(DTYPES[dtype], card, size)[name]
        ptx = ptx_of(kernel.header, kernel.expression, card)
        ptx = only_entry(ptx, re.split(r"::|<", kernel.expression)[2])
        assembler = wheel_file("cuda_nvcc/bin/ptxas")
        return audit_of(name, dtype, card, ptx, assembler, kernel.warps, kernel.shared, size.levels)
    return compile_triton(name, dtype, card, size)


def only_entry(ptx: str, kernel: str) -> str:
    """Without the other kernels that the header defines."""
    head, *entries = re.split(r"(?=^\s*(?:\.visible |\.weak )?\.entry)", ptx, flags=re.MULTILINE)
    return head + next(entry for entry in entries if kernel in entry.partition("(")[0])


def compile_triton(name: str, dtype: str, card: int, size: Shape) -> Audit:
    program = triton.knobs.nvidia.ptxas_blackwell if card >= 100 else triton.knobs.nvidia.ptxas
    ptx, tile, shared = triton_ptx(name, dtype, card, size)
    return audit_of(name, dtype, card, ptx, program.path, tile.warps, shared, size.levels)


def triton_ptx(name: str, dtype: str, card: int, size: Shape) -> tuple[str, Tile, int]:
    """PTX, tile, and bytes of shared memory."""
    kernel, constants, tile = kernels(DTYPES[dtype], card, size)[name]
    types = signature(kernel, constants, dtype)
    # As at a launch: torch's memory is aligned to 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(kernel, types, {n: constants[n] for n in types if n in constants}, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}
    compiled = triton.compile(source, GPUTarget("cuda", card, 32), options)
    return compiled.asm["ptx"], tile, compiled.metadata.shared


def audit_of(
    name: str, dtype: str, card: int, ptx: str, assembler: str | Path, warps: int, shared: int, levels: int
) -> Audit:
    registers, spills, stack = ptxas(ptx, assembler)
    granted = -(-registers // 8) * 8 * 32 * warps  # registers are given out 8 at a time to each thread of a warp
    blocks = min(REGISTERS // granted, WARPS[card] // warps, SHARED[card] * 1024 // (shared + 1024), 32)
    found = re.search(r"\b(wgmma\.mma_async|tcgen05\.mma|mma)\.sync\.aligned\.m\w+|tcgen05\.mma", ptx)
    instruction = found.group() if found else ""
    return Audit(name, dtype, card, registers, spills, stack, shared, blocks, instruction, levels)


def assemble(ptx: str, assembler: str | Path, cubin: str | Path) -> str:
    """Write machine code for the PTX's own target; what `ptxas -v` reports."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [assembler, "-v", f"-arch={target}", str(source), "-o", str(cubin)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def ptxas(ptx: str, assembler: str | Path) -> tuple[int, int, int]:
    """Registers, bytes spilled (stores and loads) and bytes of stack."""
    report = assemble(ptx, assembler, os.devnull)
    return (
        max(map(int, re.findall(r"Used (\d+) registers", report))),
        sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        max(map(int, re.findall(r"(\d+) bytes stack frame", report))),
    )


@dataclass
class Options:
    """Compile every GPU kernel for every card and write bench/results/audit.md and audit.json."""

    cards: tuple[int, ...] = CARDS
    """compute capabilities, 80 for 8.0"""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    """of the inputs"""
    only: str = ""
    """kernels in whose name this regular expression is found"""
    jobs: int = os.cpu_count() or 1
    """compilations at a time"""
    size: Shape = Shape()
    """compiled in; with D=128 and the mean of levels the table's rows are renewed, others are printed alone"""
    compile_only: bool = False
    """write nothing: whether another Triton or toolkit takes the kernels"""
    check: bool = False
    """compare with audit.json, fail where a kernel is worse, and write nothing"""


def worse(now: Audit, before: Audit) -> list[str]:
    """In what a kernel is worse than the committed table says."""
    faults = [
        f"{field} {getattr(now, field)}, was {getattr(before, field)}"
        for field in ("spills", "stack", "shared")
        if getattr(now, field) > getattr(before, field)
    ]
    if now.blocks < before.blocks:
        faults.append(f"{now.blocks} blocks fit a multiprocessor, were {before.blocks}")
    if now.tensor_core != before.tensor_core:
        faults.append(f"tensor core instruction {now.tensor_core or 'none'}, was {before.tensor_core or 'none'}")
    return [f"{now.kernel}, {now.dtype}, sm_{now.card}, L={now.levels}: {fault}" for fault in faults]


def recorded() -> dict[tuple[str, str, int, int], Audit]:
    audits = [Audit(**row) for row in json.loads(JSON.read_text())] if JSON.exists() else []
    return {audit.key: audit for audit in audits}


def check(audits: list[Audit]) -> None:
    before = recorded()
    faults = [fault for now in audits for fault in worse(now, before[now.key])]
    print("\n".join(faults) or f"{len(audits)} kernels are as {JSON} says")
    sys.exit(bool(faults))


def names(dtype: torch.dtype, card: int, size: Shape) -> list[str]:
    of_triton = kernels(dtype, card, size) if card in TRITON_CARDS else {}
    return [*of_triton, *cuda_kernels(dtype, card, size)]


def main(options: Options) -> None:
    wanted = [
        (name, dtype, card, options.size)
        for card in options.cards
        for dtype in options.dtypes
        for name in names(DTYPES[dtype], card, options.size)
        if re.search(options.only, name)
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        audits = list(pool.map(compile_one, *zip(*wanted, strict=True)))
    if options.check:
        check(audits)
    text = table(audits, options.size)
    print(text)
    if options.compile_only:
        return
    if (options.size.dim, options.size.combination) != (Shape().dim, Shape().combination):
        return
    everything = list({**recorded(), **{audit.key: audit for audit in audits}}.values())
    everything.sort(key=lambda audit: (audit.levels, audit.card, list(DTYPES).index(audit.dtype)))
    JSON.with_suffix(".md").write_text(table(everything, options.size))
    JSON.write_text("[\n" + ",\n".join(json.dumps(asdict(audit)) for audit in everything) + "\n]\n")


def table(audits: list[Audit], size: Shape) -> str:
    header = (
        "kernel", "dtype", "sm", "registers", "spill bytes", "stack", "shared bytes", "blocks", "tensor core", "L",
    )  # fmt: skip
    lines = [
        "# GPU kernels as compiled",
        "",
        f"`python bench/audit.py`: Triton {triton.__version__} and NVRTC 12.9 (`cuda`), D={size.dim}, without a GPU. "
        "`blocks`: how many fit one multiprocessor by registers, warps and shared memory. `L`: levels of labels; the "
        "loss's kernels also with 16 (`--size.levels 16 --only info_nce`).",
        "",
        *("| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header))),
        *("| " + " | ".join(map(str, asdict(audit).values())) + " |" for audit in audits),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options))
