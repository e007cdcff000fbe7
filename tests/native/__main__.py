"""python -m tests.native: builds fuzz.cpp with the sanitizers and runs it for each instruction set.

Those that this CPU has, and AMX with emulated tiles; with IFND_FAST_CPU_ISA set, that one alone. Options go on to it
(README.md).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.native.programs import MEMORY, build, isas_of_programs, run


def main() -> int:
    chosen = os.environ.get("IFND_FAST_CPU_ISA")
    with tempfile.TemporaryDirectory() as folder:
        programs = build(MEMORY, Path(folder), "fuzz")
        done = [
            run(programs / "fuzz", isa, *sys.argv[1:], capture=False)
            for isa in ([chosen] if chosen else isas_of_programs())
        ]
    return max(process.returncode for process in done)


if __name__ == "__main__":
    sys.exit(main())
