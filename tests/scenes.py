"""A small COCO-format data set: scikit-learn's handwritten digits, pasted on crops of its two photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as run_lengths

HEIGHT, WIDTH, SCALE = 64, 80, 3
CATEGORIES = {7: "zero", 3: "one", 90: "four"}
"""COCO's ids, neither contiguous nor in order, and what they name."""
DIGITS = {7: 0, 3: 1, 90: 4}


def write(root: Path, pixels: np.ndarray, labels: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """Write ROOT/train2017, ROOT/val2017 and ROOT/annotations; the objects' masks (H, W), by split and number of their
    annotation. The last image of each split is without objects; in the one before there is a crowd."""
    from sklearn.datasets import load_sample_images

    rng, masks = np.random.default_rng(0), {}
    photographs = load_sample_images().images
    (root / "annotations").mkdir(parents=True)
    for split, n_images in (("train", 6), ("val", 4)):
        images, annotations = [], []
        (root / f"{split}2017").mkdir()
        for number in range(n_images):
            photograph = photographs[number % 2]
            top, left = int(rng.integers(photograph.shape[0] - HEIGHT)), int(rng.integers(photograph.shape[1] - WIDTH))
            scene = photograph[top : top + HEIGHT, left : left + WIDTH].copy()
            image = {"id": 1000 - 10 * number, "file_name": f"{number:012d}.png", "height": HEIGHT, "width": WIDTH}
            images.append(image)
            for place in range(2 if number < n_images - 1 else 0):
                category = list(CATEGORIES)[int(rng.integers(3))]
                digit = pixels[labels == DIGITS[category]][int(rng.integers(50))]
                mask = _paste(scene, digit, rng, place)
                crowd = number == n_images - 2 and place == 1
                form = "counts" if crowd else ("polygons", "counts", "string")[len(annotations) % 3]
                masks[split, len(annotations)] = mask
                annotations.append({
                    "id": len(annotations), "image_id": image["id"], "category_id": category, "bbox": _box(mask),
                    "segmentation": _segmentation(mask, form), "area": int(mask.sum()), "iscrowd": int(crowd),
                })  # fmt: skip
            Image.fromarray(scene).save(root / f"{split}2017" / image["file_name"])
        categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return masks


def _paste(scene: np.ndarray, digit: np.ndarray, rng: np.random.Generator, place: int) -> np.ndarray:
    """Draw a digit in white in the left (0) or right (1) half of a scene; its mask."""
    large = np.kron(digit, np.ones((SCALE, SCALE), dtype=np.uint8))
    top = int(rng.integers(0, HEIGHT - len(large)))
    left = int(rng.integers(0, WIDTH // 2 - len(large))) + place * WIDTH // 2
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[top : top + len(large), left : left + len(large)] = large > 0
    scene[mask > 0] = 255
    return mask


def _box(mask: np.ndarray) -> list[int]:
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return [int(v) for v in (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)]


def _segmentation(mask: np.ndarray, form: str) -> Any:
    """A mask as COCO's polygons (one for each run of pixels in a row), or run lengths, as numbers or compressed."""
    if form == "polygons":
        edges = np.diff(np.pad(mask.astype(int), ((0, 0), (1, 1))), axis=1)
        starts, ends = np.argwhere(edges == 1).tolist(), np.argwhere(edges == -1).tolist()  # of runs, row by row
        return [[x0, y, x1, y, x1, y + 1, x0, y + 1] for (y, x0), (_, x1) in zip(starts, ends, strict=True)]
    if form == "string":
        encoded = run_lengths.encode(np.asfortranarray(mask))
        return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}
    column_wise = mask.ravel(order="F")
    ends = [*np.nonzero(np.diff(column_wise))[0] + 1, len(column_wise)]
    counts = np.diff([0, *ends]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts if column_wise[0] == 0 else [0, *counts]}
