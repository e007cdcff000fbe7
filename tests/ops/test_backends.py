"""Which backend runs, and the reasons given for the others."""

from __future__ import annotations

import re

import pytest
import torch

import ifnd_fast
from ifnd_fast.ops import backends
from tests.ops.cases import DTYPES

CPU = torch.device("cpu")


def call(operator: str, dtype: torch.dtype, backend: str, device: str = "cpu"):
    x = torch.eye(4, dtype=dtype, device=device)
    if operator == "assign_clusters":
        return ifnd_fast.assign_clusters(x, x, backend=backend)
    return ifnd_fast.info_nce(x, x, x, backend=backend)


# cluster_sums is not public and knows no backend by name.
every_operator = pytest.mark.parametrize("operator", [name for name in backends.OPERATORS if name != "cluster_sums"])


@every_operator
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_runs_its_dtypes_by_the_extension(operator, dtype):
    assert backends.choose("auto", operator, CPU, dtype) == "cpu"
    assert backends.explain(operator, CPU, dtype)["cpu"] is None


@every_operator
@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_by_name_it_runs_or_says_why_not(operator, backend, dtype, device):
    reason = backends.explain(operator, torch.device(device), dtype)[backend]
    if reason is None:
        call(operator, dtype, backend, device)
        return
    with pytest.raises(ValueError, match=re.escape(f"backend={backend!r} can't run {operator} here: {reason}")):
        call(operator, dtype, backend, device)


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [("cpu", torch.float64, "not torch.float64"), ("meta", torch.float32, "the tensors are on meta")],
)
def test_why_not_the_cpu_backend(device, dtype, reason):
    assert reason in backends.explain("info_nce", torch.device(device), dtype)["cpu"]


@every_operator
def test_float64_goes_to_the_reference(operator):
    assert backends.choose("auto", operator, CPU, torch.float64) == "reference"
    result = call(operator, torch.float64, "auto")
    assert (result[1] if operator == "assign_clusters" else result).dtype == torch.float64


def test_auto_takes_the_first_that_can():
    """In the order of BACKENDS, the fastest first; the reference always can, and Triton's interpreter is not asked."""
    for dtype in (*DTYPES, torch.float64):
        reasons = backends.explain("info_nce", CPU, dtype)
        assert tuple(reasons) == backends.BACKENDS and reasons["reference"] is None
        allowed = [name for name, reason in reasons.items() if reason is None and name != "triton"]
        assert backends.choose("auto", "info_nce", CPU, dtype) == allowed[0]


@every_operator
def test_a_tree_that_was_never_built(operator, monkeypatch):
    expected = call(operator, torch.float32, "reference")
    monkeypatch.setattr(backends, "_cpu", None)
    monkeypatch.setattr(backends, "_cpu_import_error", "No module named 'ifnd_fast._cpu'")
    torch.testing.assert_close(call(operator, torch.float32, "auto"), expected, rtol=0, atol=0)
    assert not backends.cpu_has_bfloat16()
    with pytest.raises(ValueError, match="No module named 'ifnd_fast._cpu'.*install with pip"):
        call(operator, torch.float32, "cpu")


@pytest.mark.parametrize("name", ["gpu", "", "Auto", None])
def test_an_unknown_name(name):
    with pytest.raises(ValueError, match=re.escape(f"('auto', 'cuda', 'triton', 'cpu', 'reference'), got {name!r}")):
        backends.choose(name, "info_nce", CPU, torch.float32)
