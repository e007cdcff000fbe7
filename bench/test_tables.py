"""CPUs are told apart by what /proc/cpuinfo says of them."""

from __future__ import annotations

import platform

import pytest
from tables import RESULTS, kind_of, machine, results_of


@pytest.mark.parametrize(
    "family, model, kind",
    [(23, 0x31, "zen2"), (25, 0x01, "zen3"), (25, 0x50, "zen3"), (25, 0x11, "zen4"), (25, 0x61, "zen4"),
     (25, 0xA0, "zen4"), (26, 0x02, "zen5"), (99, 1, "avx512")],
)  # fmt: skip
def test_amds_by_family_and_model(family, model, kind):
    """Clouds call them all "AMD EPYC"; one that is not known goes by its vector units."""
    facts = {"vendor_id": "AuthenticAMD", "cpu family": str(family), "model": str(model), "flags": "avx2 avx512f"}
    assert kind_of(facts) == kind


@pytest.mark.parametrize(
    "flags, kind", [("avx2 avx512f amx_tile", "amx"), ("avx2 avx512f", "avx512"), ("sse2 avx2", "avx2")]
)
def test_others_by_their_vector_units(flags, kind):
    assert kind_of({"vendor_id": "GenuineIntel", "cpu family": "6", "model": "143", "flags": flags}) == kind


def test_each_kind_has_a_file_of_its_own():
    assert kind_of({}) == platform.machine() and results_of("cpu", "zen4") == RESULTS / "cpu-zen4.md"
    assert results_of("cpu", machine()["kind"]).parent == RESULTS
