"""Checkpoints: written atomically, read without executing code, the last good one always kept."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import warnings
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ifnd_fast.runtime.errors import CommandError

FORMAT = "ifnd_fast checkpoint 1"


def folder(out: Path) -> Path:
    return out / "checkpoints"


def list_checkpoints(out: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(folder(out).glob("step-*.pt"))


def path_of(out: Path, step: int) -> Path:
    """Of a run's checkpoint after so many steps."""
    return folder(out) / f"step-{step:09d}.pt"


def where(out: Path) -> str:
    """A clause that names the run's newest checkpoint."""
    found = list_checkpoints(out)
    return f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def write_atomically(path: Path, save: Any, size: int | None = None) -> None:
    """Call save(file) on a temporary file beside `path`, flush it to the disk, and rename it to `path`.

    Args:
        size: roughly the bytes that will be written, for the message.

    Raises:
        CommandError: the disk is full or not writable; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save's own: a full disk
            raise
        reason = str(error).splitlines()[0]
        try:
            temporary.unlink(missing_ok=True)
            needed = f"it needs about {size / 1e6:,.1f} MB, " if size else ""
            reason += f" ({needed}{shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free there)"
        except OSError:  # a folder that isn't there, or not to be read
            pass
        raise CommandError(f"could not write {path}: {reason}") from error


def remove_temporaries(out: Path) -> None:
    """Delete what a killed run left half written; only for who holds the run's lock."""
    for temporary in (*out.glob(".*.tmp"), *folder(out).glob(".*.tmp")):
        temporary.unlink(missing_ok=True)


def save(out: Path, state: dict[str, Any], keep: int = 2) -> Path:
    """Write `state` (tensors, numbers, strings, lists, dicts; with "step") and prune older checkpoints."""
    path = path_of(out, state["step"])
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file), _bytes_of(state))
    for old in list_checkpoints(out)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def _bytes_of(value: Any) -> int:
    if isinstance(value, dict | list | tuple):
        return sum(map(_bytes_of, value.values() if isinstance(value, dict) else value))
    return value.nbytes if isinstance(value, Tensor) else 8


class Skipped:
    """In place of an object that is no plain value: nothing of its class runs, and nothing of it is kept."""

    def __new__(cls, *_: Any, **__: Any) -> Skipped:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


def _stand_in(name: str) -> Any:
    """What is called in place of a class or function of that name."""
    if name == "collections.defaultdict":  # trainings keep their meters in them
        return lambda *_: {}
    return type(name, (Skipped,), {})


def read(path: Path, skip_objects: bool = False) -> Any:
    """What torch.save wrote to a file, on the CPU; only tensors and plain values, never code. (An argparse.Namespace,
    which many trainings save their options in, is plain: reading it fills its __dict__.)

    Args:
        skip_objects: other objects (NumPy's numbers, OmegaConf's settings, ...) become `Skipped`, of a class of their
            name; else they are refused. torch's first format, before 1.6, doesn't tell them, and is refused with them.

    Raises:
        CommandError: the file is missing, truncated, damaged, not torch's, or would run code.
    """
    try:
        with open(path, "rb") as file, ExitStack() as known:  # once: a run may replace or delete it meanwhile
            known.enter_context(torch.serialization.safe_globals([argparse.Namespace]))
            if zipfile.is_zipfile(file):  # torch.load doesn't look at the checksums that torch.save wrote
                with zipfile.ZipFile(file) as archive:
                    if (damaged := archive.testzip()) is not None:
                        raise CommandError(f"{path} can't be read: {damaged} in it is damaged: its checksum is wrong")
                if skip_objects:
                    file.seek(0)
                    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
                    skipped: list[Any] = [(_stand_in(name), name) for name in names]
                    known.enter_context(torch.serialization.safe_globals(skipped))
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CommandError(f"{path} can't be read: {error}") from error
    except CommandError:
        raise
    except Exception as error:  # torch.load raises many kinds, one for each way a file can be broken
        reason = "it is truncated or damaged, or not a file of torch.save"
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = f" ({named[1]})" if named else ""
            reason = f"it holds Python objects{what}, which could run code; save tensors alone (a state_dict)"
        raise CommandError(f"{path} can't be read: {reason}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run on the CPU.

    Raises:
        CommandError: the file is missing, truncated, damaged, not a checkpoint of this program, or would run code.
    """
    state = read(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CommandError(f"{path} is not a checkpoint that this version wrote ({FORMAT!r})")
    return state


def load_latest(out: Path) -> dict[str, Any]:
    """The newest checkpoint of a run that can be read; a warning names those that can't. The run may go on meanwhile,
    and delete what newer ones replace.

    Raises:
        CommandError: the run has no readable checkpoint.
    """
    reasons, tried = [], set()
    while untried := [path for path in list_checkpoints(out) if path not in tried]:
        path = untried[-1]
        tried.add(path)
        try:
            return load(path)
        except CommandError as error:
            if not path.exists():  # there is a newer one
                continue
            reasons.append(str(error))
            warnings.warn(f"{error}; trying the one before", stacklevel=2)
    raise CommandError(f"no checkpoint to go on from in {folder(out)}" + "".join(f"\n  {r}" for r in reasons))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """That of torch's generators, for a checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """The inverse of `random_state`, also of one that another kind of device saved."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
