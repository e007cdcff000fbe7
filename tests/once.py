"""What is slow to build and the same for every test process is built by one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def once(tmp_path_factory, name: str, build: Callable[[Path], object]) -> Path:
    """A folder of this name that `build` filled, once for all processes of pytest-xdist; the others wait for it."""
    root = tmp_path_factory.getbasetemp()
    if root.name.startswith("popen-"):  # a process of pytest-xdist: the folder above is common to all
        root = root.parent
    folder, built = root / name, root / f"{name}.built"
    with FileLock(root / f"{name}.lock"):
        if not built.exists():
            folder.mkdir(exist_ok=True)
            build(folder)
            built.touch()
    return folder
