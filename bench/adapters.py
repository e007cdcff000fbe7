"""python bench/adapters.py: time and memory of the adapters' losses beside those that they stand in for.

Prints a table, and with --write writes bench/results/adapters.md. The times want an idle machine; --no-times leaves
them out. Needs the extras lightly and metric-learning.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from peak_memory import new_peak, resident_peak
from tables import machine, table
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "adapters.md"
DIM, ROUNDS = 128, 5
CASES = {  # adapter, loss, rows, its settings
    "lightly NTXentLoss, bank of 65,536 rows": ("lightly", "NTXentLoss", 256, {"memory_bank_size": (65536, DIM)}),
    "lightly NTXentLoss, in the batch": ("lightly", "NTXentLoss", 1024, {}),
    "pytorch-metric-learning NTXentLoss": ("metric_learning", "NTXentLoss", 512, {}),
    "pytorch-metric-learning SupConLoss": ("metric_learning", "SupConLoss", 4096, {}),
}


def loss_of(case: str, ours: bool) -> Callable[[Tensor], Tensor]:
    """A loss of rows (B, D): two views of 256 images, say, are 512 rows."""
    adapter, name, n_rows, settings = CASES[case]
    if adapter == "lightly":
        import lightly.loss as theirs

        import ifnd_fast.integrations.lightly as adapted

        loss = getattr(adapted if ours else theirs, name)(**settings)
        return lambda rows: loss(rows, rows.roll(1, 0).detach() if settings else rows.roll(1, 0))
    from pytorch_metric_learning import losses

    from ifnd_fast.integrations import metric_learning

    loss, labels = getattr(metric_learning if ours else losses, name)(), torch.arange(n_rows // 2).repeat(2)
    return lambda rows: loss(rows, labels)


def measure(case: str, ours: bool) -> tuple[float, float]:
    """Median seconds of a loss with its gradient, and megabytes at the peak beside the rows and the bank."""
    loss, n_rows = loss_of(case, ours), CASES[case][2]

    def step() -> tuple[float, float]:
        rows = torch.randn(n_rows, DIM).requires_grad_()
        before, started = new_peak(), time.perf_counter()
        loss(rows).backward()
        return time.perf_counter() - started, (resident_peak() - before) / 1e6

    step()  # starts threads, loads what is loaded late
    seconds, megabytes = zip(*(step() for _ in range(ROUNDS)), strict=True)
    return statistics.median(seconds), statistics.median(megabytes)


def rows(times: bool) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for case, (_, _, n_rows, _) in CASES.items():
        measured = []
        for who in ("ours", "theirs"):
            command = [sys.executable, __file__, "--case", case, who]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            measured.append([float(word) for word in done.stdout.split()[-2:]])
        (time_of_ours, memory_of_ours), (time_of_theirs, memory_of_theirs) = measured
        memory = f"{memory_of_ours:,.0f}", f"{memory_of_theirs:,.0f}"
        found.append((case, f"{n_rows:,}", *memory))
        if times:
            found[-1] += f"{1e3 * time_of_ours:.1f}", f"{1e3 * time_of_theirs:.1f}"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write bench/results/adapters.md")
    parser.add_argument("--no-times", action="store_true", help="memory alone, on a machine that is not idle")
    parser.add_argument("--case", nargs=2, metavar=("CASE", "WHO"), help="measure one, in this process")
    options = parser.parse_args()
    if options.case:
        print(*measure(options.case[0], options.case[1] == "ours"))
        sys.exit()
    told = machine()
    header = ("loss and gradient", "rows", "peak MB beside rows and bank", "theirs", "ms", "theirs")
    command = "python bench/adapters.py --write" + " --no-times" * options.no_times
    packages = ", ".join(f"{name} {version(name)}" for name in ("lightly", "pytorch-metric-learning", "torch"))
    text = "\n".join(
        [
            "# The adapters beside what they stand in for\n",
            f"`{command}`, {datetime.date.today()}. {told['CPU']}, {told['threads']} threads, "
            f"kernels for {told['instruction set']}. {packages}. float32, D={DIM}, medians of {ROUNDS}.\n",
            *table(header[: 4 if options.no_times else 6], rows(not options.no_times)),
            "",
        ]
    )
    print(text)
    if options.write:
        RESULTS.write_text(text)
