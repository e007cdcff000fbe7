"""GPU kernels compile, and none worse than bench/results/audit.json records: here some of them for some cards; all by
`python bench/audit.py --check`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
AUDIT = Path(__file__).parents[2] / "bench" / "audit.py"


def test_no_kernel_spills():
    rows = json.loads((AUDIT.parent / "results" / "audit.json").read_text())
    assert {row["card"] for row in rows} == {70, 75, 80, 86, 89, 90, 100, 120}
    assert [row for row in rows if row["spills"] or row["stack"]] == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton and its ptxas come for Linux")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--cards", "90", "--dtypes", "fp16", "fp32"),
        ("--cards", "80", "86", "120", "--dtypes", "fp16", "--only", "pass"),
        ("--cards", "70", "75", "120", "--dtypes", "fp16", "fp32", "--only", "cuda info_nce"),
        ("--cards", "80", "--dtypes", "fp16", "fp32", "--only", "info_nce marked", "--size.levels", "16"),
    ],
    ids=" ".join,
)
def test_kernels_are_as_recorded(arguments):
    assert "kernels are as" in audit("--check", *arguments)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton and its ptxas come for Linux")
def test_other_sizes_compile():
    table = audit("--cards", "80", "--dtypes", "bf16", "--size.dim", "300", "--size.levels", "5")
    assert table.count("mma.sync.aligned.m16n8k16") >= 10 and "D=300" in table


def audit(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(AUDIT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC's wheel is for Linux")
@pytest.mark.parametrize("numbers", ["Half", "TwoTerms"])
def test_lanes_meet_before_they_multiply(numbers):
    """After the loop over levels, which lanes without false negatives leave early: mma.sync needs the whole warp."""
    kernel = f"ifnd::cuda::info_nce_kernel<ifnd::cuda::{numbers}, 64, ifnd::cuda::Pass::MARKED_GRAD>"
    code = f"from nvrtc import ptx_of; print(ptx_of('info_nce.h', {kernel!r}, 70))"
    done = subprocess.run([sys.executable, "-c", code], cwd=AUDIT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    entry = next(part for part in done.stdout.split(".entry")[1:] if "MARKED_GRAD" in part or "Pass" in part)
    assert "bar.warp.sync" in entry and "mma.sync" in entry.partition("bar.warp.sync")[2]
