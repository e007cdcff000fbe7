"""A run's folder: what training writes into it, and what it tells whoever reads it.

config.yaml, metrics.jsonl, result.json and backbone.pt; of the checkpoints in it see `saved_state`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from ifnd_fast import config as configs
from ifnd_fast.config import Config, DataConfig, to_yaml
from ifnd_fast.contrast.encoder import build
from ifnd_fast.data import identity
from ifnd_fast.data.images import Images
from ifnd_fast.data.sources import open_for_run
from ifnd_fast.runtime import checkpoint, run_folder
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.training.saved_state import SavedState

RESULT, BACKBONE = "result.json", "backbone.pt"
Epochs = list[dict[str, Any]]
"""The lines of metrics.jsonl, in order of "epoch"."""
SECONDS = {"training": "seconds", "features": "feature_seconds", "clustering": "cluster_seconds"}


@dataclass
class Run:
    """What a run folder tells. A broken file leaves its field empty and a line in `notes`."""

    name: str
    folder: Path
    epochs: Epochs  # never empty
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)  # empty: the run did not end (yet)
    state: SavedState = field(default_factory=SavedState)  # of the latest checkpoint
    notes: list[str] = field(default_factory=list)

    def option(self, section: str, name: str, default: Any = None) -> Any:
        values = self.config.get(section)
        return values.get(name, default) if isinstance(values, dict) else default

    @property
    def accuracies(self) -> dict[str, Any]:
        """The kNN accuracies known: before training from the checkpoint, and all from the result."""
        return {**self.state.accuracies, **self.result}

    @property
    def trained(self) -> tuple[float | None, int | None]:
        """kNN top-1 of the trained encoder, percent: the result's, or the last one measured and its epoch."""
        if (final := number(self.accuracies.get("knn_top1"))) is not None:
            return final, None
        for line in reversed(self.epochs):
            if (measured := number(line.get("knn_top1"))) is not None:
                return measured, line["epoch"]
        return None, None

    @property
    def seconds(self) -> float:
        """That it took, so far."""
        return number(self.result.get("seconds")) or sum(
            number(line.get(key)) or 0.0 for line in self.epochs for key in SECONDS.values()
        )

    @property
    def progress(self) -> str:
        """ "12 epochs" of a finished run, "epoch 3 of 12"."""
        epoch, planned = self.epochs[-1]["epoch"], self.option("optim", "epochs")
        return f"{epoch} epochs" if self.result else f"epoch {epoch}{f' of {planned}' if planned else ''}"

    @property
    def detection(self) -> str:
        """What the run does with false negatives: "eliminate", "attract", "keep" or "oracle"."""
        return str(self.option("contrast", "false_negatives", "eliminate"))

    @property
    def from_weights(self) -> bool:
        """Whether it began with given weights, not random ones."""
        return bool(self.option("model", "weights"))

    @property
    def levels(self) -> list[str]:
        """Names of the levels at which false negatives are detected; none for "keep"."""
        if self.detection == "keep":
            return []
        if self.detection == "oracle":
            return ["true classes"]
        found = self.state.levels
        clusters = self.option("cluster", "levels", []) if found is None else found
        return [f"{int(count):,} clusters" for count in clusters]


def read_run(out: Path) -> Run:
    """metrics.jsonl, config.yaml, result.json and the latest checkpoint. Raises as `write_report` does."""
    if not out.is_dir():
        raise FileNotFoundError(f"{out} is not a folder: give the --out folder of a run")
    metrics = out / run_folder.METRICS
    if not metrics.is_file():
        raise FileNotFoundError(f"{metrics} is missing: {out} holds no run that has finished an epoch")
    epochs, broken = _read_metrics(metrics)
    if not epochs:
        raise ValueError(f"{metrics} has no complete epoch yet: try again when the first one is done")
    run = Run(out.resolve().name, out, epochs)
    if broken:
        run.notes.append(f"metrics.jsonl: {broken} incomplete line{'s' if broken > 1 else ''} left out.")
    run.config = _read_mapping(out / run_folder.CONFIG, yaml.safe_load, run.notes)
    if not run.config:
        run.notes.append("There is no readable config.yaml, so the page shows no settings.")
    run.result = _read_mapping(out / RESULT, json.loads, run.notes)
    try:
        run.state = SavedState.latest(out)
    except CommandError as error:
        run.notes.append(f"Checkpoint: {error}.")
    return run


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Lines by epoch, and how many could not be read: a killed run leaves part of a line.

    A resumed run can repeat an epoch: the later line counts.
    """
    lines: dict[int, dict[str, Any]] = {}
    broken = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            epoch = int(line["epoch"])
            lines[epoch] = {**line, "epoch": epoch}
        except (ValueError, TypeError, KeyError, OverflowError):
            broken += 1
    return [lines[epoch] for epoch in sorted(lines)], broken


def _read_mapping(path: Path, parse: Callable[[str], Any], notes: list[str]) -> dict[str, Any]:
    """The mapping in a file; empty, with a note, if the file is broken, and empty if there is none."""
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path.name} can't be read ({type(error).__name__}).")
        return {}
    if not isinstance(values, dict):
        notes.append(f"{path.name} should hold a mapping, but holds {type(values).__name__}.")
        return {}
    return values


def number(value: Any) -> float | None:
    """A finite number as float; None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def duration(seconds: float) -> str:
    """ "48 s", "2 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def config_of(out: Path) -> Config:
    """What the run was started with. Raises CommandError: OUT holds no run, or its config.yaml can't be read."""
    return configs.load(out / run_folder.CONFIG)


def is_run(out: Path) -> bool:
    """Whether OUT is the folder of a run, or of one that is set up."""
    return (out / run_folder.CONFIG).exists()


def backbone_file(of: Path) -> tuple[Path, Path | None]:
    """The file with a backbone's weights, and the run's folder that it is of.

    Args:
        of: a run's folder, its backbone.pt or what ifnd-fast-export wrote beside it, or another file of weights.

    Raises:
        CommandError: config.yaml of the run can't be read, or there is no such file.
    """
    path = of / BACKBONE if of.is_dir() else of
    run = path.parent if of.is_dir() or (path.match("backbone*.pt") and is_run(path.parent)) else None
    if run is not None:
        config_of(run)
    if not path.is_file():
        raise CommandError(f"{path} is missing{f': the run in {of} has not ended yet' if of.is_dir() else ''}")
    return path, run


def has_checkpoint(out: Path) -> bool:
    return out.is_dir() and bool(checkpoint.list_checkpoints(out))


def chosen_state(out: Path, which: int | Literal["latest"] | None = None) -> SavedState | None:
    """The checkpoint that stands for a run: of a step, the newest, or by default the newest of a run that has not
    ended. None: it is backbone.pt that does, or `out` is no run's folder. The run may go on meanwhile.

    Raises:
        UsageError: `which` is given, but `out` is a file.
        CommandError: the run has no such checkpoint, or none yet.
    """
    if not out.is_dir():
        if which is not None:
            raise UsageError(f"--checkpoint {which} chooses among those of a run: {out} is not the folder of one")
        return None
    if which is None and (not is_run(out) or (out / BACKBONE).is_file()):
        return None
    if not has_checkpoint(out):
        config_of(out)  # says what is wrong if it is no run
        raise CommandError(
            f"{out} has no checkpoint yet: the first is written after --checkpoint-every epochs, and when the run is "
            "asked to stop"
        )
    return SavedState.at(out, which) if isinstance(which, int) else SavedState.latest(out)


def load_encoder(out: Path, config: Config, state: SavedState | None = None) -> nn.Module:
    """The momentum encoder of a run's newest checkpoint, on the CPU; of an in-batch run its only encoder.

    Args:
        state: a checkpoint of it in place of the newest.

    Raises:
        CommandError: `out` is no run's folder, or has no readable checkpoint, or it does not fit the config.
    """
    if not out.is_dir():
        raise UsageError(f"--features encoder: {out} is not the folder of a run; --features backbone works on it")
    state, encoder = state or SavedState.latest(out), build(config.model, config.data.image_size)()
    try:
        encoder.load_state_dict(state.encoder)
    except RuntimeError as error:
        raise CommandError(f"step {state.step} of {out} does not fit its config.yaml: {error}") from error
    return encoder


def images_of(run: Run) -> tuple[Images | None, str]:
    """The images that the run's checkpoint is of, if they are there and the same; or None and the reason."""
    if run.state.accepted is None:
        return None, "there is no readable checkpoint with accepted labels."
    then = len(run.state.accepted)
    try:
        data = run.option("data", "data")
        if not data:
            raise ValueError("config.yaml does not name them.")
        root, held_out = Path(run.option("data", "data_root", "data")), float(run.option("data", "hold_out", 0.0))
        images, _ = open_for_run(DataConfig(data=str(data), data_root=root, hold_out=held_out))
        if images is None:
            raise ValueError(f"{data} has no training images.")
    except (CommandError, OSError, ImportError, ValueError) as error:
        return None, f"the images can't be read now: {error}"
    if len(images) != then:
        return None, f"the data set has {len(images):,} images now, {then:,} when the run was made."
    known = run.state.identity
    if known and (text := identity.changes(run.folder, known, {"train": images.listing()})):
        return None, f"the images are not those that the run was made of: {text}."
    return images, ""


def begin(config: Config, images: identity.Parts) -> None:
    """Write config.yaml and which images the run is of: when it begins, and when it goes on, for they may lie
    elsewhere now.

    Raises:
        CommandError: --out can't be made or written.
    """
    settings = replace(config, run=replace(config.run, resume=False))
    run_folder.create(config.run.out, to_yaml(settings))
    identity.keep(config.run.out, images)


def write_result(out: Path, backbone: nn.Module, result: dict[str, Any]) -> None:
    """backbone.pt, with torchvision's names, and result.json of a run that has ended.

    Raises:
        CommandError: the disk is full or not writable.
    """
    write_backbone(out / BACKBONE, backbone.state_dict())
    run_folder.write_json(out / RESULT, result)


def write_backbone(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Raises CommandError: the disk is full or not writable."""
    on_host = {name: value.cpu() for name, value in weights.items()}
    checkpoint.write_atomically(path, lambda file: torch.save(on_host, file))
