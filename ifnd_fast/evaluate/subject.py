"""What is common to all evaluations: the options, the network that is measured, and how figures are written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from ifnd_fast.config import DataConfig, at_least, check, full_data, full_path
from ifnd_fast.data import features
from ifnd_fast.data.images import Images
from ifnd_fast.data.unreadable import Unreadable
from ifnd_fast.evaluate.backbone import load_backbone
from ifnd_fast.evaluate.labelled import RunData
from ifnd_fast.runtime import distributed, run_folder
from ifnd_fast.runtime.compute import leave_cores_to_workers, pick_compute
from ifnd_fast.runtime.console import say, table
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.runtime.paths import refuse_folder
from ifnd_fast.training import saved_run
from ifnd_fast.training.saved_state import SavedState


@dataclass
class Options:
    """Options of every task."""

    checkpoint: tyro.conf.Positional[Path]
    """a run's folder, its backbone.pt, or a file of weights with the names of torchvision's ResNets (with any prefix,
    in any mapping, of torch.save or safetensors)"""
    data: str | None = None
    """demo, cifar10, cifar100, or a folder of images in one sub-folder per class, or with train/ and val/ of such;
    without a test part every tenth image is held out as one; default: the run's own"""
    data_root: Path | None = None
    """folder for downloaded data sets; default: the run's own"""
    arch: str | None = None
    """architecture of bare weights, such as resnet50, or timm:vit_small_patch16_224; default: of ResNets told by their
    names and shapes"""
    encoder: str | None = None
    """which encoder, where a file of weights holds several: its name in there, such as backbone_momentum"""
    image_size: Annotated[int | None, at_least(1)] = None
    """side of the views, pixels; default: what the run trained with, 224 for bare weights"""
    workers: Annotated[int | None, at_least(0)] = None
    """processes that load images; 0: none; default: the run's own"""
    device: str = "auto"
    """"auto" (CUDA when there, else CPU), "cpu", "cuda", "cuda:1", ..."""
    amp: Literal["auto", "fp16", "bf16", "off"] | None = None
    """mixed precision, as in training; default: the run's own"""
    strict: bool = False
    """stop at an unreadable image, as a run with --strict does; otherwise it is left out of every figure, with a
    warning"""
    json_file: Path | None = None
    """write the figures to this file too"""
    step: Annotated[int | Literal["latest"] | None, tyro.conf.arg(name="checkpoint")] = None
    """which of a run's checkpoints to measure, by its step, or the latest; default: its final backbone.pt, or the
    latest of a run that has not ended"""


class Subject:
    """The network that is measured, on its device, and the run's data options with what was asked for instead.

    Args:
        several_ranks: the evaluation may compute on several; all of them have to make it.

    Attributes:
        state: the run's checkpoint that is measured; None: its backbone.pt, or bare weights.

    Raises:
        CommandError, UsageError: the checkpoint can't be used, or an option is out of range.
    """

    def __init__(self, options: Options, several_ranks: bool = False):
        self.options = options
        check(options)
        if not several_ranks:
            distributed.refuse_ranks("this evaluation")
        check_json_file(options.json_file)
        self.state = chosen_state(options.checkpoint, options.step, options.json_file)
        self.unreadable: list[dict[str, str]] = []  # images met so far, {"image", "reason"} each
        found = load_backbone(options.checkpoint, options.arch, options.encoder, self.state, options.image_size)
        self.config, network, self.n_features = found
        self.data, self.network = self.config.data, network
        for name in ("data", "data_root", "image_size", "workers"):
            if getattr(options, name) is not None:
                setattr(self.data, name, getattr(options, name))
        self.data.strict = self.data.strict or options.strict
        if options.data is not None:
            self.data.data = full_data(options.data)
            self.data.hold_out = 0.0  # what the run held out was of its own images
        if options.data is None and self.config.identity:
            folder = options.checkpoint if options.checkpoint.is_dir() else options.checkpoint.parent
            self.data = RunData(**vars(self.data), run=folder, identity=self.config.identity)
        self.compute = pick_compute(options.device, options.amp or self.config.run.amp, self.config.amp_on_cpu)
        leave_cores_to_workers(self.compute.device, self.data.workers)
        self.layout = torch.channels_last if self.config.run.channels_last else torch.contiguous_format
        self.network.to(self.compute.device).to(memory_format=self.layout)

    def features(self, images: Images, description: str = "features") -> tuple[Tensor, Tensor]:
        """The backbone's features (N, n_features) float32 of the centre views, and which were readable, (N,) bool."""
        return self._extract(self.network, images, description)

    def readable_features(
        self, images: Images, description: str, network: nn.Module | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`features` (M, n_features) of the readable images, and their indices (M,); of `network` in place of the
        backbone, if given."""
        vectors, readable = self._extract(network or self.network, images, description)
        return vectors[readable].cpu().numpy(), readable.nonzero().flatten().cpu().numpy()

    def _extract(self, network: nn.Module, images: Images, description: str) -> tuple[Tensor, Tensor]:
        """The unreadable images are warned of, and kept in mind for the figures.

        Raises:
            CommandError: none can be read, or the run is --strict and one can't.
        """
        unreadable = Unreadable(images, self.data.strict)
        found = features.extract(network, images, self.data, self.compute, description, unreadable=unreadable)
        self.remember(unreadable)
        return found

    def remember(self, unreadable: Unreadable) -> None:
        """Keep these images in mind for the figures."""
        known = {one["image"] for one in self.unreadable}
        self.unreadable += [one for one in unreadable.listed() if one["image"] not in known]

    def write_result(self, title: str, columns: list[str], rows: list[list[str]], figures: dict[str, Any]) -> None:
        """See `write_result`."""
        figures = {**figures, "unreadable": self.unreadable}
        write_result(self.options, self.data, title, columns, rows, figures, self.state)


def chosen_state(
    checkpoint: Path, step: int | Literal["latest"] | None, json_file: Path | None = None
) -> SavedState | None:
    """The checkpoint of a run that is measured, see `saved_run.chosen_state`, and a line that says so.

    Raises:
        UsageError, CommandError: as there; or --json-file holds the figures of another checkpoint.
    """
    state = saved_run.chosen_state(checkpoint, step)
    if state is not None:
        say(f"measuring {checkpoint} at {state.position}")
    if json_file is not None and json_file.is_file():
        try:
            there = json.loads(json_file.read_text())
            of_this_run, other = there.get("checkpoint") == str(full_path(checkpoint)), there.get("step")
        except (OSError, ValueError, AttributeError):  # something else
            return state
        if of_this_run and other != (state and state.step):
            what = "the final backbone" if other is None else f"step {other}"
            raise UsageError(f"--json-file {json_file} holds figures of {what} of this run: give another name")
    return state


def check_json_file(path: Path | None) -> None:
    """Raises UsageError: it can't be written; before long work that would be lost."""
    if path is not None:
        refuse_folder("--json-file", path)


def write_result(
    options: Options, data: DataConfig, title: str, columns: list[str], rows: list[list[str]], figures: dict[str, Any],
    state: SavedState | None = None,
) -> None:  # fmt: skip
    """Print a table, and write the figures with what they are of to --json-file.

    Args:
        state: the checkpoint that they are of.

    Raises:
        CommandError: the file can't be written.
    """
    table(title if state is None else f"{title}, {state.position}", columns, rows)
    if options.json_file is not None:
        at = {} if state is None else {"step": state.step, "epoch": state.epoch}
        figures = {"checkpoint": str(full_path(options.checkpoint)), **at, "data": data.data, **figures}
        run_folder.write_json(options.json_file, figures)
