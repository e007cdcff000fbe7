"""AMX's tiles: the emulated unit that other tests run the kernels with, and what is compiled for the real one."""

from __future__ import annotations

import shutil
import subprocess

import pytest

pytest.importorskip("ifnd_fast._cpu", reason="the extension is not built")
from tests.native.cases import _cpu, run_python  # noqa: E402
from tests.native.programs import HERE, SOURCE, isas  # noqa: E402


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    if "avx2" not in isas():
        pytest.skip("tiles are emulated by AVX2")
    program = tmp_path_factory.mktemp("tiles") / "tiles"
    flags = ["-std=c++17", "-O1", "-Wno-psabi", "-mavx2", "-mfma", f"-I{SOURCE / 'cpu'}", f"-I{HERE}"]
    subprocess.run(["c++", *flags, str(HERE / "tiles.cpp"), "-o", str(program)], check=True)
    return lambda *faults: subprocess.run([program, *faults], capture_output=True, text=True)


def test_emulated_tiles_do_what_the_manual_says(tiles):
    done = tiles()
    assert done.returncode == 0 and done.stdout == "wrong 0\n", done.stdout


FAULTS = {
    "palette": "palette 1 is the only one",
    "size": "at most 16 rows of 64 bytes",
    "ninth": "there are 8 tiles",
    "reserved": "reserved bytes are not 0",
    "rows": "C and A have other numbers of rows",
    "columns": "C and B have rows of other lengths",
    "depth": "A's words are not B's rows",
    "same": "three different tiles",
    "other": "this tile is not configured",
    "unconfigured": "not configured",
    "released": "not configured",
    "twice": "an earlier kernel did not release them",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_emulated_tiles_end_what_would_fault(fault, tiles):
    done = tiles(fault)
    assert done.returncode != 0 and FAULTS[fault] in done.stderr


def test_kernels_have_the_instructions():
    """Of the extension itself, as it was compiled."""
    named = run_python("from ifnd_fast import _cpu; _cpu.isa()", IFND_FAST_CPU_ISA="amx").stderr
    if shutil.which("objdump") is None or "must be portable" in named:
        pytest.skip("no objdump, or a compiler that does not know AMX")
    code = subprocess.run(["objdump", "-d", _cpu.__file__], check=True, capture_output=True, text=True).stdout
    assert code.count("\ttdpbf16ps") >= 9  # blocks of 4, 2, 2 and 1 tiles
    assert code.count("\ttdpbssd") >= 4
    assert min(code.count(f"\t{name}") for name in ("ldtilecfg", "tilerelease")) >= 3  # forward, negatives, assignment
