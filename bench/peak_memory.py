"""python bench/peak_memory.py NAME K: bytes that one loss with its gradient takes beside its inputs.

NAME as in test_info_nce.py, B=256 D=128 L=3. Measured as growth of the process's resident peak, which Linux alone
lets a process reset.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys

import torch
from test_info_nce import PEERS, fused_with, implementation_of, queue_batch

B, D, LEVELS = 256, 128, 3


def resident_peak() -> int:
    with open("/proc/self/status") as status:
        return 1024 * int(status.read().partition("VmHWM:")[2].split()[0])


def new_peak() -> int:
    """The resident size now, from which the peak counts anew."""
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory would hide what a call takes
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident_peak()


def measure(name: str, keys: int) -> int:
    loss = fused_with("cpu") if name == "fused" else implementation_of(name, lambda *_: "cpu", torch.float32)

    def growth_of(K: int) -> int:
        batch = queue_batch(B, K, D, LEVELS, torch.float32, torch.device("cpu"))
        before = new_peak()
        torch.autograd.grad(loss(*batch[:3], *batch.labels_and_ids), batch.query)
        return resident_peak() - before

    growth_of(64)  # starts threads, loads what is loaded late
    if name.startswith("compiled"):
        growth_of(keys)  # compiles for this size
    return growth_of(keys)


def in_subprocess(name: str, keys: int) -> int:
    done = subprocess.run([sys.executable, __file__, name, str(keys)], check=True, capture_output=True, text=True)
    return int(done.stdout)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in PEERS:
        sys.exit(f"usage: python bench/peak_memory.py {{{','.join(PEERS)}}} K")
    print(measure(sys.argv[1], int(sys.argv[2])))
