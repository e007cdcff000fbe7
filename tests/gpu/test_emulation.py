"""The emulated GPU that runs csrc/cuda in the tests: its barriers, votes, tensor cores, and the errors it finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import emulated

HOST = Path(__file__).parent / "host"


def test_emulated_gpu(tmp_path):
    program = tmp_path / "check"
    sources = [str(HOST / "check_emulation.cpp"), str(HOST / "emulation.cpp")]
    flags = ["-std=c++17", "-O1", "-g", "-DIFND_ON_HOST=Volta", "-o", str(program)]
    built = subprocess.run(["c++", *flags, *sources], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("ok: ") == 26, done.stdout + done.stderr


CASES = """
import sys, importlib, pytest, torch
import tests.gpu.emulated as emulated
from ifnd_fast import assign_clusters
from ifnd_fast.ops import launch
from tests.ops.cases import STRATEGIES, make_case

sys.path.insert(0, sys.argv[1])
emulated.use(pytest.MonkeyPatch(), importlib.import_module("_cuda_on_" + sys.argv[2]), sys.argv[2])

def apart(like, sizes):
    held = {name: torch.empty(size) for name, size in sizes.items()}
    return held, {name: numbers.data_ptr() for name, numbers in held.items()}


launch.buffers = apart  # that the sanitizer sees where each ends
for dtype in (torch.float16, torch.float32):
    for B, K, D, L in ((1, 1, 1, 1), (37, 150, 65, 3), (9, 70, 140, 16), (33, 64, 8, 5)):
        for strategy in STRATEGIES:
            make_case(B, K, D, L, dtype=dtype, false_negatives=strategy).check("cuda")
    make_case(33, 64, 8, 5, dtype=dtype, false_negatives="attract", level_combination="all").check("cuda")
    for N, C, D in ((1, 1, 1), (37, 53, 33), (257, 17, 300)):
        for metric in ("inner_product", "l2"):
            x, c = torch.randn(N, D).to(dtype), torch.randn(C, D).to(dtype)
            assign_clusters(x, c, metric=metric, backend="cuda")
            assign_clusters(x, c, metric=metric, return_confidence=False, backend="cuda")
print("all right")
"""


@pytest.mark.slow
def test_no_kernel_reads_or_writes_out_of_bounds(tmp_path):
    """Under the address sanitizer, which knows where each tensor's memory ends."""
    libraries = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("the compiler has no address sanitizer runtime")
    core = "Volta"
    emulated.build(tmp_path, f"{emulated.QUICK} -g1 -fsanitize=address", (core,))
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # fibers have stacks of their own
        "PYTHONPATH": str(emulated.ROOT),
    }
    command = [sys.executable, "-c", CASES, str(tmp_path), core]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("all right\n"), done.stdout + done.stderr[-3000:]
