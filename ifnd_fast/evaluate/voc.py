"""PASCAL VOC's images, with the classes that each of them shows."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from torchvision.datasets import VOCDetection

from ifnd_fast.data.images import FileImages
from ifnd_fast.runtime.console import track
from ifnd_fast.runtime.errors import CommandError, UsageError

IGNORED = -1


class VocImages(FileImages):
    """Images of a split, with several classes each.

    Attributes:
        targets: (N, C) int8: 1 where an object of the class is in the image, 0 where none is, IGNORED where all of
            them are marked as difficult (VOC's own rule: such images count neither way).
    """

    def __init__(self, files: list[Path], targets: np.ndarray, class_names: list[str]):
        super().__init__(files, class_names=class_names)
        self.targets = targets


def find_voc(data: str) -> Path | None:
    """The folder VOCdevkit/VOC<year> that is meant by itself, or by VOCdevkit, or by the folder it is in.

    Raises:
        UsageError: there are several years.
    """
    root = Path(data).expanduser()
    for years in ([root], sorted(root.glob("VOC2*")), sorted(root.glob("VOCdevkit/VOC2*"))):
        years = [year for year in years if (year / "ImageSets" / "Main").is_dir()]
        if len(years) > 1:
            raise UsageError(f"--data {data}: which of {', '.join(map(str, years))}? Name it")
        if years:
            return years[0]
    return None


def open_voc(year: Path) -> tuple[VocImages, VocImages]:
    """The splits trainval and test; train and val where there is no test list (VOC since 2008 keeps it back).

    Raises:
        UsageError: not the layout that torchvision's VOCDetection reads.
        CommandError: an annotation can't be read.
    """
    tested = (year / "ImageSets" / "Main" / "test.txt").is_file()
    splits = {name: _open(year, name) for name in (("trainval", "test") if tested else ("train", "val"))}
    train, test = (_shown_classes(split, name) for name, split in splits.items())
    class_names = sorted({name for image in train for name in image})
    if len(class_names) < 2:
        raise UsageError(f"--data {year}: its annotations have {len(class_names)} classes")
    opened = []
    for split, shown in zip(splits.values(), (train, test), strict=True):
        targets = np.array([[image.get(name, 0) for name in class_names] for image in shown], dtype=np.int8)
        opened.append(VocImages([Path(file) for file in split.images], targets, class_names))
    return opened[0], opened[1]


def _open(year: Path, split: str) -> VOCDetection:
    if year.parent.name != "VOCdevkit":
        raise UsageError(f"--data {year}: torchvision's VOCDetection wants it in a folder named VOCdevkit")
    try:
        return VOCDetection(str(year.parent.parent), year.name.removeprefix("VOC"), split)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UsageError(f"--data {year}: torchvision's VOCDetection can't read its {split} split: {error}") from error


def _shown_classes(split: VOCDetection, name: str) -> list[dict[str, int]]:
    """For each image its classes, with 1, or IGNORED where all objects of the class are difficult."""
    images = []
    for file in track(split.annotations, f"{name} annotations", len(split.annotations)):
        try:
            annotation = split.parse_voc_xml(ElementTree.parse(file).getroot())["annotation"]
            shown: dict[str, int] = {}
            for thing in annotation.get("object", []):
                easy = thing.get("difficult", "0") != "1"
                shown[thing["name"]] = 1 if easy or shown.get(thing["name"]) == 1 else IGNORED
        except (OSError, ElementTree.ParseError, KeyError, AttributeError, TypeError) as error:
            raise CommandError(f"the annotation {file} can't be read: {error!r}") from error
        images.append(shown)
    return images
