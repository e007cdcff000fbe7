"""Paths as people type them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ifnd_fast.folders import shown
from ifnd_fast.runtime.errors import UsageError


def expand_home(args: Sequence[str]) -> list[str]:
    """A command's arguments with ~ and ~user in place of home folders, in any form: ~/x, --out ~/x, --out=~/x. A shell
    leaves the last as it is, and a list of arguments that no shell has seen, all.

    Raises:
        UsageError: no such home folder is known.
    """
    return [_expanded(arg) for arg in args]


def _expanded(arg: str) -> str:
    option, path = re.fullmatch(r"(--?[\w-]+=|)(.*)", arg, re.DOTALL).groups()  # type: ignore[union-attr]
    if not path.startswith("~"):
        return arg
    home = os.environ.get("HOME")
    if re.match("~(/|$)", path) and home is not None and not os.path.isabs(home):
        raise UsageError(f"{shown(arg)}: HOME is {shown(home)!r}, no full path: give a full path instead of ~")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.lexists(path):
        raise UsageError(f"{shown(arg)}: no home folder {path.partition('/')[0]} is known: give a full path")
    return option + expanded


def refuse_file(option: str, folder: Path) -> None:
    """Raises UsageError: `folder`, to be written to, or one that it is in is a file; before any work that is lost."""
    for path in (folder, *folder.parents):
        if path.is_dir():
            return
        if path.exists() or path.is_symlink():
            what = "is a file" if path.exists() else "is a broken link"
            raise UsageError(f"{option} {shown(str(folder))}: {shown(str(path))} {what}, it must be a folder")


def refuse_folder(option: str, file: Path) -> None:
    """Raises UsageError: `file`, to be written, is a folder, or is in no folder; before any work that is lost."""
    if file.is_dir():
        raise UsageError(f"{option} {shown(str(file))} is a folder: give the name of a file")
    refuse_file(option, file.parent)
