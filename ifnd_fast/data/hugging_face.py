"""Images of Hugging Face's `datasets`: of the hub by name, or of a local folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ifnd_fast.data import picture
from ifnd_fast.data.folders import TEST, TRAIN
from ifnd_fast.data.identity import Listing, content_of
from ifnd_fast.data.lists import sizes_of
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.runtime.paths import shown

ROWS = 10_000  # that are looked at together
LABELS = ("label", "labels")


class HuggingFaceImages:
    """The images of a `datasets.Dataset`, decoded as pictures from files are; labels from its ClassLabel.

    Args:
        dataset: with a column of `datasets.Image`; of several, "image", "img" or the first.
        name: what to call it in messages.

    Raises:
        UsageError: it has no such column.
    """

    labels: np.ndarray | None = None
    class_names: list[str] | None = None

    def __init__(self, dataset: Any, name: str = "the data set"):
        import datasets

        features = dataset.features
        columns = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        if not columns:
            raise UsageError(f"--data {shown(name)}: no column of images, but {', '.join(features) or 'none'}")
        self.column = next((column for column in ("image", "img") if column in columns), columns[0])
        self.called = name
        self.dataset = dataset.cast_column(self.column, datasets.Image(decode=False))
        self._read_labels(features, datasets.ClassLabel)

    def _read_labels(self, features: Any, class_label: type) -> None:
        named = [column for column in LABELS if column in features]
        classes = [column for column, kind in features.items() if isinstance(kind, class_label)]
        choice = [*(column for column in named if column in classes), *classes, *named]
        if not choice:
            return
        column = choice[0]
        labels = np.asarray(self.dataset.select_columns([column]).with_format("numpy")[:][column])
        if labels.shape == (len(self),) and labels.dtype.kind in "iu" and not (labels < 0).any():  # -1: not known
            self.labels = labels.astype(np.int64)
            self.class_names = [shown(name) for name in features[column].names] if column in classes else None

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Image.Image:
        stored = self.dataset[int(index)][self.column]
        if stored is None:
            raise picture.UnreadablePictureError(self.name(index), "there is no image in this row")
        if stored["bytes"] is None:
            return picture.open_picture(stored["path"])
        return picture.decode_picture(stored["bytes"], self.name(index))

    def name(self, index: int) -> str:
        return f"{shown(self.called)}, row {index}"

    def listing(self) -> Listing:
        """By the images' bytes and the labels: where the data lie, and what `datasets` calls them, is left out."""
        import pyarrow.compute as arrow

        sizes = np.full(len(self), -1, dtype=np.int64)
        rows = self.dataset.select_columns([self.column]).with_format("arrow")
        for start in range(0, len(self), ROWS):
            column = rows[start : start + ROWS][self.column]
            lengths = arrow.binary_length(arrow.struct_field(column, "bytes"))
            sizes[start : start + ROWS] = arrow.fill_null(lengths, -1).to_numpy()
            if (missing := np.flatnonzero(sizes[start : start + ROWS] < 0)).size:  # they lie in files of their own
                paths = arrow.struct_field(column, "path").to_pylist()
                sizes[start + missing] = sizes_of([Path(paths[n] or os.devnull) for n in missing.tolist()])
        return Listing([], sizes, content_of(*(() if self.labels is None else (self.labels,))))


def open_hugging_face(name: str, split: str) -> HuggingFaceImages | None:
    """The images of a part.

    Args:
        name: on the hub, with ":" and a configuration where it has several; or a folder that `save_to_disk` wrote or
            `load_dataset` takes.
        split: "train" or "test"; of the latter None where there is none.

    Raises:
        UsageError: `datasets` is not installed, or there are no images.
        CommandError: it can't be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"--data hf:{shown(name)}: pip install 'ifnd-fast[datasets]' first ({error})") from error
    folder = Path(name).expanduser()
    try:
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(str(folder))
        elif folder.is_dir():
            found = datasets.load_dataset(str(folder))
        else:
            hub, _, configuration = name.partition(":")
            found = datasets.load_dataset(hub, configuration or None)
    except Exception as error:  # its own classes, pyarrow's, those of the network
        raise CommandError(f"--data hf:{shown(name)} can't be loaded: {picture.reason_of(error)}") from error
    if isinstance(found, datasets.Dataset):
        return HuggingFaceImages(found, f"hf:{name}") if split == "train" else None
    parts = {part.lower(): part for part in found}
    wanted = TRAIN if split == "train" else TEST
    part = next((parts[part] for part in wanted if part in parts), None)
    if part is None and split == "train":
        if len(found) != 1:
            raise UsageError(f"--data hf:{shown(name)}: no part for training, but {', '.join(found)}")
        part = next(iter(found))
    return None if part is None else HuggingFaceImages(found[part], f"hf:{name}")
