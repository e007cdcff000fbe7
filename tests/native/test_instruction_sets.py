"""The instruction set that is chosen, and the value tests with every lower one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.forked import python
from tests.native.cases import ROOT, _cpu, run_python
from tests.native.programs import HERE, SOURCE, isas, runs_amx


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """What a CPU with these facts gets."""
    program = tmp_path_factory.mktemp("choice") / "choice"
    source = [str(HERE / "choice.cpp"), f"-I{SOURCE / 'cpu'}"]
    subprocess.run(["c++", "-std=c++17", *source, "-o", str(program)], check=True)
    return lambda *facts: subprocess.run([program, *facts], check=True, capture_output=True, text=True).stdout.strip()


def test_the_choice_by_what_the_cpu_is(chosen):
    """Dot products of bfloat16 are slow on Intel's cores, and fast on AMD's."""
    avx512 = ("avx2", "avx512")
    assert chosen() == chosen("intel") == "portable"
    assert chosen("avx2") == chosen("avx2", "intel") == "avx2"
    assert chosen(*avx512) == chosen(*avx512, "avx512bf16") == "avx512"
    assert chosen("avx512", "avx512vnni") == "portable"
    assert chosen(*avx512, "avx512vnni") == chosen(*avx512, "avx512vnni", "intel") == "avx512vnni"
    assert chosen(*avx512, "avx512vnni", "avx512bf16") == "avx512bf16"
    assert chosen(*avx512, "avx512vnni", "avx512bf16", "intel") == "avx512vnni"
    assert chosen(*avx512, "avx512vnni", "avx512bf16", "amx", "intel") == "avx512vnni"  # amx never by default
    assert chosen(*avx512, "avx512vnni", "avx512bf16", "amx") == "avx512bf16"


def test_this_cpu_gets_what_is_chosen_for_it(chosen):
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "IFND_FAST_CPU_ISA" in os.environ:
        pytest.skip("no /proc/cpuinfo, or another set was asked for")
    intel = ["intel"] * ("GenuineIntel" in cpuinfo.read_text())
    assert _cpu.isa() == chosen(*isas()[1:], *intel)


VALUES = """
import sys, pytest
from ifnd_fast import _cpu
assert _cpu.isa() == sys.argv[1]
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("isa", [isa for isa in [*isas(), *["amx"] * runs_amx()] if isa != _cpu.isa()])
def test_other_instruction_sets(isa, monkeypatch):
    """The value tests again with each other one."""
    monkeypatch.setenv("IFND_FAST_CPU_ISA", isa)
    monkeypatch.chdir(ROOT)
    values = [HERE / name for name in ("test_info_nce.py", "test_assign.py")]
    done = python(VALUES, isa, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "test_values", *values)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_an_unknown_instruction_set_is_an_error():
    done = run_python("from ifnd_fast import _cpu; _cpu.isa()", IFND_FAST_CPU_ISA="sse9")
    assert done.returncode != 0 and "IFND_FAST_CPU_ISA must be portable, or on x86 also avx2" in done.stderr


def test_amx_is_refused_where_it_is_not():
    if _cpu.features().get("amx_int8"):
        pytest.skip("this CPU has it")
    done = run_python("from ifnd_fast import _cpu; _cpu.isa()", IFND_FAST_CPU_ISA="amx")
    assert done.returncode != 0
    built = "IFND_FAST_CPU_ISA=amx: this CPU does not have it" in done.stderr
    assert built or "or, where the compiler knew it, amx, got 'amx'" in done.stderr
