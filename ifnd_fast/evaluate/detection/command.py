"""`ifnd-fast-eval detection`: COCO detection and segmentation from a backbone, or its export to detectron2."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tyro
from torchvision.models import ResNet

from ifnd_fast.evaluate.backbone import Backbone, load_backbone
from ifnd_fast.evaluate.detection import detectron2
from ifnd_fast.evaluate.detection.fine_tuning import FineTuning
from ifnd_fast.evaluate.detection.metrics import NAMES
from ifnd_fast.evaluate.detection.options import DetectionOptions
from ifnd_fast.evaluate.subject import chosen_state
from ifnd_fast.runtime import distributed, run_folder
from ifnd_fast.runtime.compute import leave_cores_to_workers, pick_compute
from ifnd_fast.runtime.console import say, table
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.training.saved_state import SavedState


def detection(options: tyro.conf.OmitArgPrefixes[DetectionOptions]) -> None:
    """COCO detection and instance segmentation: Mask R-CNN with a feature pyramid, fine-tuned from a backbone.

    The model is torchvision's, so its figures are to be compared among backbones; for detectron2's own take
    --export-detectron2. On several GPUs: torchrun --nproc-per-node 8 $(which ifnd-fast-eval) detection ...
    """
    distributed.ranks_in_environment()  # says what is wrong there
    compute = pick_compute(options.device, options.amp)
    leave_cores_to_workers(compute.device, options.workers)
    distributed.start(compute.device, options.rank_timeout)
    state = _state(options)
    if state is not None and options.out is None:
        options = dataclasses.replace(options, out=options.checkpoint / f"detection-step-{state.step}")
    backbone = load_backbone(options.checkpoint, options.arch, options.encoder, state)
    if not isinstance(backbone.network, ResNet):
        raise UsageError(f"detection is Mask R-CNN on torchvision's ResNets, not {backbone.config.model.arch}")
    if options.export_detectron2 is not None:
        if distributed.rank() == 0:
            _export(backbone, options.export_detectron2)
        if options.data is None and options.train_annotations is None:
            return
    tuning = FineTuning(backbone, options, compute)
    with tuning.open():
        figures = tuning.fit()
    if distributed.rank() == 0:
        _write_result(figures, options.json_file, state)


def _state(options: DetectionOptions) -> SavedState | None:
    """The run's checkpoint to start from, the same on all ranks; None: its backbone.pt, or bare weights."""
    with distributed.raise_on_all_ranks(True):
        state = chosen_state(options.checkpoint, options.step, options.json_file)
    steps = set(distributed.all_gather_objects(state and state.step))
    if len(steps) > 1:
        raise CommandError(f"{options.checkpoint} wrote a checkpoint meanwhile: give one of --checkpoint {steps}")
    return state


def _write_result(figures: dict[str, Any], json_file: Path | None, state: SavedState | None) -> None:
    rows = [
        [kind, *("-" if (value := figures[f"{kind}_{name}"]) is None else f"{value:.2f}" for name in NAMES)]
        for kind in ("box", "mask")
    ]
    at = f", {state.position}" if state else ""
    table(f"COCO average precision on {figures['data']}, percent{at}", ["", *NAMES], rows)
    if json_file is not None:
        run_folder.write_json(json_file, {**({"step": state.step, "epoch": state.epoch} if state else {}), **figures})


def _export(backbone: Backbone, path: Path) -> None:
    settings = detectron2.export(backbone, path)
    say(f"{path}: in detectron2's configuration (of Base-RCNN-FPN.yaml, say) it needs\n{settings}")
