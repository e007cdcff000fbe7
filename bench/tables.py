"""Tables of results, and the machine that they are of."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from ifnd_fast.ops import backends

RESULTS = Path(__file__).parent / "results"


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]


def installed(package: str) -> str:
    """Its name and version."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def machine() -> dict[str, Any]:
    cpu = cpu_facts()
    extension = backends.extension()
    return {
        "torch": torch.__version__,
        "CPU": cpu.get("model name") or platform.processor() or platform.machine(),
        "kind": kind_of(cpu),
        "threads": torch.get_num_threads(),
        "instruction set": extension.isa() if extension else "extension not built",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def told(machine: dict[str, Any]) -> str:
    """A machine, in words."""
    what = f"{machine['CPU']} ({machine['kind']}), {machine['threads']} threads"
    return f"{what}, kernels for {machine['instruction set']}"


def results_of(name: str, kind: str) -> Path:
    """Where the tables `name` of that kind of CPU are kept: those of others stay beside them."""
    return RESULTS / f"{name}-{kind}.md"


def environment() -> dict[str, str]:
    """Of a process that peers compute in: as many threads as here, and BLAS at its best. The OpenBLAS that faiss
    brings (0.3.15) takes kernels of 2004 on CPUs that it doesn't know."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    flags = cpu_facts().get("flags", "").split()
    best = next((kernels for flag, kernels in (("avx512bw", "SkylakeX"), ("avx2", "Haswell")) if flag in flags), None)
    chosen = {"OPENBLAS_CORETYPE": best} if best else {}
    return {**kept, **chosen, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def precision() -> Literal["auto", "bf16", "off"]:
    """--amp, one for all runs that are compared: on a CPU each would measure by itself what is faster."""
    return "auto" if torch.cuda.is_available() else "bf16" if backends.cpu_has_bfloat16() else "off"


# ---- the CPU ----

ZEN = {  # AMD's families, and the first model of each kind: clouds call them all "AMD EPYC"
    23: ((0x00, "zen"), (0x30, "zen2")),
    25: ((0x00, "zen3"), (0x10, "zen4"), (0x20, "zen3"), (0x60, "zen4")),
    26: ((0x00, "zen5"),),
}


def cpu_facts() -> dict[str, str]:
    """What the system tells of the first CPU, by name; empty where there is no /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def kind_of(cpu: dict[str, str]) -> str:
    """One short name for CPUs that compute alike: zen4, amx (Intel's with matrix units), avx512, avx2, ..."""
    if cpu.get("vendor_id") == "AuthenticAMD" and (kinds := ZEN.get(int(cpu["cpu family"]))):
        return [kind for first, kind in kinds if first <= int(cpu["model"])][-1]
    flags = cpu.get("flags", "").split()
    units = (("amx_tile", "amx"), ("avx512f", "avx512"), ("avx2", "avx2"))
    return next((kind for flag, kind in units if flag in flags), platform.machine())
