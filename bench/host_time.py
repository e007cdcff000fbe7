"""python bench/host_time.py: what the host takes for the GPU backends' loss and gradient, kernels aside.

Launches do nothing here and tensors lie on the CPU, so that it runs without a GPU: checks, dispatch, autograd,
allocations, addresses, and of Triton all but the call of its launcher, some microseconds a kernel. Microseconds of
process time, the least and the median of 400 rounds of 5 calls: the least is what a busy machine disturbs last. To
compare two versions run them in turns. `--write` keeps it in bench/results/host_time.json, for bench/roofline.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tables
import torch

from ifnd_fast import info_nce
from ifnd_fast.ops import backends, checks, launch

RESULT = Path(__file__).parent / "results" / "host_time.json"
ROUNDS, CALLS = 400, 5
FUNCTIONS = ("info_nce", "info_nce_normalise", "info_nce_add_splits", "two_terms")
MULTIPROCESSORS = 80


def nothing(*_: object, **__: object) -> None:
    pass


def launch_nothing() -> None:
    launch._cuda = SimpleNamespace(**dict.fromkeys(FUNCTIONS, nothing))  # type: ignore[assignment]
    launch.stream = lambda device: 0
    launch.multiprocessors = lambda device: MULTIPROCESSORS  # type: ignore[assignment]
    checks.label_range = nothing  # of labels on a GPU there is none
    backends.FUSED["cuda"] = backends.FUSED["cuda"]._replace(refuses=lambda device, dtype: None)


def launch_nothing_by_triton() -> None:
    """Every launch finds its arguments' types and the compiled kernel as ever, a kernel that does nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    from ifnd_fast.kernels import info_nce as kernels

    empty = SimpleNamespace(launch_metadata=nothing, run=nothing, function=0, packed_metadata=())

    def compile_nothing(function: Any, key: str, _: object, device: int, *rest: object) -> object:
        function.device_caches[device][0][key] = empty
        return empty

    jit.JITFunction._do_compile = compile_nothing
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 80, 32),
        )
    )
    kernels.multiprocessors = lambda device: MULTIPROCESSORS
    kernels.capability_of = lambda device: (8, 0)
    backends.FUSED["triton"] = backends.FUSED["triton"]._replace(refuses=lambda device, dtype: None)


def microseconds(function: Callable[[], object]) -> list[float]:
    def once() -> float:
        begin = time.process_time()
        for _ in range(CALLS):
            function()
        return (time.process_time() - begin) / CALLS * 1e6

    once()
    return [once() for _ in range(ROUNDS)]


def steps(backend: str) -> dict[str, Callable[[], object]]:
    """By name: the loss with its gradient to come, and both."""
    B, K, D, L = 32, 4096, 128, 3
    query, positive, negatives = (torch.randn(n, D).half() for n in (B, B, K))
    labels = [torch.zeros(n, L, dtype=torch.int32) for n in (B, K)]
    ids = [torch.arange(n) for n in (B, K)]
    query.requires_grad_()

    def forward() -> torch.Tensor:
        return info_nce(
            query, positive, negatives, query_labels=labels[0], negative_labels=labels[1], query_ids=ids[0],
            negative_ids=ids[1], backend=backend,
        )  # fmt: skip

    return {"forward": forward, "and backward": lambda: torch.autograd.grad(forward(), query)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results/host_time.json")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    launch_nothing()
    launch_nothing_by_triton()
    figures = {}
    for backend in ("cuda", "triton"):
        for name, function in steps(backend).items():
            times = microseconds(function)
            figures[f"{backend} {name}"] = round(min(times))
            print(f"{backend} {name}: {min(times):.0f} us at least, {statistics.median(times):.0f} in the median")
    if write:
        machine = {"CPU": tables.machine()["CPU"], "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        RESULT.write_text(json.dumps({**machine, "microseconds": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
