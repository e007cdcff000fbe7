"""Builds the extension modules with CMake; everything else about the package is in pyproject.toml.

ifnd_fast._cpu is always built. ifnd_fast._cuda is built where there is an nvcc (CUDACXX, CUDA_HOME, the PATH,
/usr/local/cuda); if that fails, a note says why and the installation goes on without it. IFND_FAST_CUDA=0
skips it; IFND_FAST_CUDA_ARCHITECTURES="80 90" compiles for these compute capabilities alone, which is sooner done.

Both use Python's stable ABI from 3.10, so that one wheel serves every later Python (csrc/CMakeLists.txt; not yet the
Python without a GIL).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    beside_home = [shutil.which("nvcc", path=str(Path(home, "bin"))) for home in homes if home]
    candidates = [shutil.which(os.environ.get("CUDACXX") or "nvcc"), *beside_home]
    return next((nvcc for nvcc in candidates if nvcc), None)


def cuda_architectures(nvcc: str) -> str:
    """Machine code for each card that this nvcc knows, and PTX of the last for newer ones."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", listed)}
    asked = {int(number) for number in re.findall(r"\d+", os.environ.get("IFND_FAST_CUDA_ARCHITECTURES", ""))}
    wanted = sorted(asked or known & set(ARCHITECTURES))
    if not wanted or asked - known:
        raise RuntimeError(f"it compiles for {sorted(known)}, and {sorted(asked or ARCHITECTURES)} are wanted")
    return ";".join([f"{number}-real" for number in wanted[:-1]] + [str(wanted[-1])])


class BuildWithCMake(build_ext):
    def build_extension(self, ext: Extension) -> None:
        module = ext.name.rpartition("._")[2]
        if module == "cpu":
            self.run_cmake(ext, [])
            return
        nvcc = None if os.environ.get("IFND_FAST_CUDA") == "0" else find_nvcc()
        if nvcc is None:
            print("ifnd_fast: no nvcc (or IFND_FAST_CUDA=0): installing without ifnd_fast._cuda")
            return
        try:
            architectures = cuda_architectures(nvcc)
            self.run_cmake(ext, [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"])
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            print(f"ifnd_fast: building with {nvcc} failed ({error}): installing without ifnd_fast._cuda")

    def copy_extensions_to_source(self) -> None:
        """Without those of another ABI that an earlier build left there, which would be imported in their place."""
        for ext in self.extensions:
            built = ROOT / self.get_ext_filename(ext.name)
            for earlier in set(built.parent.glob(f"{ext.name.rpartition('.')[2]}.*.so")) - {built}:
                earlier.unlink()
        super().copy_extensions_to_source()

    def run_cmake(self, ext: Extension, options: list[str]) -> None:
        import nanobind

        module = ext.name.rpartition("._")[2]
        work = Path(self.build_temp).resolve() / module
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            *("cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(work)),
            f"-DIFND_MODULE={module}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dnanobind_DIR={nanobind.cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *options,
        ]
        jobs = [] if self.parallel is None else ["--parallel", str(self.parallel)]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(work), *jobs], check=True)
        subprocess.run(["cmake", "--install", str(work), "--prefix", str(target)], check=True)


setup(
    # optional: a module that was not built is left out of the wheel; a failure of _cpu still stops the build.
    ext_modules=[
        Extension("ifnd_fast._cpu", [], py_limited_api=STABLE_ABI),
        Extension("ifnd_fast._cuda", [], py_limited_api=STABLE_ABI, optional=True),
    ],
    cmdclass={"build_ext": BuildWithCMake},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
)
