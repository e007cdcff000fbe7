"""Paths as people type them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ifnd_fast.runtime.errors import CommandError, UsageError


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
    """Raises CommandError: `folder`, to be written to, or one that it is in is a file; before any work that is lost."""
    for path in (folder, *folder.parents):
        if path.is_dir():
            return
        if path.exists() or path.is_symlink():
            what = "is a file" if path.exists() else "is a broken link"
            raise CommandError(
                f"{option} {shown(str(folder))} can't be written: {shown(str(path))} {what}, it must be a folder"
            )


def refuse_folder(option: str, file: Path) -> None:
    """Raises UsageError, CommandError: `file`, to be written, is a folder, or in none; before any work that is lost."""
    if file.is_dir():
        raise UsageError(f"{option} {shown(str(file))} is a folder: give the name of a file")
    refuse_file(option, file.parent)


def shown(name: str) -> str:
    """A name as it can be printed, encoded and told apart from every other: bytes that are not UTF-8 as \\xe9, control
    characters and line breaks as \\n or \\u2028, a backslash doubled."""
    name = canonical(name)
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(map(_shown, name))


def _shown(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as os.fsdecode keeps it
        return f"\\x{code - 0xDC00:02x}"
    if character == "\\" or code < 0x20:
        return character.encode("unicode_escape").decode()
    return f"\\u{code:04x}" if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") else character


def canonical(name: str) -> str:
    """A file's name by its bytes, the same in every locale: as UTF-8 with surrogates for bytes that are none."""
    try:
        return name if name.isascii() else os.fsencode(name).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # text that no file of this locale has as its name
        return name
