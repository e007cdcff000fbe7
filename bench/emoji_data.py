"""python bench/emoji_data.py --packages FOLDER --out data/emoji: 11,343 colour images with a hierarchy of classes.

Emoji as three vendors draw them, from npm packages whose images are under open licences (`npm pack
emoji-datasource-google emoji-datasource-twitter openmoji` puts them into a folder): Noto (Apache 2.0), Twemoji
(CC BY 4.0) and OpenMoji (CC BY-SA 4.0). Needs resvg-py, which draws OpenMoji's vectors.

Writes OUT/subgroups/{train,val}/GROUP--SUBGROUP/*.png (98 classes) and OUT/groups/{train,val}/GROUP/*.png, the same
files linked under the 9 coarser classes, on white. A fifth of the emoji of each subgroup are for val: all drawings of
one, in every skin tone, are on one side.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

RASTERS = {
    "noto": ("emoji-datasource-google", "img/google/64"),
    "twemoji": ("emoji-datasource-twitter", "img/twitter/64"),
}
VAL_SHARE = 0.2


@dataclass
class Options:
    """Make a folder of emoji images."""

    packages: Path
    """folder of the three packages' .tgz files"""
    out: Path = Path("data/emoji")
    """folder to write"""
    size: int = 40
    """side of an image, pixels"""


@dataclass(frozen=True)
class Emoji:
    """One emoji, without its skin tones."""

    code: str
    group: str
    subgroup: str


def package(folder: Path, name: str) -> tarfile.TarFile:
    found = sorted(folder.glob(f"{name}-[0-9]*.tgz"))
    if not found:
        sys.exit(f"{folder} has no {name}-*.tgz: run `npm pack {name}` there")
    return tarfile.open(found[-1])


def plain(code: str) -> str:
    """Code points in lower case without variation selectors, by which the packages' file names differ."""
    return code.lower().replace("-fe0f", "")


def read_emoji(folder: Path) -> dict[str, Emoji]:
    """Every drawing's code, skin tones included, and its emoji; components (tones and hair alone) are left out."""
    with package(folder, "emoji-datasource-google") as archive:
        listed = json.load(archive.extractfile("package/emoji.json"))  # type: ignore[arg-type]
    emoji = {}
    for entry in listed:
        if entry["category"] == "Component":
            continue
        own = Emoji(plain(entry["unified"]), slug(entry["category"]), slug(entry["subcategory"]))
        for drawn in [entry, *entry.get("skin_variations", {}).values()]:
            emoji[plain(drawn["unified"])] = own
    return emoji


def slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def drawings(folder: Path, emoji: dict[str, Emoji], size: int) -> Iterator[tuple[str, str, Image.Image]]:
    """(vendor, code, drawing) of every known code."""
    import resvg_py

    for vendor, (name, path) in RASTERS.items():
        with package(folder, name) as archive:
            for member in archive:
                file = Path(member.name)
                if str(file.parent) == f"package/{path}" and plain(file.stem) in emoji:
                    yield vendor, plain(file.stem), Image.open(archive.extractfile(member))  # type: ignore[arg-type]
    with package(folder, "openmoji") as archive:
        for member in archive:
            file = Path(member.name)
            if str(file.parent) == "package/color/svg" and plain(file.stem) in emoji:
                vector = archive.extractfile(member).read().decode()  # type: ignore[union-attr]
                side = 2 * size
                drawn = resvg_py.svg_to_bytes(svg_string=vector, width=side, height=side, skip_system_fonts=True)
                yield "openmoji", plain(file.stem), Image.open(io.BytesIO(bytes(drawn)))


def on_white(drawn: Image.Image, size: int) -> Image.Image:
    drawn = drawn.convert("RGBA")
    canvas = Image.new("RGBA", drawn.size, "white")
    canvas.alpha_composite(drawn)
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def held_out(emoji: dict[str, Emoji]) -> set[Emoji]:
    """A fifth of each subgroup's emoji, at least one where there are two, always the same."""
    dice, chosen = np.random.default_rng(0), set[Emoji]()
    every = sorted(set(emoji.values()), key=lambda one: (one.group, one.subgroup, one.code))
    for key in sorted({(one.group, one.subgroup) for one in every}):
        members = [one for one in every if (one.group, one.subgroup) == key]
        count = min(len(members) - 1, max(1, round(VAL_SHARE * len(members))))
        chosen |= {members[i] for i in dice.permutation(len(members))[:count]}
    return chosen


def main(options: Options) -> None:
    emoji = read_emoji(options.packages)
    val, counts = held_out(emoji), {"train": 0, "val": 0}
    for vendor, code, drawn in drawings(options.packages, emoji, options.size):
        own = emoji[code]
        split = "val" if own in val else "train"
        counts[split] += 1
        file = options.out / "subgroups" / split / f"{own.group}--{own.subgroup}" / f"{vendor}-{code}.png"
        link = options.out / "groups" / split / own.group / file.name
        for path in (file, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        on_white(drawn, options.size).save(file)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(file, link.parent))
    classes = {(one.group, one.subgroup) for one in emoji.values()}
    print(f"{counts['train']} training and {counts['val']} validation images of {len(set(emoji.values()))} emoji in "
          f"{len(classes)} subgroups of {len({group for group, _ in classes})} groups: {options.out}")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options))
