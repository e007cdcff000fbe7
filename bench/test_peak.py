"""The floor: products that a register-only loop does on all threads (peak.cpp)."""

import pytest
from peak import run_products

REPEATS = 3_000_000  # of a few dozen vector instructions each


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_peak(kind, n, device, small, measure, benchmark, threads):
    if device.type != "cpu":
        pytest.skip("the CPU's peak")
    repeats = 1000 if small else REPEATS
    operations = run_products(kind, repeats, n)
    if not operations:
        pytest.skip("no bfloat16 dot products on this CPU")
    threads(n)
    benchmark.group = "peak: multiply-adds in registers"
    assert measure(lambda: run_products(kind, repeats, n), f"{kind}, {n} threads", operations) == operations
