"""COCO's format, in which tests/scenes.py writes: what a detector trains on, and how it is measured."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ifnd_fast.evaluate.detection import coco
from ifnd_fast.evaluate.detection.metrics import average_precision, to_results
from ifnd_fast.runtime.errors import CommandError, UsageError
from tests import scenes


@pytest.fixture(scope="module")
def written(digits, tmp_path_factory):
    """Folder and true masks by (split, number of the annotation)."""
    root = tmp_path_factory.mktemp("scenes") / "coco"
    return root, scenes.write(root, *digits)


def open_split(root, split="train"):
    return coco.CocoImages(*coco.find(split, root, None, None))


def content_of(root, split="train") -> dict:
    return json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())


# ---- data ----


def test_targets_are_the_masks_boxes_and_labels_that_were_drawn(written):
    root, masks = written
    images, content = open_split(root), content_of(root)
    assert images.image_ids == sorted(image["id"] for image in content["images"])
    assert images.category_ids == [3, 7, 90]
    seen = 0
    for index, image_id in enumerate(images.image_ids):
        true = [a for a in content["annotations"] if a["image_id"] == image_id and not a["iscrowd"]]
        target = images.target(index)
        assert target["masks"].shape == (len(true), scenes.HEIGHT, scenes.WIDTH)
        assert target["labels"].tolist() == [{3: 1, 7: 2, 90: 3}[a["category_id"]] for a in true]
        for one, mask, box in zip(true, target["masks"], target["boxes"].tolist(), strict=True):
            assert np.array_equal(mask.numpy(), masks["train", one["id"]])
            x, y, width, height = one["bbox"]
            assert box == [x, y, x + width, y + height]
            assert images.image(index)[:, mask > 0].min() == 255  # drawn in white, at that place of that image
            seen += 1
    assert seen == len(content["annotations"]) - 1  # all but the crowd


def test_training_leaves_out_images_without_objects_and_flips_half(written):
    images = open_split(written[0])
    examples = coco.TrainingExamples(images, seed=0)
    assert len(examples) == len(images) - 1
    flipped = 0
    for epoch in range(10):
        for number in range(len(examples)):
            image, target, unreadable = examples[epoch, number]
            assert not unreadable
            again = examples[epoch, number]
            assert torch.equal(image, again[0]) and torch.equal(target["boxes"], again[1]["boxes"])
            plain = images.image(examples.numbers[number])
            flipped += not torch.equal(image, plain)
            assert torch.equal(image, plain) or torch.equal(image, plain.flip(-1))
            for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
                assert image[:, mask > 0].min() == 255
                inside = mask[y1:y2, x1:x2]
                assert inside.sum() == mask.sum() and inside.any(0).all() and inside.any(1).all()
    assert 15 < flipped < 35


def test_other_layouts(written, tmp_path):
    root = written[0]
    shutil.copytree(root / "annotations", tmp_path / "annotations")
    for split in ("train2017", "val2017"):
        shutil.copytree(root / split, tmp_path / "images" / split)
    assert coco.find("val", tmp_path, None, None)[0] == tmp_path / "images" / "val2017"
    annotations = root / "annotations" / "instances_val2017.json"
    assert coco.find("val", None, root / "val2017", annotations) == (root / "val2017", annotations)
    assert coco.find("val", root, root / "train2017", None) == (root / "train2017", annotations)


def test_what_is_missing_is_named(written, tmp_path):
    root = written[0]
    with pytest.raises(UsageError, match="--data ROOT is needed, or both --train-images and --train-annotations"):
        coco.find("train", None, None, tmp_path / "x.json")
    with pytest.raises(UsageError, match="--data .*nowhere: no such folder"):
        coco.find("train", tmp_path / "nowhere", None, None)
    with pytest.raises(UsageError, match=r"no file annotations/instances_val\*.json in it; name one by --val-anno"):
        coco.find("val", tmp_path, None, None)
    shutil.copytree(root / "annotations", tmp_path / "annotations")
    with pytest.raises(UsageError, match="neither val2017/ nor images/val2017/ in it; name one by --val-images"):
        coco.find("val", tmp_path, None, None)
    shutil.copy(root / "annotations" / "instances_val2017.json", tmp_path / "annotations" / "instances_val2014.json")
    with pytest.raises(UsageError, match="2 files annotations/instances_val"):
        coco.find("val", tmp_path, None, None)
    (tmp_path / "val2017").mkdir()
    with pytest.raises(UsageError, match=r"4 of the 4 images of .*instances_val2017.json are missing: .*val2017/.*png"):
        coco.CocoImages(tmp_path / "val2017", tmp_path / "annotations" / "instances_val2017.json")


def change(kind: str, number: int, **values):
    def apply(content):
        entry = content[kind][number]
        entry.update(values)
        for name in [name for name, value in values.items() if value is None]:
            del entry[name]
        return content

    return apply


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda c: [], "have no images: they should hold images, annotations, categories"),
        (lambda c: c | {"images": []}, "have no images"),
        (lambda c: c | {"annotations": []}, "have no annotations"),
        (lambda c: c | {"categories": {}}, "have no categories"),
        (lambda c: c | {"annotations": [3]}, r"annotations\[0\] lacks image_id, category_id, bbox"),
        (change("images", 2, height=None), r"images\[2\] lacks height"),
        (change("images", 2, id=1000), "two images have one id"),
        (change("annotations", 1, image_id=5), r"annotations\[1\] is of image_id 5, which images lack"),
        (change("annotations", 1, category_id=8), r"annotations\[1\] is of category_id 8, which categories lack"),
        (change("annotations", 4, bbox=[1, 2, 3]), r"annotations\[4\] has bbox \[1, 2, 3\]; it should be x, y, width"),
        (change("annotations", 4, bbox=[1, 2, 3, float("nan")]), r"annotations\[4\] has bbox"),
        (change("annotations", 1, segmentation={"size": [3, 4], "counts": [12]}), r"mask of size \[3, 4\], its image"),
        (lambda c: c | {"annotations": [c["annotations"][0] | {"segmentation": []}]}, "none has a segmentation"),
    ],
)
def test_malformed_annotations_are_named(apply, message, written, tmp_path):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(apply(content_of(written[0]))))
    with pytest.raises(UsageError, match=message):
        coco.CocoImages(written[0] / "train2017", path)


def test_files_that_are_no_annotations(written, tmp_path):
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(UsageError, match="half.json are not JSON"):
        coco.CocoImages(written[0] / "train2017", tmp_path / "half.json")
    with pytest.raises(UsageError, match="none.json can't be read: No such file"):
        coco.CocoImages(written[0] / "train2017", tmp_path / "none.json")


def test_what_files_of_ones_own_lack_is_filled_in_or_left_out(written, tmp_path, capfd):
    root, masks = written
    content = content_of(root)
    for one in content["annotations"]:
        del one["area"], one["iscrowd"], one["id"]
    content["annotations"][3]["segmentation"] = [[1, 2, 3, 4]]  # no area
    content["annotations"][4]["bbox"][2] = 0
    (tmp_path / "own.json").write_text(json.dumps(content))
    images = coco.CocoImages(root / "train2017", tmp_path / "own.json")
    assert "1 annotations without a segmentation are left out" in capfd.readouterr().err
    kept = [masks["train", number] for number in range(10) if number != 3]
    assert [one["area"] for one in images.coco.dataset["annotations"]] == [mask.sum() for mask in kept]
    assert sum(len(images.objects(index)) for index in range(len(images))) == len(kept) - 1  # the empty box


def test_images_that_cannot_be_read_are_told_by_name(written, tmp_path):
    root = tmp_path / "coco"
    shutil.copytree(written[0], root)
    images = open_split(root)
    images.file(1).write_bytes(b"no image")
    examples = coco.TrainingExamples(images, seed=0)
    reason = "no picture in a format that can be read here"
    number = examples.numbers.index(1)
    image, target, unreadable = examples[0, number]
    stand_in = examples[0, number + 1]
    assert unreadable == [(1, reason)] and images.name(1).endswith(images.file(1).name)
    assert torch.equal(image, stand_in[0]) and torch.equal(target["boxes"], stand_in[1]["boxes"])
    assert coco.MeasuredImages(images)[1] == (1, reason)
    images.file(2).write_bytes((root / "train2017" / "000000000000.png").read_bytes())
    change_size = images.coco.imgs[images.image_ids[2]]
    change_size["width"] = 81
    with pytest.raises(OSError, match="80 x 64 pixels, its annotations say 81 x 64"):
        images.image(2)
    for index in range(len(images)):
        images.file(index).write_bytes(b"")
    with pytest.raises(CommandError, match=r"5 images in a row can't be read, from .*png on: the file is empty"):
        examples[0, 0]


@pytest.mark.parametrize("orientation, applied", [(1, True), (3, True), (6, True), (6, False), (8, True), (8, False)])
def test_orientation_is_applied_where_the_annotated_size_allows_it(orientation, applied, written, tmp_path):
    """As detectron2 does; an image that has the annotated size only as stored is read as stored."""
    root = tmp_path / "coco"
    shutil.copytree(written[0], root)
    images = open_split(root)
    upright = images.image(0)
    if applied and orientation != 1:
        stored = upright.rot90({3: 2, 6: 1, 8: -1}[orientation], dims=(1, 2))
    else:
        stored = upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored.permute(1, 2, 0).numpy()).save(images.file(0), exif=exif)
    assert torch.equal(images.image(0), upright)


def test_images_too_narrow_for_the_model_are_unreadable(written, tmp_path):
    root = tmp_path / "coco"
    shutil.copytree(written[0], root)
    images = coco.CocoImages(*coco.find("train", root, None, None), max_size=100)
    images.coco.imgs[images.image_ids[0]].update(width=101, height=1)
    Image.new("RGB", (101, 1)).save(images.file(0))
    with pytest.raises(OSError, match="101 x 1 pixels leave nothing at a longer side of 100"):
        images.image(0)


# ---- metrics ----


def perfect(images: coco.CocoImages, index: int) -> dict[str, torch.Tensor]:
    """Detections of exactly the true objects."""
    target = images.target(index)
    masks = target["masks"][:, None].float()
    return {**target, "scores": torch.linspace(0.9, 0.5, len(masks)), "masks": masks}


def results_of(images: coco.CocoImages, change=lambda output: output) -> list[dict]:
    found = [to_results(image_id, change(perfect(images, index)), images.category_ids)
             for index, image_id in enumerate(images.image_ids)]  # fmt: skip
    return [result for part in found for result in part]


def test_perfect_detections_have_full_precision_and_coco_ids(written):
    images = open_split(written[0], "val")
    results = results_of(images)
    true = {(a["image_id"], a["category_id"]) for a in content_of(written[0], "val")["annotations"] if not a["iscrowd"]}
    assert {(result["image_id"], result["category_id"]) for result in results} == true
    figures = average_precision(images.coco, results)
    for kind in ("box", "mask"):  # one of the annotations has the number 0, which pycocotools takes for no match
        assert [figures[f"{kind}_{name}"] for name in ("AP", "AP50", "AP75", "APs")] == [100.0] * 4
        assert figures[f"{kind}_APm"] is figures[f"{kind}_APl"] is None  # there are none


def test_wrong_or_no_detections_have_none(written):
    images = open_split(written[0], "val")
    other = results_of(images, lambda output: {**output, "labels": output["labels"] % 3 + 1})
    for results in (other, []):
        figures = average_precision(images.coco, results)
        assert figures["box_AP"] == figures["mask_AP"] == 0.0


def test_inexact_detections_are_measured_as_pycocotools_does(written, tmp_path):
    """By its own way from files, with annotations that are numbered from 1 on."""
    images = open_split(written[0])

    def shift(output):  # boxes by 3 pixels, masks by one
        return {**output, "boxes": output["boxes"] + 3, "masks": output["masks"].roll(1, -1)}

    results = results_of(images, shift)
    figures = average_precision(images.coco, results)
    content = content_of(written[0])
    for one in content["annotations"]:
        one["id"] += 1
    (tmp_path / "true.json").write_text(json.dumps(content))
    for kind, iou_type, other in (("box", "bbox", "segmentation"), ("mask", "segm", "bbox")):
        (tmp_path / "found.json").write_text(json.dumps([{k: v for k, v in r.items() if k != other} for r in results]))
        with contextlib.redirect_stdout(io.StringIO()):
            true = COCO(str(tmp_path / "true.json"))
            evaluation = COCOeval(true, true.loadRes(str(tmp_path / "found.json")), iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert [figures[f"{kind}_AP"], figures[f"{kind}_AP50"], figures[f"{kind}_AP75"]] == pytest.approx(
            100 * evaluation.stats[:3]
        )
        assert 5 < figures[f"{kind}_AP"] < 95
    assert figures["box_AP"] != figures["mask_AP"]
