"""python bench/host_time.py: what the host takes for the cuda backend's loss and gradient, kernels aside.

The extension's functions do nothing here and tensors lie on the CPU, so that it runs without a GPU: checks, dispatch,
autograd, allocations, addresses. Microseconds of process time, the least and the median of 15 rounds. On a busy machine
compare two versions in turns: only the ratio counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from ifnd_fast import info_nce
from ifnd_fast.ops import backends, launch

ROUNDS, CALLS = 15, 40
FUNCTIONS = ("info_nce", "info_nce_normalise", "info_nce_add_splits", "two_terms")


def launch_nothing() -> None:
    def nothing(**arguments: object) -> None:
        pass

    launch._cuda = SimpleNamespace(**dict.fromkeys(FUNCTIONS, nothing))  # type: ignore[assignment]
    launch.stream = lambda device: 0
    launch.multiprocessors = lambda device: 80  # type: ignore[assignment]
    backends.FUSED["cuda"] = backends.FUSED["cuda"]._replace(refuses=lambda device, dtype: None)


def microseconds(function: Callable[[], object]) -> list[float]:
    def once() -> float:
        begin = time.process_time()
        for _ in range(CALLS):
            function()
        return (time.process_time() - begin) / CALLS * 1e6

    once()
    return [once() for _ in range(ROUNDS)]


def main() -> None:
    torch.set_num_threads(1)
    launch_nothing()
    B, K, D, L = 32, 4096, 128, 3
    query, positive, negatives = (torch.randn(n, D).half() for n in (B, B, K))
    labels = [torch.zeros(n, L, dtype=torch.int32) for n in (B, K)]
    ids = [torch.arange(n) for n in (B, K)]
    query.requires_grad_()

    def forward() -> torch.Tensor:
        return info_nce(
            query, positive, negatives, query_labels=labels[0], negative_labels=labels[1], query_ids=ids[0],
            negative_ids=ids[1], backend="cuda",
        )  # fmt: skip

    for name, function in (("forward", forward), ("and backward", lambda: torch.autograd.grad(forward(), query))):
        times = microseconds(function)
        print(f"{name}: {min(times):.0f} us at least, {statistics.median(times):.0f} in the median")


if __name__ == "__main__":
    main()
