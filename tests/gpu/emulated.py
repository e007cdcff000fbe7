"""csrc/cuda on the CPU: ifnd_fast._cuda as it is on each kind of tensor core, and the backend made to use it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CAPABILITIES = {"Volta": (7, 0), "Turing": (7, 5), "Ampere": (8, 0)}


QUICK = "-O1 -march=native -ffp-contract=off"  # float16 in one instruction; -O2 compiles longer and runs no faster


def build(folder: Path, flags: str = QUICK, cores: tuple[str, ...] = tuple(CAPABILITIES)) -> None:
    """The modules _cuda_on_Volta, ..., in this folder."""
    nanobind = subprocess.run([sys.executable, "-m", "nanobind", "--cmake_dir"], capture_output=True, text=True)
    configure = [
        *("cmake", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(folder), "-DIFND_MODULE=cuda-on-host"),
        *("-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CXX_FLAGS_RELEASE={flags}", f"-DPython_EXECUTABLE={sys.executable}"),
        f"-Dnanobind_DIR={nanobind.stdout.strip()}",
    ]
    targets = [f"_cuda_on_{core}" for core in cores]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in (configure, ["cmake", "--build", str(folder), "--target", *targets]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def use(patch, module, core: str) -> None:
    """Until the pytest.MonkeyPatch is undone, backend "cuda" is this module, on tensors of the CPU."""
    from ifnd_fast.ops import backends, launch

    patch.setattr(launch, "_cuda", module)
    patch.setattr(launch, "stream", lambda device: 0)
    patch.setattr(launch, "multiprocessors", lambda device: 2)
    emulated = backends.FUSED["cuda"]._replace(
        refuses=lambda _, dtype: backends._old_card_refusal(CAPABILITIES[core], dtype)
    )
    patch.setitem(backends.FUSED, "cuda", emulated)
