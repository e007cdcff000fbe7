"""python bench/cpu.py: run the benches, and write what they measured against their floors and targets.

Writes bench/results/cpu-KIND.md of this kind of CPU. Let the machine be idle: the figures are ratios within this run.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peak_memory
import tyro
from tables import environment, installed, results_of, table, told

QUEUE = "queue: B=256 K=65536 D=128 L=3 eliminate"
PEAK = "peak: multiply-adds in registers"
MATRIX_BYTES = 4 * 256 * 65536
LARGE, MEDIUM = "N=100,000 C=3,000 D=128", "N=50,000 C=1,000 D=128"
OTHERS = (
    "N=40,000 C=3,000 D=64", "N=20,000 C=3,000 D=256", "N=10,000 C=2,000 D=768", "N=2,000 C=3,000 D=2048",
    "N=20,000 C=25,000 D=128",
)  # fmt: skip


@dataclass
class Options:
    """Run the benches and write bench/results/cpu-KIND.md."""

    runs: int = 2
    """runs of all benches, some six minutes each; a row's figure is the least of its medians"""
    read: tuple[Path, ...] = ()
    """files that pytest bench/ --benchmark-only --benchmark-json=FILE wrote, instead of new runs"""
    write: bool = True
    """write bench/results/cpu-KIND.md, besides printing it"""


class Run:
    """Groups of rows: seconds (the least of the reports' medians), operations and threads of each."""

    def __init__(self, reports: list[dict[str, Any]]) -> None:
        self.machine = reports[-1]["machine_info"]
        self.date = reports[-1]["datetime"][:10]
        self.groups: dict[str, dict[str, dict[str, Any]]] = {}
        for bench in (bench for report in reports for bench in report["benchmarks"]):
            info, seconds = bench["extra_info"], bench["stats"]["median"]
            if info["device"] == "cpu":
                rows = self.groups.setdefault(bench["group"], {})
                row = rows.setdefault(info["row"], {**info, "seconds": seconds})
                row["seconds"] = min(row["seconds"], seconds)

    def seconds(self, group: str, row: str = "fused") -> float:
        return self.groups[group][row]["seconds"]

    def speed(self, group: str, row: str) -> float:
        """Operations per second of the matrix products."""
        return self.groups[group][row]["operations"] / self.seconds(group, row)

    def peak(self, dtype: str = "float32", threads: int = 2) -> float:
        row = f"{dtype}, {threads} threads"
        return self.speed(PEAK, row) if row in self.groups[PEAK] else self.peak("float32", threads)

    def peers(self, group: str, kind: str) -> float:
        """The fastest of the rows of that kind, whatever its queue's layout."""
        return min(row["seconds"] for name, row in self.groups[group].items() if name.startswith(kind))


def new_report() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-q", "--benchmark-only"]
        subprocess.run([*command, f"--benchmark-json={out}"], check=True, env=environment())
        return json.loads(out.read_text())


def loss_targets(run: Run) -> list[tuple[str, str, str]]:
    rows = []
    for dtype, most in (("float32", 1.5), ("bfloat16", 1.8)):
        group = f"{QUEUE}, {dtype}"
        floor = run.groups[group]["fused"]["operations"] / run.peak(dtype)
        ratio = run.seconds(group) / floor
        rows.append((f"{group}: time over its products at peak ({1e3 * floor:.1f} ms)", f"≤ {most}", f"{ratio:.2f}"))
    group = f"{QUEUE}, float32"
    for kind, least in (("compiled", 4), ("eager", 15)):
        rows.append(
            (
                f"{group}: faster than {kind}, best layout",
                f"≥ {least}",
                f"{run.peers(group, kind) / run.seconds(group):.1f}",
            )
        )
    one_level = run.seconds("queue: B=256 K=65536 D=128 L=1 eliminate, float32")
    attract = run.seconds("queue: B=256 K=65536 D=128 L=3 attract, float32")
    rows.append(("three levels over one", "≤ 1.10", f"{run.seconds(group) / one_level:.2f}"))
    rows.append(("attraction over elimination", "≤ 1.15", f"{attract / run.seconds(group):.2f}"))
    for n in (1024, 4096):
        group = f"in batch: B=K={n} D=128 L=3 eliminate, all gradients, float32"
        rows.append(
            (f"{group}: faster than compiled", "≥ 2", f"{run.seconds(group, 'compiled') / run.seconds(group):.1f}")
        )
    group = "in batch: B=K=4096 D=128 keep, all gradients, float32"
    torchs, what = "torch_linear_cross_entropy", f"{group}: faster than torch's linear_cross_entropy, the better way"
    there = any(name.startswith(torchs) for name in run.groups[group])
    faster = f"{run.peers(group, torchs) / run.seconds(group):.1f}" if there else "not there: pip install 'torch>=2.14'"
    return [*rows, (what, "", faster), *scaling_targets(run)]


def scaling_targets(run: Run) -> list[tuple[str, str, str]]:
    keys = run.groups["queue, number of keys: B=256 D=128 L=3 eliminate, float32"]
    counts = {int(row.removeprefix("K=").replace(",", "")): found["seconds"] for row, found in keys.items()}
    call = counts.pop(0)
    most = max(counts)

    def linear(fixed: float) -> str:
        per_key = (counts[most] - fixed) / most
        return " ".join(f"{(seconds - fixed) / (per_key * k):.2f}" for k, seconds in counts.items())

    what = f"time per key over that at K={most:,}, for K = " + ", ".join(f"{k:,}" for k in counts)
    threads = "queue, number of threads: B=256 K=65536 D=128 L=3 eliminate, float32"
    gain = run.seconds(threads, "1 threads") / run.seconds(threads, "2 threads")
    sizes, ratio = odd_sizes(run, "queue, odd sizes: L=3 eliminate, float32")
    return [
        (what, "0.85 to 1.15", linear(0.0)),
        (f"the same without the {1e3 * call:.2f} ms of a call with K=0", "", linear(call)),
        ("loss: 2 threads over 1", "≥ 1.8", f"{gain:.2f}"),
        (f"loss, odd sizes: {sizes}", "≥ 0.80", ratio),
    ]


def odd_sizes(run: Run, group: str) -> tuple[str, str]:
    """Speed of the first size over the mean of its two neighbours'."""
    odd, *others = list(run.groups[group])[:3]
    neighbours = sum(run.speed(group, row) for row in others) / len(others)
    return f"{odd} over the mean of {' and '.join(others)}", f"{run.speed(group, odd) / neighbours:.2f}"


def memory_targets() -> list[tuple[str, str, str]]:
    share = {name: peak_memory.in_subprocess(name, 65536) / MATRIX_BYTES for name in ("fused", "compiled", "eager")}
    others = ", ".join(f"{name} {100 * part:.0f}%" for name, part in share.items() if name != "fused")
    quadrupled = peak_memory.in_subprocess("fused", 262144) / MATRIX_BYTES
    what = "peak extra memory, share of a B x K float32 matrix at K=65536"
    return [
        (f"{what} ({others})", "< 2%", f"{100 * share['fused']:.2f}%"),
        ("the same at K=262144, in shares of that matrix at K=65536", "flat", f"{100 * quadrupled:.2f}%"),
    ]


def assignment_targets(run: Run) -> list[tuple[str, str, str]]:
    rows = []

    def faiss(size: str) -> float:
        return min(run.seconds(f"labels by {metric}: {size}", "faiss") for metric in ("inner_product", "l2"))

    for size in (LARGE, MEDIUM):
        group = f"labels and confidence: {size}"
        rows.append(
            (f"{group}, float32: share of the peak", "≥ 75%", f"{100 * run.speed(group, 'fused') / run.peak():.0f}%")
        )
        rows.append(
            (f"{group}, float32: faster than faiss's labels", "≥ 1.35", f"{faiss(size) / run.seconds(group):.2f}")
        )
    for size, least in [(LARGE, 2), (MEDIUM, 2), *((size, 1) for size in OTHERS)]:
        group = f"labels by inner_product: {size}"
        rows.append((f"{group}, float32: faster than faiss", f"≥ {least}", f"{faiss(size) / run.seconds(group):.2f}"))
    for size in OTHERS:
        group = f"labels and confidence: {size}"
        rows.append((f"{group}: faster than faiss's labels", "", f"{faiss(size) / run.seconds(group):.2f}"))
    for what in ("labels and confidence", "labels by inner_product"):
        halves = [run.seconds(f"{what}: {size}", "fused, bfloat16") for size in (LARGE, MEDIUM, *OTHERS)]
        floats = [run.seconds(f"{what}: {size}") for size in (LARGE, MEDIUM, *OTHERS)]
        most = max(half / single for half, single in zip(halves, floats, strict=True))
        rows.append((f"{what}: bfloat16's time over float32's, at most", "≤ 1", f"{most:.2f}"))
    for what in ("labels and confidence", "labels by inner_product"):
        group = f"{what}, number of threads: {LARGE}, float32"
        gain = run.seconds(group, "1 threads") / run.seconds(group, "2 threads")
        rows.append((f"{what}: 2 threads over 1", "≥ 1.8", f"{gain:.2f}"))
        sizes, ratio = odd_sizes(run, f"{what}, odd sizes, float32")
        rows.append((f"{what}, odd sizes: {sizes}", "≥ 0.80", ratio))
    return rows


def group_table(run: Run, group: str) -> list[str]:
    rows = []
    for name, row in run.groups[group].items():
        speed = share = ""
        if row.get("operations"):
            operations = row["operations"] / row["seconds"]
            dtype = "bfloat16" if "bfloat16" in row.get("dtype", name) else "float32"
            speed, share = f"{1e-9 * operations:.0f}", f"{100 * operations / run.peak(dtype, row['threads']):.0f}%"
        over = f"{row['seconds'] / run.seconds(group):.2f}" if "fused" in run.groups[group] else ""
        rows.append((name, f"{1e3 * row['seconds']:.2f}", speed, share, over))
    header = ("", "median ms", "GFLOP/s", "of peak", "over fused")
    return ["", f"**{group}**", "", *table(header, rows)]


def main(options: Options) -> None:
    read = [json.loads(file.read_text()) for file in options.read]
    run = Run(read or [new_report() for _ in range(options.runs)])
    machine = run.machine
    targets = loss_targets(run) + memory_targets() + assignment_targets(run)
    lines = [
        "# CPU kernels, measured",
        "",
        f"`python bench/cpu.py`, {run.date}. {told(machine)}. Python {platform.python_version()}, "
        + ", ".join(map(installed, ("torch", "faiss-gpu", "scikit-learn", "numpy")))
        + ".",
        "",
        f"Medians of calls of one process, the least of {len(read) or options.runs} runs: another guest of the same "
        "host can only slow a run down. GFLOP/s counts matrix products only; peak is "
        "what a loop that touches only registers reaches in the same run (bench/peak.cpp), of bfloat16 dot products "
        "for bfloat16 inputs. Labels alone are screened in 8-bit integers, so they can pass 100% of "
        "the peak. Memory is the growth of the resident peak (bench/peak_memory.py).",
        "",
        *table(("target", "", "measured"), targets),
        *(line for group in sorted(run.groups) for line in group_table(run, group)),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        results_of("cpu", machine["kind"]).write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
