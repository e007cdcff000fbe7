"""What every benchmark shares: the machine in each report, the device, and how a call is timed.

pytest bench/ --benchmark-only        the tables
python bench/report.py                the same, with floors and ratios, into bench/results
pytest bench/ --benchmark-disable     every body once at small sizes (fixture `small`), results checked
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no worker processes beside what is measured

import pytest
import torch

from ifnd_fast.ops import backends

SECONDS, ROUNDS = 2.0, (3, 400)  # of a timing, after a warm-up; the tables' medians are of so many rounds


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "CPU": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "instruction set": backends._cpu.isa() if backends._cpu else "extension not built",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


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
def fused(device: torch.device) -> Callable[[str, torch.dtype], str]:
    """fused(operator, dtype): the backend that "auto" takes, where that is not the reference."""

    def choose(operator: str, dtype: torch.dtype) -> str:
        backend = backends.choose("auto", operator, device, dtype)
        if backend == "reference":
            pytest.skip(f"no fused backend: {backends.explain(operator, device, dtype)}")
        return backend

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


@pytest.fixture
def measure(benchmark: Any, device: torch.device) -> Callable[..., Any]:
    """measure(function, row, operations, **extra_info): the result of function(), timed until the device has finished.

    `row` names it in its group's table; `operations` are those of its matrix products, two for a multiply-add.
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
        start = time.perf_counter()
        timed()
        rounds = int(SECONDS / (time.perf_counter() - start))
        return benchmark.pedantic(timed, rounds=min(max(rounds, ROUNDS[0]), ROUNDS[1]))

    return run
