"""The emulated GPU that runs csrc/cuda in the tests: its barriers, votes, tensor cores, and the errors it finds."""

from __future__ import annotations

import subprocess
from pathlib import Path

HOST = Path(__file__).parent / "host"


def test_emulated_gpu(tmp_path):
    program = tmp_path / "check"
    sources = [str(HOST / "check_emulation.cpp"), str(HOST / "emulation.cpp")]
    flags = ["-std=c++17", "-O1", "-g", "-DIFND_ON_HOST=Volta", "-o", str(program)]
    built = subprocess.run(["c++", *flags, *sources], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("ok: ") == 14, done.stdout + done.stderr
