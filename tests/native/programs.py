"""Builds the C++ programs beside this file with sanitizers, and runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ifnd_fast import _cpu

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent.parent / "csrc"
MEMORY = "address,undefined,float-cast-overflow"
# No leak check: it needs ptrace, which containers often forbid, and OpenMP's pool would count.
SETTINGS = {
    "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1",
    "OMP_WAIT_POLICY": "passive",  # threads that wait leave a busy machine to others
}  # fmt: skip


class NoSanitizer(Exception):
    """The compiler lacks the sanitizers' runtime."""


def isas() -> list[str]:
    """The instruction sets that the kernels are compiled for and this CPU has, the best last."""
    features = _cpu.features()
    avx2 = all(features.get(part) for part in ("avx2", "fma", "f16c"))
    avx512 = avx2 and all(features[f"avx512{part}"] for part in ("f", "bw", "dq", "vl"))
    better = [name for name in ("avx512vnni", "avx512bf16") if avx512 and features[name]]
    return ["portable", *["avx2"] * bool(avx2), *["avx512"] * bool(avx512), *better]


def runs_amx() -> bool:
    """Whether this CPU has it, the compiler knew it, and the operating system permits it."""
    if not _cpu.features().get("amx_int8"):
        return False
    command = [sys.executable, "-c", "from ifnd_fast import _cpu; _cpu.isa()"]
    environment = {**os.environ, "IFND_FAST_CPU_ISA": "amx"}
    return subprocess.run(command, env=environment, cwd=SOURCE.parent, capture_output=True).returncode == 0


def isas_of_programs() -> list[str]:
    """Those, and AMX's kernels, whose tiles the programs emulate."""
    return [*isas(), *["amx"] * ("avx2" in isas())]


def build(sanitizers: str, folder: Path, *programs: str, only: Sequence[str] = ()) -> Path:
    """Compiles tests/native/PROGRAM.cpp and the kernels with these checks; returns `folder`, where the programs are.

    Args:
        only: these instruction sets' kernels; none: of all that the programs can run here.

    Raises:
        NoSanitizer: the compiler can't link such a program.
        RuntimeError: the build failed.
    """
    probe = ["c++", f"-fsanitize={sanitizers}", "-x", "c++", "-", "-o", os.devnull]
    done = subprocess.run(probe, input="int main() {}", text=True, capture_output=True)
    if done.returncode != 0:
        raise NoSanitizer(done.stderr[-200:])
    flags = f"-O1 -g1 -fsanitize={sanitizers} -fno-sanitize-recover=all -I{SOURCE / 'cpu'}"
    configure = [
        *("cmake", "-G", "Ninja", "-S", str(SOURCE), "-B", str(folder)),
        *("-DCMAKE_BUILD_TYPE=None", "-DIFND_MODULE=none"),
        f"-DIFND_EMULATED_TILES={next((isa for isa in ('avx512bf16', 'avx2') if isa in isas()), '')}",
        f"-DIFND_ONLY={';'.join(only or isas_of_programs())}",
        f"-DIFND_DRIVERS={';'.join(str(HERE / program) + '.cpp' for program in programs)}",
        f"-DCMAKE_CXX_FLAGS={flags}",
    ]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
    return folder


def run(
    program: Path, isa: str | None, *arguments: str, capture: bool = True, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """The program with this instruction set (None: the best)."""
    environment = {**os.environ, **SETTINGS}
    environment.pop("IFND_FAST_CPU_ISA", None)
    environment |= {} if isa is None else {"IFND_FAST_CPU_ISA": isa}
    command = [str(program), *arguments]
    return subprocess.run(command, env=environment, capture_output=capture, text=True, timeout=timeout)
