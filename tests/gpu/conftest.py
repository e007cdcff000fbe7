"""GPU kernels: on a GPU where there is one; else on the CPU, Triton's in its interpreter, CUDA's on an emulated GPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
CAPABILITIES = {"Volta": (7, 0), "Turing": (7, 5), "Ampere": (8, 0)}  # by kind of tensor core

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, which only their first call does


@pytest.fixture(autouse=True, scope="session")
def _interpreted_bfloat16():
    """Triton's interpreter (seen in 3.8) keeps bfloat16 as 16-bit integers: dots multiply those, and conversions from
    float32 truncate. Here dots widen them first, and conversions round to nearest, as the compiled kernels do."""
    if torch.cuda.is_available():
        return
    from triton import language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    create_dot, cast = builder.create_dot, builder.cast_impl

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(self, source, kind):
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
        return handle(bits.reshape(source.data.shape), tl.bfloat16)

    builder.create_dot = lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    builder.cast_impl = rounded
    builder.create_fp_trunc = rounded


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """csrc/cuda compiled for the CPU: the module ifnd_fast._cuda as it is on each kind of tensor core, by its name."""
    build = tmp_path_factory.mktemp("cuda_on_host")
    nanobind = subprocess.run([sys.executable, "-m", "nanobind", "--cmake_dir"], capture_output=True, text=True)
    configure = [
        *("cmake", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(build), "-DIFND_MODULE=cuda-on-host"),
        *("-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O2", f"-DPython_EXECUTABLE={sys.executable}"),
        f"-Dnanobind_DIR={nanobind.stdout.strip()}",
    ]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    sys.path.insert(0, str(build))
    return {core: importlib.import_module(f"_cuda_on_{core}") for core in CAPABILITIES}


@pytest.fixture(scope="module", params=["triton", "cuda"] if torch.cuda.is_available() else ["triton", *CAPABILITIES])
def backend(request):
    """The name of a GPU backend that runs here: as it is, or on the CPU in its interpreter or emulation."""
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param not in CAPABILITIES:
        yield request.param
        return
    from ifnd_fast.ops import backends, cuda

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_cuda", request.getfixturevalue("emulated")[request.param])
        patch.setattr(cuda, "_stream", lambda device: 0)
        patch.setattr(cuda, "_multiprocessors", lambda device: 2)
        capability = CAPABILITIES[request.param]
        patch.setattr(backends, "_cuda_refusal", lambda device, dtype: backends._old_card_refusal(capability, dtype))
        yield "cuda"
