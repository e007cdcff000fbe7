"""What every benchmark shares: the machine in each report, the device, and how a call is timed.

pytest bench/ --benchmark-only        the tables
python bench/cpu.py                   the same, with floors and ratios, into bench/results
pytest bench/ --benchmark-disable     every body once at small sizes (fixture `small`), results checked
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no worker processes beside what is measured

import pytest
import torch
from tables import machine

from ifnd_fast.ops import backends

SECONDS, ROUNDS = 2.0, (3, 400)  # of a timing, after a warm-up; the tables' medians are of so many rounds


def pytest_report_header() -> str:
    return ", ".join(f"{key}: {value}" for key, value in machine().items())


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.update(machine())


@pytest.fixture
def small(request: pytest.FixtureRequest) -> bool:
    """Nothing is timed, so sizes are small and results are compared with the reference."""
    return request.config.getoption("benchmark_disable")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    return torch.device(request.param)


@pytest.fixture
def fused(device: torch.device) -> Callable[..., str]:
    """fused(operator, dtype): the backend that "auto" takes, where that is not the reference; or the one of a name."""

    def choose(operator: str, dtype: torch.dtype, name: str = "auto") -> str:
        if name == "auto":
            name = backends.choose("auto", operator, device, dtype)
            reason = str(backends.explain(operator, device, dtype)) if name == "reference" else None
        else:
            reason = backends.refusal(name, operator, device, dtype)
        if reason:
            pytest.skip(f"no fused backend: {reason}")
        return name

    return choose


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """threads(n): n threads for torch, faiss and the kernels until the end of the test."""
    before = torch.get_num_threads()

    def use(n: int) -> None:
        torch.set_num_threads(n)
        if "faiss" in sys.modules:
            sys.modules["faiss"].omp_set_num_threads(n)

    yield use
    use(before)


def gpu_seconds(function: Callable[[], Any], rounds: int = 20) -> float:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for before, after in events:
        before.record()
        function()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) / 1e3


@pytest.fixture
def measure(benchmark: Any, device: torch.device) -> Callable[..., Any]:
    """measure(function, row, operations, **extra_info): the result of function(), timed until the device has finished.

    `row` names it in its group's table; `operations` are those of its matrix products, two for a multiply-add. On a GPU
    the call's time is the host's, and `gpu_seconds`, the median between CUDA events, is that of its kernels alone.
    """

    def run(function: Callable[[], Any], row: str, operations: float | None = None, **extra_info: Any) -> Any:
        def timed() -> Any:
            result = function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return result

        extra_info |= {"row": row, "operations": operations, "threads": torch.get_num_threads(), "device": str(device)}
        benchmark.extra_info.update(extra_info)
        if benchmark.disabled:
            return benchmark(timed)
        timed()  # compiles, starts threads, takes memory
        if device.type == "cuda":
            benchmark.extra_info["gpu_seconds"] = gpu_seconds(function)
        start = time.perf_counter()
        timed()
        rounds = int(SECONDS / (time.perf_counter() - start))
        return benchmark.pedantic(timed, rounds=min(max(rounds, ROUNDS[0]), ROUNDS[1]))

    return run
