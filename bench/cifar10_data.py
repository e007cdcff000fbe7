"""python bench/cifar10_data.py --sheets FOLDER --out data/cifar10: CIFAR-10 as folders of images, in a chosen size.

Reads a sheet for each class, FOLDER/{train,test}/CLASS.webp, lossless, 100 images of 32x32 a row (the sheets are no
part of the repository). Writes two data sets that share their training images, the first ones of each class:
OUT/choose/{train,val}, whose val/ is of further training images, to choose options by; and OUT/final/{train,test},
whose test/ is of the test images, for the figures that are told.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

SIDE = 32
A_ROW = 100


@dataclass
class Options:
    """Make folders of CIFAR-10 images."""

    sheets: Path
    """folder of the sheets"""
    out: Path = Path("data/cifar10")
    """folder to write"""
    train: int = 500
    """training images of each class"""
    val: int = 300
    """further training images of each class, to choose by"""
    test: int = 1000
    """test images of each class"""


def images_of(sheet: Path, first: int, count: int) -> np.ndarray:
    """(count, 32, 32, 3) uint8, from the `first` one on."""
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    rows = len(pixels) // SIDE
    images = pixels.reshape(rows, SIDE, A_ROW, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
    if first + count > len(images):
        sys.exit(f"{sheet} holds {len(images)} images, not {first + count}")
    return images[first : first + count]


def write(images: np.ndarray, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number:05}.png", compress_level=1)


def main(options: Options) -> None:
    for sheet in sorted((options.sheets / "train").glob("*.webp")):
        write(images_of(sheet, 0, options.train), options.out / "choose" / "train" / sheet.stem)
        write(images_of(sheet, options.train, options.val), options.out / "choose" / "val" / sheet.stem)
        tests = images_of(options.sheets / "test" / sheet.name, 0, options.test)
        write(tests, options.out / "final" / "test" / sheet.stem)
    link = options.out / "final" / "train"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(options.out / "choose" / "train", link.parent))
    print(f"{options.out}/choose and {options.out}/final: {options.train}, {options.val} and {options.test} images of "
          "each class for training, choosing and testing")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options))
