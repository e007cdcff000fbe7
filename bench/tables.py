"""Tables of results, and the machine that they are of."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ifnd_fast.ops import backends


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    extension = backends.extension()
    return {
        "torch": torch.__version__,
        "CPU": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "instruction set": extension.isa() if extension else "extension not built",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
