"""Which backend runs an operator on given inputs, and why the others were refused."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

OPERATORS = ("info_nce", "assign_clusters", "cluster_sums", "reassign")
TRITON_VERSION = (3, 4)  # older ones don't compile these kernels: tuples of tensors, for one
TRITON_CAPABILITY = (8, 0)  # on older cards Triton multiplies without their tensor cores
CUDA_CAPABILITY = (7, 0)  # the first with tensor cores
BFLOAT16_CAPABILITY = (8, 0)

try:
    from ifnd_fast import _cpu

    _cpu_import_error = None
except ImportError as error:  # a source tree that was never built
    _cpu = None  # type: ignore[assignment]
    _cpu_import_error = str(error)

try:
    from ifnd_fast import _cuda
except ImportError:  # there was no nvcc
    _cuda = None  # type: ignore[assignment]


def installed_triton() -> str | None:
    """Its version, None without it; read from its file, as the import takes a while."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"^__version__ = .(\d[\w.+]*)", Path(spec.origin).read_text(), re.MULTILINE)
    return found.group(1) if found else "0"


_TRITON_VERSION = installed_triton()  # once: torch.compile can't trace it


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX), so that it is faster than float32."""
    return _cpu is not None and bool(_cpu.features().get("avx512bf16") or _cpu.features().get("amx_bf16"))


def extension() -> ModuleType | None:
    """ifnd_fast._cpu; None where it did not import, for the reason that `extension_error` gives."""
    return _cpu


def extension_error() -> str | None:
    return _cpu_import_error


def _cpu_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if _cpu is None:
        return f"the extension ifnd_fast._cpu did not import ({_cpu_import_error}); install with pip"
    if device.type != "cpu":
        return f"it computes on the CPU and the tensors are on {device}"
    return None


def _triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if _TRITON_VERSION is None:
        return "triton is not installed"
    if tuple(int(number) for number in _TRITON_VERSION.split(".")[:2]) < TRITON_VERSION:
        return "it needs triton {}.{} or newer, and {} is installed: pip install -U 'torch>=2.8'".format(
            *TRITON_VERSION, _TRITON_VERSION
        )
    if device.type == "cpu" and triton_interprets():
        return None
    if device.type != "cuda":
        return f"it computes on a GPU and the tensors are on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < TRITON_CAPABILITY:
        return "it needs compute capability {}.{}, and {} has {}.{}".format(*TRITON_CAPABILITY, device, *capability)
    return None


def _cuda_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if _cuda is None:
        return "the extension ifnd_fast._cuda was not built: nvcc was missing at installation"
    if device.type != "cuda":
        return f"it computes on a GPU and the tensors are on {device}"
    if not _cuda_sees_a_gpu():
        return (
            "the extension ifnd_fast._cuda sees no GPU: it was built by an nvcc newer than the driver. Update the "
            "driver, or install again with an older CUDA toolkit"
        )
    capability = torch.cuda.get_device_capability(device)
    card = "{} has {}.{}".format(device, *capability)
    if capability < CUDA_CAPABILITY:
        return "it needs compute capability {}.{}, and {}".format(*CUDA_CAPABILITY, card)
    if not _has_code_for(capability):
        return f"the extension was built for the architectures {_cuda.architectures}, and {card}"
    return _old_card_refusal(capability, dtype)


@functools.cache
def _cuda_sees_a_gpu() -> bool:
    """By the CUDA runtime that the extension was linked with, not torch's."""
    return _cuda.device_count() > 0


def _old_card_refusal(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16 or capability >= BFLOAT16_CAPABILITY:
        return None
    return "bfloat16 needs compute capability {}.{}, not {}.{}: use float16".format(*BFLOAT16_CAPABILITY, *capability)


def _has_code_for(capability: tuple[int, int]) -> bool:
    """Machine code runs on newer cards of the same major number; the last one's PTX on all newer cards."""
    built = [divmod(int(name.removesuffix("-real")), 10) for name in _cuda.architectures.split()]
    return any(a[0] == capability[0] and a <= capability for a in built) or capability > max(built)


def triton_interprets() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_leads(device: torch.device, dtype: torch.dtype) -> bool:
    """On cards whose newer instructions it uses and cuda does not (asynchronous copies from 8.0 on, wgmma on 9.0), but
    for float32, which cuda alone multiplies on tensor cores."""
    if device.type != "cuda" or dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability(device) >= TRITON_CAPABILITY


class Kernels(NamedTuple):
    """A backend's function of one operator: the module that has it, and what it takes."""

    module: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    max_dim: int = 2048  # columns of a row
    unusual: tuple[str, ...] = ()  # arguments that few calls have and not every backend takes


class Backend(NamedTuple):
    """A way to run operators by kernels of its own."""

    device: str  # the type that "auto" takes it on
    refuses: Callable[[torch.device, torch.dtype], str | None]  # why it can't run there, if it can't
    kernels: Mapping[str, Kernels]  # of each operator that it has
    leads: Callable[[torch.device, torch.dtype], bool] | None = None  # whether it is faster than those above it, there


_IN_CUDA = Kernels("ifnd_fast.ops.cuda")
_IN_CPU = Kernels("ifnd_fast.ops.cpu", max_dim=16384)
FUSED = {  # as a rule, fastest first
    "cuda": Backend(
        "cuda", _cuda_refusal, dict.fromkeys(("info_nce", "assign_clusters", "cluster_sums"), _IN_CUDA),
    ),
    "triton": Backend(
        "cuda", _triton_refusal,
        {operator: Kernels(f"ifnd_fast.kernels.{operator}") for operator in ("info_nce", "assign_clusters")},
        leads=_triton_leads,
    ),
    "cpu": Backend(
        "cpu", _cpu_refusal,
        {**dict.fromkeys(("assign_clusters", "cluster_sums"), _IN_CPU),
         "info_nce": _IN_CPU._replace(unusual=("hard_negatives", "margin")),
         "reassign": _IN_CPU._replace(dtypes=(torch.float32,))},
    ),
}  # fmt: skip
BACKENDS = (*FUSED, "reference")  # which always can


def refusal(
    backend: str, operator: str, device: torch.device, dtype: torch.dtype, dim: int = 1, unusual: tuple[str, ...] = ()
) -> str | None:
    """Why `backend` can't run `operator` for tensors of this device, dtype and columns, with these unusual arguments;
    None when it can."""
    if backend == "reference":
        return None
    fused = FUSED[backend]
    kernels = fused.kernels.get(operator)
    if kernels is None:
        return f"this version has no {backend} kernel for {operator}"
    reason = fused.refuses(device, dtype)
    if reason is None and dtype not in kernels.dtypes:
        *others, last = (str(taken).removeprefix("torch.") for taken in kernels.dtypes)
        taken = ", ".join(others) + " and " * bool(others) + last
        return f"it takes {taken}, not {dtype}"
    if reason is None and dim > kernels.max_dim:
        return f"it takes rows of up to {kernels.max_dim} columns, not {dim}"
    lacking = [name for name in unusual if name not in kernels.unusual]
    if reason is None and lacking:
        return f"it has no kernel for {lacking[0]}"
    return reason


def explain(operator: str, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """For every backend the reason it is refused, or None where it can run; fastest first."""
    names = (*_fastest_first(device, dtype), "reference")
    return {backend: refusal(backend, operator, device, dtype) for backend in names}


def _fastest_first(device: torch.device, dtype: torch.dtype) -> list[str]:
    leaders = [name for name, fused in FUSED.items() if fused.leads is not None and fused.leads(device, dtype)]
    return leaders + [name for name in FUSED if name not in leaders] if leaders else list(FUSED)


def choose(
    backend: str, operator: str, device: torch.device, dtype: torch.dtype, dim: int = 1, unusual: tuple[str, ...] = ()
) -> str:
    """The backend to run: the one asked for, or for "auto" the fastest that can. One whose kernels a CPU can but
    interpret is taken there only by name.

    Raises:
        ValueError: the name is unknown, or the backend asked for can't run here (with the reason).
    """
    if isinstance(backend, str) and backend == "auto":
        for name in _fastest_first(device, dtype):
            if FUSED[name].device == device.type and refusal(name, operator, device, dtype, dim, unusual) is None:
                return name
        return "reference"
    if not isinstance(backend, str) or (backend not in FUSED and backend != "reference"):
        raise ValueError(f"backend must be one of {('auto', *FUSED, 'reference')}, got {backend!r}")
    reason = refusal(backend, operator, device, dtype, dim, unusual)
    if reason is not None:
        raise ValueError(f"backend={backend!r} can't run {operator} here: {reason}")
    return backend


def module_of(backend: str, operator: str) -> ModuleType:
    """Where this fused backend's function for the operator is; Triton's are imported, and compiled, on first use."""
    return importlib.import_module(FUSED[backend].kernels[operator].module)
