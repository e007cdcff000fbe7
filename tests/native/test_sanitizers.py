"""The programs beside this file, built with sanitizers, for each instruction set."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

_cpu = pytest.importorskip("ifnd_fast._cpu", reason="the extension is not built")
from tests.native import programs  # noqa: E402
from tests.native.programs import isas_of_programs  # noqa: E402


def build(sanitizers: str, folder: Path, *names: str, only: Sequence[str] = ()) -> Path:
    try:
        return programs.build(sanitizers, folder, *names, only=only)
    except programs.NoSanitizer as error:
        pytest.skip(f"the compiler has no sanitizer runtime: {error}")


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory) -> Path:
    return build(programs.MEMORY, tmp_path_factory.mktemp("sanitized"), "driver", "fuzz", "overrun")


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them builds the programs
@pytest.mark.parametrize("isa", isas_of_programs())
def test_sanitized(isa, sanitized):
    done = programs.run(sanitized / "driver", isa, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    name, _, error = done.stdout.split()
    assert name == isa
    assert float(error) <= 1.1, "exp.h states its error"


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them builds the programs
@pytest.mark.parametrize("isa", isas_of_programs())
def test_fuzzed(isa, sanitized):
    """Every entry point against float64; tests/native/README.md has the long run."""
    done = programs.run(sanitized / "fuzz", isa, "--calls", "1500", timeout=250)
    assert done.returncode == 0, done.stderr[:3000] + done.stderr[-3000:]
    name, _, calls, _, values, *_ = done.stdout.split()
    assert name == isa and int(calls) >= 1500 and int(values) > 10**6


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them builds the programs
@pytest.mark.parametrize("buffer", ["0", "1", "2"])
def test_a_touch_past_a_buffer_is_stopped(buffer, sanitized):
    assert programs.run(sanitized / "overrun", None, "-1", buffer).stdout == "1\n"
    for past in ("0", "1", "63", "4000"):
        done = programs.run(sanitized / "overrun", None, past, buffer)
        assert done.returncode != 0 and "AddressSanitizer: use-after-poison" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them builds the programs
def test_no_data_races(tmp_path):
    # What remains outside parallel.h's annotations is the compiler's own record of a parallel region.
    (tmp_path / "suppressions").write_text("race_top:_omp_fn\n")
    environment = {**os.environ, "TSAN_OPTIONS": f"suppressions={tmp_path / 'suppressions'}"}
    isa = _cpu.isa()  # the threads are the same for each
    driver = build("thread", tmp_path / "build", "driver", only=[isa]) / "driver"
    done = subprocess.run(
        [str(driver)], env=environment | {"IFND_FAST_CPU_ISA": isa}, capture_output=True, text=True, timeout=250
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address space randomisation is more than the sanitizer's runtime knows")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_kernel_objects_share_no_code(sanitized):
    """The linker would merge two instruction sets' copies of a weak symbol (a header's inline function)."""
    for isa in isas_of_programs():
        (object_file,) = sanitized.glob(f"CMakeFiles/kernels_{isa}.dir/**/*.o")
        symbols = subprocess.run(["nm", str(object_file)], check=True, capture_output=True, text=True).stdout
        weak = [line.split()[-1] for line in symbols.splitlines() if line.split()[-2] in "WwVvu"]
        assert not [name for name in weak if f"4ifnd{len(isa)}{isa}" not in name and "san_" not in name], weak
