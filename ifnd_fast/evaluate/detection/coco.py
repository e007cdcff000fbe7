"""Images with annotated objects in COCO's format: where they lie, what is wrong with them, and a detector's targets."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from ifnd_fast.data.identity import Listing, content_of
from ifnd_fast.data.images import IN_A_ROW
from ifnd_fast.data.lists import sizes_of
from ifnd_fast.data.picture import UnreadablePictureError, open_picture, reason_of
from ifnd_fast.runtime.console import warn
from ifnd_fast.runtime.errors import CommandError, UsageError

FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
"""What each entry of an annotation file must have (cocodataset.org, "Data format")."""


def find(split: str, root: Path | None, images: Path | None, annotations: Path | None) -> tuple[Path, Path]:
    """The images' folder and the annotation file of a split, "train" or "val".

    As given, or in the layout that COCO comes in: ROOT/annotations/instances_train2017.json beside ROOT/train2017/
    (or ROOT/images/train2017/), and so for val, whatever follows `train` and `val` in the names.

    Raises:
        UsageError: there is nothing of the kind, or more than one.
    """
    if root is None and (images is None or annotations is None):
        raise UsageError(f"--data ROOT is needed, or both --{split}-images and --{split}-annotations")
    if root is not None and not root.is_dir():
        raise UsageError(f"--data {root}: no such folder")
    if annotations is None:
        assert root is not None
        found = sorted((root / "annotations").glob(f"instances_{split}*.json"))
        if len(found) != 1:
            what = f"{len(found)} files" if found else "no file"
            raise UsageError(
                f"--data {root}: {what} annotations/instances_{split}*.json in it; name one by --{split}-annotations"
            )
        annotations = found[0]
    if images is None:
        assert root is not None
        name = annotations.stem.removeprefix("instances_")
        folders = [folder for folder in (root / name, root / "images" / name) if folder.is_dir()]
        if not folders:
            raise UsageError(f"--data {root}: neither {name}/ nor images/{name}/ in it; name one by --{split}-images")
        images = folders[0]
    if not images.is_dir():
        raise UsageError(f"--{split}-images {images}: no such folder")
    return images, annotations


class CocoImages:
    """A folder of images and their objects.

    Args:
        folder: of the images.
        annotations: COCO's JSON file for them (instances_*.json).
        max_size: longer side, pixels, that the model shrinks an image to.

    Attributes:
        coco: the file's content, indexed by pycocotools.
        image_ids: COCO's, ascending; an image's number is its place here.
        category_ids: COCO's, ascending, with gaps or not; the label of category_ids[n] is n + 1, 0 is the background.

    Raises:
        UsageError: the file is missing or malformed, without images or objects, or an image of it is missing.
    """

    def __init__(self, folder: Path, annotations: Path, max_size: int = 1333):
        self.folder, self.path, self.max_size = folder, annotations, max_size
        self.coco = _index(_read(annotations))
        self.digest = content_of(np.fromfile(annotations, dtype=np.uint8))
        self.image_ids: list[int] = sorted(self.coco.imgs)
        self.category_ids: list[int] = sorted(self.coco.cats)
        self.labels = {category: label for label, category in enumerate(self.category_ids, start=1)}
        files = [self.file(index) for index in range(len(self))]
        self.sizes = sizes_of(files)
        if missing := [file for file, size in zip(files, self.sizes.tolist(), strict=True) if size < 0]:
            raise UsageError(f"{len(missing)} of the {len(self)} images of {annotations} are missing: {missing[0]} ...")

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, index: int) -> str:
        return str(self.file(index))

    def listing(self) -> Listing:
        """Which images and annotations these are."""
        names = [self.coco.imgs[image_id]["file_name"] for image_id in self.image_ids]
        return Listing(names, self.sizes, self.digest)

    def file(self, index: int) -> Path:
        return self.folder / self.coco.imgs[self.image_ids[index]]["file_name"]

    def image(self, index: int) -> Tensor:
        """(3, H, W) uint8, RGB, of the size that the annotations say.

        Upright by its EXIF orientation, as detectron2 and mmdetection read it, with boxes and masks in those pixels. An
        image that has the annotated size only as it is stored was annotated so, and is read so.

        Raises:
            OSError: it can't be read, it has another size, or it is too narrow for the model.
        """
        path, info = self.file(index), self.coco.imgs[self.image_ids[index]]
        wanted = (info["width"], info["height"])
        image = open_picture(path)
        if image.size != wanted and image.size[::-1] == wanted:
            image = open_picture(path, upright=False)
        size = "{} x {} pixels".format(*image.size)
        if image.size != wanted:
            raise UnreadablePictureError(path, f"{size}, its annotations say {wanted[0]} x {wanted[1]}")
        if max(wanted) > self.max_size * min(wanted):
            raise UnreadablePictureError(path, f"{size} leave nothing at a longer side of {self.max_size}")
        return pil_to_tensor(image)

    def objects(self, index: int) -> list[dict[str, Any]]:
        """The annotations to train on: no crowds, and no boxes without an area."""
        found = self.coco.imgToAnns[self.image_ids[index]]
        return [one for one in found if not one["iscrowd"] and (self._box(one)[2:] > self._box(one)[:2]).all()]

    def target(self, index: int) -> dict[str, Tensor]:
        """What torchvision's Mask R-CNN trains on: boxes (n, 4) float32 x1 y1 x2 y2 in pixels, labels (n,) int64, masks
        (n, H, W) uint8."""
        info, objects = self.coco.imgs[self.image_ids[index]], self.objects(index)
        masks = np.zeros((len(objects), info["height"], info["width"]), dtype=np.uint8)
        for mask, one in zip(masks, objects, strict=True):
            mask[:] = self.coco.annToMask(one)  # polygons and run lengths, compressed or not
        boxes = [self._box(one) for one in objects]
        return {
            "boxes": torch.from_numpy(np.array(boxes, dtype=np.float32).reshape(-1, 4)),
            "labels": torch.tensor([self.labels[one["category_id"]] for one in objects], dtype=torch.int64),
            "masks": torch.from_numpy(masks),
        }

    def _box(self, annotation: dict[str, Any]) -> np.ndarray:
        """x1 y1 x2 y2 within the image."""
        x, y, width, height = annotation["bbox"]
        info = self.coco.imgs[annotation["image_id"]]
        right, bottom = info["width"], info["height"]
        return np.clip([x, y, x + width, y + height], 0, [right, bottom, right, bottom])


class TrainingExamples(Dataset):
    """Item (epoch, number): an image (3, H, W) uint8 and its target, half of them flipped left to right, by seed, epoch
    and number alone; and the unreadable images that it stands in for, (number in `images`, reason) each: an image that
    can't be read is replaced by the next one that can.

    Images without an object to train on are left out, as Detectron does.

    Attributes:
        numbers: of the images that are left.
    """

    def __init__(self, images: CocoImages, seed: int):
        self.images, self.seed = images, seed
        self.numbers = [number for number in range(len(images)) if images.objects(number)]
        if not self.numbers:
            raise UsageError(f"{images.path}: no image has an object to train on (crowds and empty boxes don't count)")

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor], list[tuple[int, str]]]:
        """Raises CommandError: IN_A_ROW images in a row are unreadable."""
        epoch, wanted = item
        unreadable: list[tuple[int, str]] = []
        for offset in range(min(len(self), IN_A_ROW)):
            number = (wanted + offset) % len(self)
            index = self.numbers[number]
            try:
                image, target = self.images.image(index), self.images.target(index)
            except CommandError:  # a signal that asks the command to stop
                raise
            except Exception as error:
                unreadable.append((index, reason_of(error)))
                continue
            if np.random.default_rng([self.seed, epoch, number]).random() < 0.5:
                image, target["masks"] = image.flip(-1), target["masks"].flip(-1)
                target["boxes"][:, [0, 2]] = image.shape[-1] - target["boxes"][:, [2, 0]]
            return image, target, unreadable
        first, reason = unreadable[0]
        tried = len(unreadable)
        raise CommandError(f"{tried} images in a row can't be read, from {self.images.file(first)} on: {reason}")


class MeasuredImages(Dataset):
    """Item number: that number, and the image (3, H, W) uint8, or why it can't be read."""

    def __init__(self, images: CocoImages):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.images.image(index)
        except CommandError:
            raise
        except Exception as error:
            return index, reason_of(error)


def _index(content: dict[str, Any]) -> COCO:
    """pycocotools' index of an annotation file's content; areas that it lacks are filled in from the masks."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        coco.createIndex()
    for one in content["annotations"]:
        if "area" not in one:
            one["area"] = float(run_lengths.area(coco.annToRLE(one)))
    return coco


def _read(path: Path) -> dict[str, Any]:
    """An annotation file's content, checked.

    Raises:
        UsageError: what is wrong, and in which entry.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"annotations {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"annotations {path} are not JSON: {error}") from error
    for kind, fields in FIELDS.items():
        entries = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries:
            raise UsageError(f"annotations {path} have no {kind}: they should hold {', '.join(FIELDS)}, each a list")
        for number, entry in enumerate(entries):
            lacking = [field for field in fields if not isinstance(entry, dict) or field not in entry]
            if lacking:
                raise UsageError(f"annotations {path}: {kind}[{number}] lacks {', '.join(lacking)}")
    for kind in ("images", "categories"):
        if len({entry["id"] for entry in content[kind]}) < len(content[kind]):
            raise UsageError(f"annotations {path}: two {kind} have one id")
    content["annotations"] = _checked(content, path)
    return content


def _checked(content: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The annotations that have a shape, numbered from 1: to pycocotools a match with number 0 is none."""
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    kept: list[dict[str, Any]] = []
    for number, one in enumerate(content["annotations"]):
        where = f"annotations {path}: annotations[{number}]"
        if one["image_id"] not in sizes:
            raise UsageError(f"{where} is of image_id {one['image_id']}, which images lack")
        if one["category_id"] not in categories:
            raise UsageError(f"{where} is of category_id {one['category_id']}, which categories lack")
        box = one["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
            raise UsageError(f"{where} has bbox {box}; it should be x, y, width, height in pixels")
        shape = one.get("segmentation")
        if isinstance(shape, list):  # polygons: of fewer than 3 corners they have no area
            shape = [polygon for polygon in shape if len(polygon) >= 6 and len(polygon) % 2 == 0]
        elif isinstance(shape, dict) and list(shape.get("size", [])) != sizes[one["image_id"]]:
            raise UsageError(f"{where} has a mask of size {shape.get('size')}, its image {sizes[one['image_id']]}")
        if shape:
            kept.append({"iscrowd": 0, **one, "id": len(kept) + 1, "segmentation": shape})
    if not kept:
        raise UsageError(f"annotations {path}: none has a segmentation, which Mask R-CNN learns and is measured by")
    if left_out := len(content["annotations"]) - len(kept):
        warn(f"{path}: {left_out} annotations without a segmentation are left out")
    return kept


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
