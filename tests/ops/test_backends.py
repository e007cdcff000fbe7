"""Which backend runs, and the reasons given for the others."""

from __future__ import annotations

import importlib
import importlib.util
import re
from types import SimpleNamespace

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


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "triton is not installed"),
        ("3.3.1", r"needs triton 3.4 or newer, and 3.3.1 is installed: pip install -U 'torch>=2.8'"),
        ("2.10.0", "needs triton 3.4"),
        ("3.4.0", "tensors are on"),
        ("3.10.0+git1234", "tensors are on"),
    ],
)
def test_an_old_triton_is_refused(version, reason, monkeypatch):
    monkeypatch.setattr(backends, "_TRITON_VERSION", version)
    assert re.search(reason, str(backends.refusal("triton", "info_nce", torch.device("meta"), torch.float16)))


def test_the_version_of_the_installed_triton():
    triton = pytest.importorskip("triton")
    assert backends.installed_triton() == triton.__version__


def test_choosing_looks_for_no_module(monkeypatch):
    """Which torch.compile could not trace (torch up to 2.11)."""

    def find_spec(name):
        raise AssertionError(f"looked for {name}")

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    for device in ("cpu", "meta"):
        backends.choose("auto", "info_nce", torch.device(device), torch.float32)


def test_an_extension_that_sees_no_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(backends, "_cuda", SimpleNamespace(device_count=lambda: 0, architectures="70-real"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    backends._cuda_sees_a_gpu.cache_clear()
    reason = backends.refusal("cuda", "info_nce", torch.device("cuda"), torch.float16)
    backends._cuda_sees_a_gpu.cache_clear()
    assert reason is not None and "built by an nvcc newer than the driver" in reason


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
