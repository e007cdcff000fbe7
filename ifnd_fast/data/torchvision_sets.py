"""Images of torchvision's data sets for classification, by the names of their classes."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from PIL import Image

from ifnd_fast.data import picture
from ifnd_fast.data.identity import Listing, content_of
from ifnd_fast.data.lists import sizes_of
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.runtime.paths import canonical, shown

SPLITS = {"train": ("train", "trainval", "train-standard"), "test": ("test", "val", "valid")}
"""What the data sets call the parts, the usual first."""
SAMPLE = 64  # images that the identity is of, where the data set shows neither arrays nor files


class TorchvisionImages:
    """The images of a torchvision data set, or another that has (PIL image, target) by number; no transform.

    Args:
        dataset: its labels are its `targets`, `labels`, ..., where it has them.
    """

    labels: np.ndarray | None
    class_names: list[str] | None

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.samples = next((found for name in ("samples", "_samples", "imgs") if (found := self._of_each(name))), None)
        files = self.samples or next(
            (found for name in ("_image_files", "_images", "images") if (found := self._of_each(name))), None
        )
        self.files = None if files is None else [file[0] if isinstance(file, tuple) else file for file in files]
        if self.files is not None and not all(isinstance(file, str | os.PathLike) for file in self.files):
            self.files = None
        self.labels = self._labels()
        names = getattr(dataset, "classes", None)
        usable = (
            self.labels is not None and isinstance(names, list | tuple) and len(names) > self.labels.max(initial=-1)
        )
        self.class_names = [shown(" / ".join(name) if isinstance(name, tuple) else str(name)) for name in names or ()]
        self.class_names = self.class_names if usable else None

    def _of_each(self, name: str) -> list[Any] | None:
        found = getattr(self.dataset, name, None)
        return found if isinstance(found, list) and len(found) == len(self.dataset) else None

    def _labels(self) -> np.ndarray | None:
        found = [getattr(self.dataset, name, None) for name in ("targets", "labels", "_labels", "y")]
        if self.samples is not None and all(isinstance(sample, tuple) for sample in self.samples):
            found.append([sample[1] for sample in self.samples])
        for candidate in found:
            labels = np.asarray(candidate if candidate is not None else [])
            if labels.shape == (len(self.dataset),) and labels.dtype.kind in "iu" and not (labels < 0).any():
                return labels.astype(np.int64)
        return None

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Image.Image:
        item = self.dataset[int(index)]
        image = item[0] if isinstance(item, tuple) else item
        if not isinstance(image, Image.Image):
            raise TypeError(f"a data set without transforms gives PIL images, this one a {type(image).__name__}")
        return picture.to_rgb(image)

    def name(self, index: int) -> str:
        return shown(str(self.files[index])) if self.files is not None else f"image {index}"

    def listing(self) -> Listing:
        labels = () if self.labels is None else (self.labels,)
        if self.files is not None:
            root = str(getattr(self.dataset, "root", ""))
            names = [canonical(os.path.relpath(file, root) if root else str(file)) for file in self.files]
            return Listing(names, sizes_of([Path(file) for file in self.files]), content_of(*labels))
        data = getattr(self.dataset, "data", None)
        if data is not None and len(data) == len(self):
            pixels = np.asarray(data)
            return Listing([], np.full(len(self), pixels[:1].nbytes, dtype=np.int64), content_of(pixels, *labels))
        some = np.unique(np.linspace(0, len(self) - 1, min(SAMPLE, len(self))).astype(int)).tolist()
        looked_at = [np.asarray(self.image(index)) for index in some]
        return Listing([], np.full(len(self), -1, dtype=np.int64), content_of(*looked_at, *labels))


def open_torchvision(name: str, split: str, root: Path) -> TorchvisionImages | None:
    """The images of a part of `torchvision.datasets.NAME`, which is downloaded where it can be.

    Args:
        split: "train" or "test"; of the latter None where there is none.
        root: folder for downloads.

    Raises:
        UsageError: torchvision has no such data set, or not with that part.
        CommandError: it can't be opened or downloaded.
    """
    called = f"--data torchvision:{shown(name)}"
    kind = getattr(torchvision.datasets, name, None)
    base = torchvision.datasets.VisionDataset
    if not (isinstance(kind, type) and issubclass(kind, base) and kind is not base):
        raise UsageError(f"{called}: torchvision.datasets has no such data set of images")
    known = inspect.signature(kind).parameters
    options: dict[str, Any] = {"download": True} if "download" in known else {}
    if "root" in known:
        options["root"] = str(root)
    if "train" in known:
        choices: list[dict[str, Any]] = [{"train": split == "train"}]
    elif "split" in known:
        choices = [{"split": part} for part in SPLITS[split]]
    elif split == "test":
        return None
    else:
        choices = [{}]
    for choice in choices:
        try:
            return TorchvisionImages(kind(**options, **choice))
        except (ValueError, TypeError) as error:  # no such part, or more that it has to be told
            refused = error
        except (OSError, RuntimeError) as error:
            raise CommandError(f"{called}: it can't be opened or downloaded to {root}: {error}") from error
    if split == "test" and "split" in known:
        return None
    raise UsageError(f"{called} can't be opened: {refused}")
