"""The instruction set that is chosen, and the value tests with every lower one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.native.cases import ROOT, _cpu, run_python
from tests.native.programs import HERE, isas


def test_the_best_instruction_set_is_chosen():
    if "IFND_FAST_CPU_ISA" not in os.environ:
        assert _cpu.isa() == isas()[-1]


@pytest.mark.parametrize("isa", [isa for isa in isas() if isa != _cpu.isa()])
def test_other_instruction_sets(isa):
    """The value tests again with each lower one."""
    values = [str(HERE / name) for name in ("test_info_nce.py", "test_assign.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "test_values", *values]
    environment = {**os.environ, "IFND_FAST_CPU_ISA": isa}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:]
    assert run_python("from ifnd_fast import _cpu; print(_cpu.isa())", IFND_FAST_CPU_ISA=isa).stdout.strip() == isa


def test_an_unknown_instruction_set_is_an_error():
    done = run_python("from ifnd_fast import _cpu; _cpu.isa()", IFND_FAST_CPU_ISA="sse9")
    assert done.returncode != 0 and "IFND_FAST_CPU_ISA must be portable, or on x86 also avx2" in done.stderr
