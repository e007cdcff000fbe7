"""peak.cpp, compiled for this CPU and run: the floor that a kernel made of products can't go below."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peak.so"
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-o", str(out)]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, str(Path(__file__).with_suffix(".cpp"))], check=True)
        return ctypes.CDLL(str(out))


def run_products(kind: str, repeats: int, threads: int) -> float:
    """Floating point operations done by `threads` threads at once: kind is "float32", or "bfloat16" (0: none such)."""
    function = getattr(_library(), f"{kind}_products")  # ctypes releases the interpreter's lock
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int64, ctypes.POINTER(ctypes.c_float)]
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda _: function(repeats, ctypes.c_float()), range(threads)))
