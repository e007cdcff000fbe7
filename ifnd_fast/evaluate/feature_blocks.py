"""Features of many images in files of blocks: what was stopped goes on, with any number of ranks, to the same bits."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ifnd_fast.config import DataConfig, changes
from ifnd_fast.data import features
from ifnd_fast.data.images import Images
from ifnd_fast.runtime import checkpoint, distributed, run_folder
from ifnd_fast.runtime.compute import Compute
from ifnd_fast.runtime.console import say
from ifnd_fast.runtime.errors import CommandError, UsageError

BATCH, BATCHES = 256, 4  # images computed together, whatever the ranks, and so many batches a file
SETTINGS = "settings.json"


class Block(NamedTuple):
    """Features of some images in order."""

    vectors: np.ndarray  # (n, D) float32; zeros of unreadable images
    reasons: np.ndarray  # (n,) str: why an image is unreadable, "" where it is not


class FeatureBlocks:
    """The folder of a feature extraction that can be stopped at any time.

    A block is of a range of images that depends on their number alone, computed in the same batches whoever computes
    them: ranks and restarts change no bit of a feature.

    Args:
        folder: of the files; rank 0 makes it.
        settings: what the features depend on, by name; a folder with other ones is refused.

    Raises:
        UsageError: the folder holds features of something else.
        CommandError: it can't be written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        with distributed.raise_on_all_ranks(True):
            if distributed.rank() == 0:
                self._begin(settings)

    def _begin(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        if not path.exists():
            run_folder.write_json(path, settings)
            return
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CommandError(f"{path} can't be read: {error}") from error
        if lines := changes(before, settings, prefix=""):
            raise UsageError(
                f"{self.folder} holds features that were begun otherwise:\n  " + "\n  ".join(lines) + "\n"
                "give the same options to go on, another --out, or delete that folder"
            )

    def compute(self, part: str, images: Images, network: nn.Module, data: DataConfig, compute: Compute) -> None:
        """Write the blocks of the images that are not there yet; all ranks have to call it.

        Args:
            part: of the data that the images are.

        Raises:
            CommandError: a file can't be written.
            LoadingError: a process that loads images failed.
        """
        missing = [number for number in range(n_blocks(images)) if not self._path(part, number).exists()]
        missing = distributed.all_gather_objects(missing)[0]
        done = n_blocks(images) - len(missing)
        if done:
            say(f"going on: {done:,} of {n_blocks(images):,} blocks of {part} images are in {self.folder}")
        own = [missing[index] for index in distributed.share(len(missing))]
        indices = [index for number in own for index in _range(images, number)]
        vectors: list[np.ndarray] = []
        reasons: list[str] = []
        written = iter(own)
        description = f"{part} features"
        with closing(features.extract_batches(network, images, data, compute, description, BATCH, indices)) as batches:
            for batch in batches:
                vectors.append(batch.features.cpu().numpy())
                reasons += batch.reasons
                if len(reasons) == BATCH * BATCHES or int(batch.indices[-1]) == len(images) - 1:
                    self._write(self._path(part, next(written)), Block(np.concatenate(vectors), np.array(reasons)))
                    vectors, reasons = [], []
        distributed.barrier()

    def _path(self, part: str, number: int) -> Path:
        return self.folder / f"{part}-{number:06d}.npz"

    @staticmethod
    def _write(path: Path, block: Block) -> None:
        content = io.BytesIO()
        np.savez(content, **block._asdict())
        checkpoint.write_atomically(path, lambda file: file.write(content.getbuffer()))

    def read(self, part: str, images: Images) -> Block:
        """All blocks, joined. Raises CommandError: one can't be read."""
        blocks = list(self._blocks(part, images))
        return Block(*(np.concatenate(arrays) for arrays in zip(*blocks, strict=True)))

    def _blocks(self, part: str, images: Images) -> Iterator[Block]:
        for number in range(n_blocks(images)):
            path = self._path(part, number)
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    yield Block(arrays["vectors"], arrays["reasons"])
            except (OSError, ValueError, KeyError) as error:
                raise CommandError(f"{path} can't be read: {error}: delete it and start again") from error


def n_blocks(images: Images) -> int:
    return -(-len(images) // (BATCH * BATCHES))


def _range(images: Images, number: int) -> range:
    """The images of a block."""
    return range(number * BATCH * BATCHES, min((number + 1) * BATCH * BATCHES, len(images)))
