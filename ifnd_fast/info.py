"""python -m ifnd_fast.info: versions, the hardware, and which backend each operator would use. For bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import ifnd_fast
from ifnd_fast.ops import backends

PACKAGES = ("torch", "torchvision", "triton", "numpy", "faiss-gpu", "faiss-cpu")


def lines() -> list[str]:
    """The report, line by line."""
    report = [f"ifnd_fast {ifnd_fast.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    report += [f"{package} {_version(package)}" for package in PACKAGES]
    report += _cpu() + _gpus()
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        for operator in backends.OPERATORS:
            reasons = backends.explain(operator, device, torch.float32)
            chosen = backends.choose("auto", operator, device, torch.float32)
            report.append(f"{operator} in float32 on {device}: {chosen}")
            report += [f"  not {name}: {reason}" for name, reason in reasons.items() if reason is not None]
    return report


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> list[str]:
    extension = backends.extension()
    if extension is None:
        return [f"CPU: {platform.machine()}; the extension _cpu did not import: {backends.extension_error()}"]
    units = [name for name, there in extension.features().items() if there]
    return [
        f"CPU: {platform.machine()}, vector units {', '.join(units) or 'none known'}; kernels use "
        f"{extension.isa()}, {torch.get_num_threads()} threads",
        *_not_by_default(units, extension.isa()),
    ]


def _not_by_default(units: list[str], isa: str) -> list[str]:
    """What the CPU has, but its kernels are used only if asked for."""
    if os.environ.get("IFND_FAST_CPU_ISA"):
        return []
    reasons = {}
    if {"amx_tile", "amx_bf16", "amx_int8"} <= set(units):
        reasons["amx"] = "off by default, as its kernels have never run on such a CPU"
    if "avx512bf16" in units and isa == "avx512vnni":
        reasons["avx512bf16"] = "dot products of bfloat16 are slower than float32's on Intel's cores"
    return [f"  not {name}: {why}; IFND_FAST_CPU_ISA={name} takes it all the same" for name, why in reasons.items()]


def _gpus() -> list[str]:
    try:
        from ifnd_fast import _cuda

        report = [f"extension _cuda: built for architectures {_cuda.architectures}"]
    except ImportError as error:
        report = [f"extension _cuda: not there ({error})"]
    if not torch.cuda.is_available():
        return [*report, f"GPU: none that torch can use (built for CUDA {torch.version.cuda})"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        report.append(f"GPU {index}: {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    return report


if __name__ == "__main__":
    print("\n".join(lines()))
