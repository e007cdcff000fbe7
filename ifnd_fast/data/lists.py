"""Text files that name images: a line each, as they come from editors, spreadsheets and other systems."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ifnd_fast.runtime.console import warn
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.runtime.paths import shown

LARGEST_CLASS = 1_000_000
"""A classifier has an output for each number up to the largest."""


class Listed(NamedTuple):
    names: list[str]
    """of N files, as the list has them"""
    labels: np.ndarray
    """(N,) int64"""
    sizes: np.ndarray
    """(N,) int64, bytes"""


def read_lines(file: Path, what: str) -> Iterator[tuple[int, str]]:
    """The lines with something in them and their numbers from 1, without the space around them. UTF-8 or UTF-16 with a
    byte order mark, else UTF-8 where bytes that are none stay what they are in file names; any line ends.

    Raises:
        UsageError: the file can't be read; it is called `what`.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{what} {shown(str(file))} can't be read: {error.strerror}") from error
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            text = content.decode("utf-16")
        else:
            text = content.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {shown(str(file))} can't be read: {error}") from error
    text = os.fsdecode(text.encode("utf-8", "surrogateescape"))  # as this locale calls the files
    if "\0" in text:
        raise UsageError(f"{what} {shown(str(file))} can't be read: it is no text, there are zero bytes in it")
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if line.strip():
            yield number, line.strip()


def sizes_of(files: list[Path]) -> np.ndarray:
    """(N,) int64, bytes; -1: there is no such file."""
    return np.array([_size(os.fspath(file)) for file in files], dtype=np.int64)


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size if os.path.isfile(file) else -1
    except (OSError, ValueError):
        return -1


def read_list(file: Path, root: Path) -> Listed:
    """The images that a list names, a line "path class" each, space or tabs between, with spaces in the path or none.

    Lines that start with # and name no file are comments. An image that is named again with the same class counts once;
    a few images that are not there are left out; of both there is a warning.

    Raises:
        UsageError: with the line: it is something else, its class is not a number from 0 to LARGEST_CLASS, or an image
            has another class there than before; the list can't be read or names no images; the images are not below
            `root`.
    """
    called = shown(str(file))
    first: dict[str, tuple[int, int]] = {}  # line and class of each name
    again = 0
    for number, line in read_lines(file, "the list"):
        parts = re.fullmatch(r"(.*\S)[ \t]+(\S+)", line)
        if line.startswith("#") and (parts is None or _size(os.path.join(root, parts[1])) < 0):
            continue
        where = f"{called}, line {number}"
        name, label = _entry(line, parts, where)
        then, known = first.setdefault(name, (number, label))
        if known != label:
            raise UsageError(f"{where}: {shown(name)} is of class {label}, but of class {known} in line {then}")
        again += then != number
    if not first:
        raise UsageError(f"the list {called} names no images")
    names, labels = list(first), np.array([label for _, label in first.values()], dtype=np.int64)
    sizes = np.array([_size(os.path.join(root, name)) for name in names], dtype=np.int64)
    missing = np.flatnonzero(sizes < 0)
    if len(missing):
        name = names[missing[0]]
        line = f"{called}, line {first[name][0]}: {shown(str(root / name))} is missing"
        if 2 * len(missing) > len(names):
            others = f" ({len(missing):,} of {len(names):,} images are)" if len(missing) > 1 else ""
            raise UsageError(f"{line}: --image-root must be the folder that the list counts from{others}")
        warn(f"{line}, and {len(missing) - 1:,} others of the {len(names):,} images of the list: they are left out")
    if again:
        warn(f"{called}: {again:,} lines name an image that was named before, with the same class: it counts once")
    there = sizes >= 0
    kept = [name for name, is_there in zip(names, there.tolist(), strict=True) if is_there]
    return Listed(kept, labels[there], sizes[there])


def _entry(line: str, parts: re.Match[str] | None, where: str) -> tuple[str, int]:
    if parts is None or not re.fullmatch("[+-]?[0-9]+", parts[2]):
        comma = "; between them there must be a space or a tab" if re.search(r"[,;][+-]?\d+$", line) else ""
        raise UsageError(f"{where}: wanted \"path class\", class a whole number from 0 on, got '{shown(line)}'{comma}")
    name, digits = parts[1], parts[2]
    label = int(digits) if len(digits) < 20 else LARGEST_CLASS + 1  # Python refuses thousands of digits
    if digits.startswith("-") and digits.strip("-0") or label > LARGEST_CLASS:
        told = digits if len(digits) <= 24 else digits[:20] + "..."
        raise UsageError(f"{where}: the class must be a number from 0 to {LARGEST_CLASS:,}, got {told}")
    return name, label
