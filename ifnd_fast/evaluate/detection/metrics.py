"""Detections in COCO's format of results, and their average precision as COCO measures it (by pycocotools)."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""COCO's: mean over IoU .50 to .95, at .50, at .75; of small (area below 32^2 pixels), medium, large (above 96^2)"""


def to_results(image_id: int, output: dict[str, Tensor], category_ids: list[int]) -> list[dict[str, Any]]:
    """An image's detections as COCO's results.

    Args:
        output: of torchvision's Mask R-CNN: boxes (n, 4) x1 y1 x2 y2, labels (n,), scores (n,), masks (n, 1, H, W)
            from 0 to 1, of which what is above 0.5 counts.
        category_ids: COCO's; that of label l is category_ids[l - 1].
    """
    boxes, labels, scores = (output[name].cpu().tolist() for name in ("boxes", "labels", "scores"))
    masks = (output["masks"][:, 0] > 0.5).cpu().numpy().astype(np.uint8)
    results = []
    for (x1, y1, x2, y2), label, score, mask in zip(boxes, labels, scores, masks, strict=True):
        shape = run_lengths.encode(np.asfortranarray(mask))
        results.append({
            "image_id": image_id, "category_id": category_ids[label - 1], "score": score,
            "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": {**shape, "counts": shape["counts"].decode()},
        })  # fmt: skip
    return results


def average_precision(
    coco: COCO, results: list[dict[str, Any]], image_ids: list[int] | None = None
) -> dict[str, float | None]:
    """box_AP, box_AP50, ... and mask_AP, ... of NAMES, percent; None where there is no object of that size.

    Args:
        coco: the true objects.
        results: of all its images, as :func:`to_results` makes them.
        image_ids: of the images that count; default: all.
    """
    figures: dict[str, float | None] = {}
    for kind, iou_type, other in (("box", "bbox", "segmentation"), ("mask", "segm", "bbox")):
        # With its box in it, a mask's detection would count as small, medium or large by the area of the box.
        own = [{name: value for name, value in result.items() if name != other} for result in results]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            evaluation = COCOeval(coco, _detections(coco, own), iou_type)
            if image_ids is not None:
                evaluation.params.imgIds = image_ids
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for name, value in zip(NAMES, evaluation.stats, strict=False):
            figures[f"{kind}_{name}"] = None if value < 0 else 100 * float(value)
    return figures


def _detections(coco: COCO, results: list[dict[str, Any]]) -> COCO:
    if results:
        return coco.loadRes(results)
    nothing = COCO()  # loadRes fails on an empty list
    nothing.dataset = {**coco.dataset, "annotations": []}
    nothing.createIndex()
    return nothing
