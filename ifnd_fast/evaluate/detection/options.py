"""What a detection fine-tuning is asked for: the command's options, and the schedule that they leave open."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from ifnd_fast.config import check_range
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.runtime.paths import refuse_file, refuse_folder

ITERATIONS = {"1x": 90_000, "2x": 180_000}
REFERENCE_BATCH, REFERENCE_LR, REFERENCE_WARMUP = 16, 0.02, 1000
SMALLEST_NORMALISED_BATCH = 8
"""images, of all ranks, from which on --batch-norm auto trains batch norm"""


@dataclass
class DetectionOptions:
    checkpoint: tyro.conf.Positional[Path]
    """a run's folder, its backbone.pt, or a file of weights with the names of torchvision's ResNets (plain or within
    {"state_dict": ...}, with any prefix)"""
    data: Path | None = None
    """folder of COCO data: annotations/instances_train2017.json and instances_val2017.json, and their images in
    train2017/ and val2017/, there or in images/ (anything may stand for 2017)"""
    train_images: Path | None = None
    """folder of the images to train on, where --data has another layout"""
    train_annotations: Path | None = None
    """their annotations, COCO's instances JSON"""
    val_images: Path | None = None
    """folder of the images to measure on"""
    val_annotations: Path | None = None
    """their annotations"""
    out: Path | None = None
    """folder for checkpoints/, metrics.jsonl, model.pt (the Mask R-CNN), detections.json (in COCO's format of results)
    and result.json; default: detection/ in the run's folder, or beside the file of weights"""
    resume: bool = False
    """go on in --out from the last checkpoint"""
    export_detectron2: Path | None = None
    """write the backbone to this file, NAME.pkl, for detectron2, and print the configuration that goes with it
    (INPUT.FORMAT RGB, MODEL.PIXEL_MEAN and PIXEL_STD of 0 to 255, RESNETS.STRIDE_IN_1X1 False, ...); without --data
    that is all"""
    arch: str | None = None
    """architecture of bare weights, such as resnet50; default: told by their names and shapes"""
    schedule: Literal["1x", "2x"] = "1x"
    """Detectron's, which MoCo's paper (He et al., 2020, section 4.2) takes: 90,000 iterations (2x: 180,000) of 16
    images, lr 0.02 after a linear warm-up over 1,000 iterations from a thousandth of it. With a --batch-size of B the
    lr is B/16 of that, iterations and warm-up 16/B"""
    batch_size: int = 16
    """images per iteration, over all ranks"""
    iterations: int | None = None
    """iterations, instead of the schedule's"""
    lr: float | None = None
    """learning rate after warm-up, instead of the schedule's"""
    warmup: int | None = None
    """iterations of warm-up, instead of the schedule's (at most a tenth of all)"""
    drops: tuple[int, ...] | None = None
    """iterations after which lr is divided by 10; default: two thirds and eight ninths of all, as in both schedules"""
    sgd_momentum: float = 0.9
    """momentum of SGD"""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters but batch norm's"""
    batch_norm: Literal["auto", "sync", "frozen"] = "auto"
    """sync: trained, over the images of all ranks, also in the feature pyramid (MoCo's choice); frozen: keeps the
    backbone's statistics and weights; auto: sync on GPUs from 8 images per iteration on, else frozen"""
    min_size: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """shorter side of a training image, pixels, one at random; measured at the last"""
    max_size: int = 1333
    """longest longer side, pixels"""
    device: str = "auto"
    """"auto" (CUDA when there, else CPU), "cpu", "cuda", "cuda:1", ..."""
    amp: Literal["auto", "fp16", "bf16", "off"] = "off"
    """mixed precision (off as in the paper); auto: bf16 on GPUs since Ampere and CPUs that have it, fp16 on older
    GPUs"""
    workers: int = 4
    """processes per rank that load images; 0: in the training process"""
    strict: bool = False
    """stop at an image that can't be read, instead of a warning: in training the next one stands in for it, in
    measuring it is left out"""
    seed: int = 0
    """of new layers' weights, order, flips, sizes and sampled proposals"""
    log_every: int = 20
    """iterations between lines of the losses"""
    checkpoint_every: int = 1000
    """iterations between checkpoints"""
    rank_timeout: float = 30.0
    """minutes after which a rank that does not answer ends the run, with several ranks"""
    json_file: Path | None = None
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
    for name in ("batch_size", "iterations", "max_size", "log_every", "checkpoint_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    for name in ("sgd_momentum", "weight_decay", "seed", "rank_timeout"):
        check_range(name, getattr(options, name))
    for name in ("lr", "warmup", "workers"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"--{name.replace('_', '-')} must be a finite number of 0 or more, got {value}")
    if not options.min_size or min(options.min_size) < 1:
        raise UsageError(f"--min-size must be one or more sides of 1 or more pixels, got {options.min_size}")
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


def decisive(options: DetectionOptions) -> dict[str, Any]:
    """The options that a resumed run must share, plain: with others it would compute something else."""
    names = (
        "iterations", "batch_size", "lr", "warmup", "drops", "sgd_momentum", "weight_decay", "batch_norm", "min_size",
        "max_size", "amp", "seed",
    )  # fmt: skip
    values = dataclasses.asdict(options)
    return {name: list(values[name]) if isinstance(values[name], tuple) else values[name] for name in names}
