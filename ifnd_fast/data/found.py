"""What was found as a data set, and what was left out: said once, before anything runs long."""

from __future__ import annotations

import numpy as np

from ifnd_fast.config import DataConfig
from ifnd_fast.data.folders import UNREADABLE
from ifnd_fast.data.identity import Listing
from ifnd_fast.data.images import FolderImages, Images, whole_of
from ifnd_fast.runtime.console import say, warn
from ifnd_fast.runtime.errors import CommandError
from ifnd_fast.runtime.paths import shown


def listings(train: Images, test: Images | None) -> dict[str, Listing]:
    """Which images the parts of a data set are of, for `identity`."""
    return {"train": train.listing()} | ({} if test is None else {"test": test.listing()})


def tell_found(data: DataConfig, train: Images, test: Images | None) -> None:
    """Say what images were found and what was left out, and warn of what may be a mistake.

    Raises:
        CommandError: a folder can't be read, and the data are --strict.
    """
    parts = {"training": train} | ({} if test is None else {"test": test})
    name = shown(data.data)
    say(f"data {name}: " + "; ".join(_counted(images, what) for what, images in parts.items()))
    wholes = {id(whole): whole for whole in map(whole_of, parts.values()) if isinstance(whole, FolderImages)}
    lines = [line for whole in wholes.values() for line in whole.found.left_out.lines()]
    harmless, serious = ([line for line, is_serious in lines if is_serious is wanted] for wanted in (False, True))
    unreadable = [line for line in serious if UNREADABLE in line]
    if unreadable and data.strict:
        raise CommandError(f"--data {name} (--strict): {'; '.join(unreadable)}")
    if harmless:
        say(f"  left out: {'; '.join(harmless)}")
    if serious:
        warn(f"data {name}: left out: {'; '.join(serious)}")
    for whole in wholes.values():
        if whole.found.hint:
            warn(f"data {name}: {whole.found.hint}")


def _counted(images: Images, what: str) -> str:
    text = f"{len(images):,} {what} images"
    if images.labels is None:
        return f"{text} without classes"
    names = images.class_names or []
    told = f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""
    return f"{text} in {len(np.unique(images.labels)):,} classes{told}"
