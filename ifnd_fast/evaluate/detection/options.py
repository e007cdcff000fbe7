"""What a detection fine-tuning is asked for: the command's options, and the schedule that they leave open."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ifnd_fast.config import MOMENTUM, RANK_TIMEOUT, SEED, MayChange, at_least, check
from ifnd_fast.runtime.paths import refuse_file, refuse_folder

ITERATIONS = {"1x": 90_000, "2x": 180_000}
REFERENCE_BATCH, REFERENCE_LR, REFERENCE_WARMUP = 16, 0.02, 1000
SMALLEST_NORMALISED_BATCH = 8
"""images, of all ranks, from which on --batch-norm auto trains batch norm"""
NOT_NEGATIVE = at_least(0, words="a finite number of 0 or more")
SIDES = at_least(1, words="one or more sides of 1 or more pixels", empty=False)


@dataclass
class DetectionOptions:
    checkpoint: tyro.conf.Positional[MayChange[Path]]
    """a run's folder, its backbone.pt, or a file of weights with the names of torchvision's ResNets (with any prefix,
    in any mapping, of torch.save or safetensors)"""
    data: MayChange[Path | None] = None
    """folder of COCO data: annotations/instances_train2017.json and instances_val2017.json, and their images in
    train2017/ and val2017/, there or in images/ (anything may stand for 2017)"""
    train_images: MayChange[Path | None] = None
    """folder of the images to train on, where --data has another layout"""
    train_annotations: MayChange[Path | None] = None
    """their annotations, COCO's instances JSON"""
    val_images: MayChange[Path | None] = None
    """folder of the images to measure on"""
    val_annotations: MayChange[Path | None] = None
    """their annotations"""
    out: MayChange[Path | None] = None
    """folder for checkpoints/, metrics.jsonl, model.pt (the Mask R-CNN), detections.json (in COCO's format of results)
    and result.json; default: detection/ in the run's folder, or beside the file of weights; detection-step-STEP/ of
    one of a run's checkpoints"""
    resume: MayChange[bool] = False
    """go on in --out from the last checkpoint"""
    export_detectron2: MayChange[Path | None] = None
    """write the backbone to this file, NAME.pkl, for detectron2, and print the configuration that goes with it
    (INPUT.FORMAT RGB, MODEL.PIXEL_MEAN and PIXEL_STD of 0 to 255, RESNETS.STRIDE_IN_1X1 False, ...); without --data
    that is all"""
    step: Annotated[MayChange[int | Literal["latest"] | None], tyro.conf.arg(name="checkpoint")] = None
    """which of a run's checkpoints to start from, by its step, or the latest; default: its final backbone.pt, or the
    latest of a run that has not ended"""
    arch: MayChange[str | None] = None
    """architecture of bare weights, such as resnet50; default: told by their names and shapes"""
    encoder: MayChange[str | None] = None
    """which encoder, where a file of weights holds several: its name in there, such as backbone_momentum"""
    schedule: MayChange[Literal["1x", "2x"]] = "1x"
    """Detectron's, which MoCo's paper (He et al., 2020, section 4.2) takes: 90,000 iterations (2x: 180,000) of 16
    images, lr 0.02 after a linear warm-up over 1,000 iterations from a thousandth of it. With a --batch-size of B the
    lr is B/16 of that, iterations and warm-up 16/B"""
    batch_size: Annotated[int, at_least(1)] = 16
    """images per iteration, over all ranks"""
    iterations: Annotated[int | None, at_least(1)] = None
    """iterations, instead of the schedule's"""
    lr: Annotated[float | None, NOT_NEGATIVE] = None
    """learning rate after warm-up, instead of the schedule's"""
    warmup: Annotated[int | None, NOT_NEGATIVE] = None
    """iterations of warm-up, instead of the schedule's (at most a tenth of all)"""
    drops: tuple[int, ...] | None = None
    """iterations after which lr is divided by 10; default: two thirds and eight ninths of all, as in both schedules"""
    sgd_momentum: Annotated[float, MOMENTUM] = 0.9
    """momentum of SGD"""
    weight_decay: Annotated[float, at_least(0)] = 1e-4
    """L2 penalty on all parameters but batch norm's"""
    batch_norm: Literal["auto", "sync", "frozen"] = "auto"
    """sync: trained, over the images of all ranks, also in the feature pyramid (MoCo's choice); frozen: keeps the
    backbone's statistics and weights; auto: sync on GPUs from 8 images per iteration on, else frozen"""
    min_size: Annotated[tuple[int, ...], SIDES] = (640, 672, 704, 736, 768, 800)
    """shorter side of a training image, pixels, one at random; measured at the last"""
    max_size: Annotated[int, at_least(1)] = 1333
    """longest longer side, pixels"""
    device: MayChange[str] = "auto"
    """"auto" (CUDA when there, else CPU), "cpu", "cuda", "cuda:1", ..."""
    amp: Literal["auto", "fp16", "bf16", "off"] = "off"
    """mixed precision (off as in the paper); auto: bf16 on GPUs since Ampere and CPUs that have it, fp16 on older
    GPUs"""
    workers: Annotated[MayChange[int], NOT_NEGATIVE] = 4
    """processes per rank that load images; 0: in the training process"""
    strict: MayChange[bool] = False
    """stop at an image that can't be read, instead of a warning: in training the next one stands in for it, in
    measuring it is left out"""
    seed: Annotated[int, SEED] = 0
    """of new layers' weights, order, flips, sizes and sampled proposals"""
    log_every: Annotated[MayChange[int], at_least(1)] = 20
    """iterations between lines of the losses"""
    checkpoint_every: Annotated[MayChange[int], at_least(1)] = 1000
    """iterations between checkpoints"""
    rank_timeout: Annotated[MayChange[float], RANK_TIMEOUT] = 30.0
    """minutes after which a rank that does not answer ends the run, with several ranks"""
    json_file: MayChange[Path | None] = None
    """write the figures to this file too"""


def resolve(options: DetectionOptions, device: torch.device) -> DetectionOptions:
    """The options with what was left to the schedule and the device.

    Raises:
        UsageError: a value out of range, named with the range.
    """
    if options.out is not None:
        refuse_file("--out", options.out)
    for option, path in (("--json-file", options.json_file), ("--export-detectron2", options.export_detectron2)):
        if path is not None:
            refuse_folder(option, path)
    check(options)
    scale = options.batch_size / REFERENCE_BATCH
    iterations = options.iterations or round(ITERATIONS[options.schedule] / scale)
    batch_norm = options.batch_norm
    if batch_norm == "auto":
        enough = options.batch_size >= SMALLEST_NORMALISED_BATCH
        batch_norm = "sync" if device.type == "cuda" and enough else "frozen"
    return dataclasses.replace(
        options,
        iterations=iterations,
        lr=REFERENCE_LR * scale if options.lr is None else options.lr,
        warmup=min(round(REFERENCE_WARMUP / scale), iterations // 10) if options.warmup is None else options.warmup,
        drops=(round(iterations * 2 / 3), round(iterations * 8 / 9)) if options.drops is None else options.drops,
        batch_norm=batch_norm,
    )


def learning_rate(step: int, options: DetectionOptions) -> float:
    """At a step (from 0) of resolved options: linear warm-up from lr / 1000, then a tenth after each drop."""
    assert options.lr is not None and options.warmup is not None and options.drops is not None
    done = step / options.warmup if step < options.warmup else 1.0
    passed = sum(step >= drop for drop in options.drops)
    return options.lr * (0.001 * (1 - done) + done) * 0.1**passed
