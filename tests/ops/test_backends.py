"""Which backend runs, and the reasons given for the others."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import ifnd_fast
from ifnd_fast import info
from ifnd_fast.ops import backends, reference
from tests.ops.cases import DTYPES

CPU = torch.device("cpu")


def call(operator: str, dtype: torch.dtype, backend: str, device: str = "cpu"):
    x = torch.eye(4, dtype=dtype, device=device)
    if operator == "assign_clusters":
        return ifnd_fast.assign_clusters(x, x, backend=backend)
    return ifnd_fast.info_nce(x, x, x, backend=backend)


every_operator = pytest.mark.parametrize("operator", ["info_nce", "assign_clusters"])  # that takes one by name


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


def test_a_fifth_backend_is_one_entry(monkeypatch):
    """ "auto", messages and `python -m ifnd_fast.info` know it, and its module's function is called."""
    called = []

    def assign(*rows, **how):
        called.append(1)
        return reference.assign_clusters(*rows, **how)

    monkeypatch.setitem(sys.modules, "ifnd_fast.ops.amx", SimpleNamespace(assign_clusters=assign))
    kernels = {"assign_clusters": backends.Kernels("ifnd_fast.ops.amx", (torch.float32, torch.bfloat16))}
    entry = backends.Backend("cpu", lambda device, dtype: None if device.type == "cpu" else "no tiles", kernels)
    monkeypatch.setattr(backends, "FUSED", {"amx": entry, **backends.FUSED})

    call("assign_clusters", torch.bfloat16, "amx")
    call("assign_clusters", torch.float32, "auto")
    assert len(called) == 2
    assert list(backends.explain("assign_clusters", CPU, torch.float32)) == ["amx", *backends.BACKENDS]
    for operator, dtype, reason in (
        ("info_nce", torch.float32, "this version has no amx kernel for info_nce"),
        ("assign_clusters", torch.float16, "it takes float32 and bfloat16, not torch.float16"),
    ):
        assert backends.choose("auto", operator, CPU, dtype) == "cpu"
        with pytest.raises(ValueError, match=re.escape(f"backend='amx' can't run {operator} here: {reason}")):
            call(operator, dtype, "amx")
    assert backends.explain("assign_clusters", torch.device("meta"), torch.float32)["amx"] == "no tiles"
    with pytest.raises(ValueError, match=re.escape("one of ('auto', 'amx', 'cuda', 'triton', 'cpu', 'reference')")):
        call("info_nce", torch.float32, "tpu")
    report = info.lines()
    assert "assign_clusters in float32 on cpu: amx" in report
    assert "  not amx: this version has no amx kernel for info_nce" in report


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("isa", ["avx512vnni", "avx512bf16", "avx512"])
def test_info_says_what_the_cpu_has_and_does_not_get(monkeypatch, isa, amx):
    monkeypatch.delenv("IFND_FAST_CPU_ISA", raising=False)
    units = {"avx512bf16": isa != "avx512", "amx_tile": True, "amx_bf16": True, "amx_int8": amx}
    monkeypatch.setattr(backends, "_cpu", SimpleNamespace(isa=lambda: isa, features=lambda: units))
    report = "\n".join(info.lines())
    assert f"kernels use {isa}," in report
    assert ("IFND_FAST_CPU_ISA=avx512bf16 takes it all the same" in report) == (isa == "avx512vnni")
    assert ("IFND_FAST_CPU_ISA=amx takes it all the same" in report) == amx


def test_who_leads_goes_first_where_it_does(monkeypatch):
    """As Triton before cuda, on newer cards in half precision."""
    late = backends.Backend("cpu", lambda *_: None, backends.FUSED["cpu"].kernels, lambda _, dtype: dtype in DTYPES[1:])
    monkeypatch.setattr(backends, "FUSED", {**backends.FUSED, "late": late})
    for dtype in DTYPES:
        leads = dtype in DTYPES[1:]
        assert list(backends.explain("info_nce", CPU, dtype)).index("late") == (0 if leads else 3)
        assert backends.choose("auto", "info_nce", CPU, dtype) == ("late" if leads else "cpu")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_reassigning_has_a_kernel_for_float32_on_the_cpu(dtype):
    wanted = "cpu" if dtype == torch.float32 else "reference"
    assert backends.choose("auto", "reassign", CPU, dtype) == wanted
    if dtype != torch.float32:
        assert backends.refusal("cpu", "reassign", CPU, dtype) == f"it takes float32, not {dtype}"
    assert backends.refusal("cuda", "reassign", CPU, dtype) == "this version has no cuda kernel for reassign"
    assert backends.choose("auto", "reassign", torch.device("meta"), dtype) == "reference"


@pytest.mark.parametrize("backend", list(backends.FUSED))
@pytest.mark.parametrize("operator", backends.OPERATORS)
def test_every_kernel_of_a_record_is_there(backend, operator):
    kernels = backends.FUSED[backend].kernels.get(operator)
    if kernels is None or backend == "cuda" and backends._cuda is None:
        return
    if backend == "triton":
        pytest.importorskip("triton")
    names = {"info_nce": ["info_nce_forward", "info_nce_negatives_grad"], "reassign": ["reassign_by_bounds"]}
    for name in names.get(operator, [operator]):
        assert callable(getattr(backends.module_of(backend, operator), name))


@pytest.mark.parametrize("name", ["gpu", "", "Auto", None])
def test_an_unknown_name(name):
    with pytest.raises(ValueError, match=re.escape(f"('auto', 'cuda', 'triton', 'cpu', 'reference'), got {name!r}")):
        backends.choose(name, "info_nce", CPU, torch.float32)
