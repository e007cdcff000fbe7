"""What a run's folder tells a report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import nn

from ifnd_fast.clustering.image_clusters import ImageClusters
from ifnd_fast.config import Config, DataConfig, to_yaml
from ifnd_fast.contrast.encoder import build
from ifnd_fast.data import identity
from ifnd_fast.data.images import Images
from ifnd_fast.data.sources import open_for_run
from ifnd_fast.runtime import checkpoint, run_folder
from ifnd_fast.runtime.checkpoint import load_latest
from ifnd_fast.runtime.errors import CommandError, UsageError

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
    state: dict[str, Any] = field(default_factory=dict)  # the latest checkpoint
    notes: list[str] = field(default_factory=list)

    def option(self, section: str, name: str, default: Any = None) -> Any:
        values = self.config.get(section)
        return values.get(name, default) if isinstance(values, dict) else default

    @property
    def accuracies(self) -> dict[str, Any]:
        """The kNN accuracies known: before training from the checkpoint, and all from the result."""
        return {**self.state.get("result", {}), **self.result}

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
    def levels(self) -> list[str]:
        """Names of the levels at which false negatives are detected; none for "keep"."""
        if self.detection == "keep":
            return []
        if self.detection == "oracle":
            return ["true classes"]
        clusters = self.state.get("pseudo_labels", {}).get("levels", self.option("cluster", "levels", []))
        return [f"{int(count):,} clusters" for count in clusters]


def read_run(out: Path) -> Run:
    """metrics.jsonl, config.yaml, result.json and the latest checkpoint. Raises as `write_report` does."""
    if not out.is_dir():
        raise FileNotFoundError(f"{out} is not a folder: give the --out folder of a run")
    metrics = out / "metrics.jsonl"
    if not metrics.is_file():
        raise FileNotFoundError(f"{metrics} is missing: {out} holds no run that has finished an epoch")
    epochs, broken = _read_metrics(metrics)
    if not epochs:
        raise ValueError(f"{metrics} has no complete epoch yet: try again when the first one is done")
    run = Run(out.resolve().name, out, epochs)
    if broken:
        run.notes.append(f"metrics.jsonl: {broken} incomplete line{'s' if broken > 1 else ''} left out.")
    run.config = _read_mapping(out / "config.yaml", yaml.safe_load, run.notes)
    if not run.config:
        run.notes.append("There is no readable config.yaml, so the page shows no settings.")
    run.result = _read_mapping(out / "result.json", json.loads, run.notes)
    try:
        run.state = load_latest(out)
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


def load_encoder(out: Path, config: Config) -> nn.Module:
    """The momentum encoder of a run's newest checkpoint, on the CPU; of an in-batch run its only encoder.

    Raises:
        CommandError: `out` is no run's folder, or has no readable checkpoint, or it does not fit the config.
    """
    if not out.is_dir():
        raise UsageError(f"--features encoder: {out} is not the folder of a run; --features backbone works on it")
    weights = load_latest(out)["model"]
    prefix = "key_encoder." if any(name.startswith("key_encoder.") for name in weights) else "query_encoder."
    encoder = build(config.model)()
    try:
        encoder.load_state_dict(
            {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        )
    except RuntimeError as error:
        raise CommandError(f"the newest checkpoint in {out} does not fit its config.yaml: {error}") from error
    return encoder


def clustering_in(state: Mapping[str, Any]) -> ImageClusters | None:
    """The clustering that a checkpoint (see `Labeller.state_dict`) holds; None before the first and where there is
    none (keep, oracle)."""
    found = state.get("pseudo_labels", {})
    usable = state.get("cluster_waiting", {}).get("usable")
    if "labels" not in found or usable is None or int(usable.sum()) != len(found["labels"]):
        return None
    labels = torch.full((len(usable), len(found["levels"])), -1, dtype=torch.int32, device="cpu")
    confidence = torch.zeros(labels.shape, dtype=torch.float32, device="cpu")
    labels[usable], confidence[usable] = found["labels"], found["confidence"]
    return ImageClusters(tuple(found["levels"].tolist()), labels, confidence)


def images_of(run: Run) -> tuple[Images | None, str]:
    """The images that the run's checkpoint is of, if they are there and the same; or None and the reason."""
    if "accepted" not in run.state:
        return None, "there is no readable checkpoint with accepted labels."
    then = len(run.state["accepted"])
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
    known = run.state.get("config", {}).get("identity", {})
    if known and (text := identity.changes(run.folder, known, {"train": images.listing()})):
        return None, f"the images are not those that the run was made of: {text}."
    return images, ""


POINTS = 1000  # t-SNE takes some seconds for them


class StoredFeatures(NamedTuple):
    """Unit features of n different images that a checkpoint holds."""

    features: np.ndarray  # (n, D) float32
    indices: np.ndarray  # (n,) int64, of the images
    source: str


def stored_features(state: Mapping[str, Any], most: int = POINTS, seed: int = 0) -> StoredFeatures | None:
    """Of at most `most` images, always the same ones: their newest keys in the queue, else what the bank holds of them;
    None where the checkpoint has neither."""
    queue, bank = state.get("negatives"), state.get("bank")
    if queue is not None and "features" in queue:
        features, indices = queue["features"], queue["indices"].numpy()
        pointer = int(queue["_extra_state"][0]) if "_extra_state" in queue else 0
        newest_first = (pointer - 1 - np.arange(len(indices))) % len(indices)
        newest_first = newest_first[indices[newest_first] >= 0]
        distinct, at = np.unique(indices[newest_first], return_index=True)
        rows, source = newest_first[at], "newest key in the queue"
    elif bank is not None:
        features, source = bank, "newest key in the bank"
        distinct = rows = bank.any(dim=1).nonzero().flatten().numpy()
    else:
        return None
    kept = np.sort(np.random.default_rng(seed).permutation(len(rows))[:most])
    found = features[torch.from_numpy(rows[kept])].float().numpy()
    finite = np.isfinite(found).all(axis=1)
    return StoredFeatures(found[finite], distinct[kept][finite], source)


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
    weights = {name: value.cpu() for name, value in backbone.state_dict().items()}
    checkpoint.write_atomically(out / "backbone.pt", lambda file: torch.save(weights, file))
    run_folder.write_json(out / "result.json", result)
