"""Images in tar shards as WebDataset has them: members of one sample share their name up to the first dot.

The trainer takes images by number, in an order that a resumed run repeats. So the shards are not streamed: their
headers are read once when they are opened, and then each picture from where it lies in its shard.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ifnd_fast.data import picture
from ifnd_fast.data.folders import TEST, TRAIN
from ifnd_fast.data.identity import Listing, content_of
from ifnd_fast.runtime.console import warn
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.runtime.paths import canonical, shown

MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # a sample's name, and what a member of it is
CLASS = "cls"  # the member with a sample's class, a number in text


class ShardImages:
    """The images of tar files, in order; with labels where every sample has a .cls.

    Args:
        shards: tar files that are not compressed.
        root: the folder that names count from.

    Raises:
        UsageError: a shard can't be read or is cut off, or there are no images.
    """

    labels: np.ndarray | None
    class_names: list[str] | None = None

    def __init__(self, shards: list[Path], root: Path):
        self.shards, self.root = shards, root
        self.names: list[str] = []  # of N members, within their shards
        places: list[tuple[int, int, int]] = []  # shard, where in it, bytes
        labels: list[int] = []
        without = 0
        for number, shard in enumerate(shards):
            for name, offset, size, label in _samples(shard):
                if not name:
                    without += 1
                    continue
                self.names.append(name)
                places.append((number, offset, size))
                labels.append(label)
        if not places:
            raise UsageError(f"--data wds: no images in {len(shards)} shards below {shown(str(root))}")
        if without:
            warn(f"data wds:{shown(str(root))}: left out: {without:,} samples without an image")
        self.places = np.array(places, dtype=np.int64)
        self.labels = np.array(labels, dtype=np.int64)
        if (self.labels < 0).any():
            self.labels = None

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        number, offset, size = self.places[index].tolist()
        with open(self.shards[number], "rb") as file:  # each time: processes that load have no place in it in common
            file.seek(offset)
            content = file.read(size)
        return picture.decode_picture(content, self.name(index))

    def name(self, index: int) -> str:
        return shown(f"{self.shards[self.places[index, 0]]}/{self.names[index]}")

    def listing(self) -> Listing:
        within = [os.path.relpath(shard, self.root) for shard in self.shards]
        names = [canonical(f"{within[number]}/{name}")
                 for number, name in zip(self.places[:, 0].tolist(), self.names, strict=True)]  # fmt: skip
        return Listing(names, self.places[:, 2], "" if self.labels is None else content_of(self.labels))


def _samples(shard: Path) -> Iterator[tuple[str, int, int, int]]:
    """Of each sample the member that is its image ("": none is), where it lies, its bytes, and the class or -1."""
    endings = {ending.removeprefix(".") for ending in picture.extensions()}
    called = f"--data wds: {shown(str(shard))}"
    key, image, label = None, ("", 0, 0), -1
    try:
        whole = shard.stat().st_size
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                match = MEMBER.fullmatch(member.name)
                if not member.isreg() or match is None or match[1].rpartition("/")[2].startswith("__"):
                    continue
                if member.offset_data + member.size > whole:
                    raise UsageError(f"{called} is cut off: {shown(member.name)} is not whole; fetch the shard again")
                if key != match[1]:
                    if key is not None:
                        yield *image, label
                    key, image, label = match[1], ("", 0, 0), -1
                kind = match[2].lower()
                if kind in endings and not image[0]:
                    image = member.name, member.offset_data, member.size
                elif kind == CLASS and (content := archive.extractfile(member)) is not None:
                    text = content.read(20).strip()
                    label = int(text) if text.isdigit() else -1
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"{called} can't be read: {error} (shards must be tar files, not compressed)") from error
    if key is not None:
        yield *image, label


def find_shards(pattern: str, split: str) -> tuple[list[Path], Path] | None:
    """The shards of a part, and the folder that they are in; None where there is no such part.

    Args:
        pattern: a folder, whose shards are of the part that their names or folders have a word for ("train", "val",
            ...), if they do for both; or a tar file or several, for training: with * and ? or {000..127} in the name.
        split: "train" or "test".

    Raises:
        UsageError: there are none, or some of {000..127} are missing.
    """
    folder = Path(pattern).expanduser()
    if folder.is_dir():
        found = sorted(folder.rglob("*.tar"), key=os.fsencode)
        words = [{*re.findall("[a-z]+", os.path.relpath(path, folder).lower())} for path in found]
        tests = [part for part in TEST if any(part in own for own in words)]
        if tests and any(own & {*TRAIN} for own in words):
            wanted = {*TRAIN} if split == "train" else {tests[0]}
            found = [path for path, own in zip(found, words, strict=True) if own & wanted]
        elif split == "test":
            return None
    elif split == "test":
        return None
    elif folder.is_file():
        found, folder = [folder], folder.parent
    else:
        parts = {part: sorted(glob.glob(part), key=os.fsencode) for part in _expand(str(folder))}
        missing = [Path(part).name for part, there in parts.items() if not there]
        if missing and len(parts) > len(missing):
            raise UsageError(
                f"--data wds:{shown(pattern)}: {len(missing)} of {len(parts)} shards are missing: "
                f"{', '.join(map(shown, missing[:3]))}{', ...' * (len(missing) > 3)}"
            )
        found, folder = [Path(path) for there in parts.values() for path in there], folder.parent
    if not found:
        raise UsageError(
            f"--data wds:{shown(pattern)}: no .tar files there (compressed ones, such as .tar.gz, can't be read)"
        )
    return found, folder


def _expand(pattern: str) -> list[str]:
    """Of a/{08..11}.tar: a/08.tar, a/09.tar, ..."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    numbers = (f"{n:0{len(match[1])}d}" for n in range(int(match[1]), int(match[2]) + 1))
    return [path for n in numbers for path in _expand(pattern[: match.start()] + n + pattern[match.end() :])]
