"""A run's page: one HTML file with its numbers, curves and pictures, readable anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from ifnd_fast.checkpoint import load_latest, write_atomically
from ifnd_fast.data import Images, open_images
from ifnd_fast.errors import CommandError
from ifnd_fast.report_figures import SECONDS, draw_figures, number
from ifnd_fast.report_sheets import Sheet, contact_sheets

IN_BATCH_SAMPLE = 4096


@dataclass
class Run:
    """What a run folder tells. A broken file leaves its field empty and a line in `notes`."""

    name: str
    epochs: list[dict[str, Any]]  # the lines of metrics.jsonl by "epoch"; never empty
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


def write_report(out: Path) -> Path:
    """Write OUT/report.html, one self-contained file, and return its path. Works during a run and after it.

    Raises:
        FileNotFoundError: OUT or its metrics.jsonl is not there.
        ValueError: metrics.jsonl has no complete epoch.
        CommandError: the page can't be written (the old one, if any, is as it was).
    """
    out = Path(out)
    run = read_run(out)
    page = render(run, *make_sheets(run))
    path = out / "report.html"
    write_atomically(path, lambda file: file.write(page.encode(errors="replace")))  # a path that isn't text
    return path


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
    run = Run(out.resolve().name, epochs)
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


def make_sheets(run: Run) -> tuple[list[Sheet], str]:
    """The contact sheets and an explanation of what they show, or none and the reason why."""
    if not run.levels:
        return [], "This run keeps false negatives: it detects none."
    if "accepted" not in run.state:
        return [], "No contact sheets: there is no readable checkpoint with accepted labels."
    epoch, labels = run.state["epoch"], run.state["accepted"].numpy()
    if labels.max(initial=-1) < 0:
        return [], f"No contact sheets: no pseudo label was accepted by epoch {epoch}."
    try:
        images = _open_images(run)
    except (CommandError, OSError, ImportError, ValueError) as error:
        return [], f"No contact sheets, because the images can't be read now. {error}"
    if len(images) != len(labels):
        then = f"{len(labels):,} when the run was made"
        return [], f"No contact sheets: the data set has {len(images):,} images now, {then}."
    confidence = run.state["pseudo_labels"].get("confidence")
    if confidence is not None:  # it is of the images that were clustered: none for those that can't be read
        confidence = confidence.numpy() if confidence.shape == labels.shape else None
    candidates, source = _candidates(run.state.get("negatives"), len(images))
    groups = "clusters" if images.labels is None else "classes"
    order = "in order" if confidence is None else "from the most to the least confident"
    explanation = (
        f"Each row starts with an anchor. Beside it are images {source} that carry the anchor's accepted "
        f"label at epoch {epoch}: up to 10, at even steps {order}. Anchors are drawn at random (always the "
        f"same ones), spread over the {groups}; images with detections at more levels come first."
    )
    return contact_sheets(images, labels, confidence, candidates, run.levels), explanation


def _open_images(run: Run) -> Images:
    """The training images that the run's config names."""
    data = run.option("data", "data")
    if not data:
        raise ValueError("config.yaml does not name them.")
    images = open_images(str(data), "train", Path(run.option("data", "data_root", "data")))
    if images is None:
        raise ValueError(f"{data} has no training images.")
    return images


def _candidates(negatives: Mapping[str, Any] | None, n: int) -> tuple[np.ndarray, str]:
    """Distinct indices that may be detected, and where they come from."""
    if negatives is not None:
        indices = np.unique(np.asarray(negatives["indices"], dtype=np.int64))
        indices = indices[(indices >= 0) & (indices < n)]
        return indices, f"among the {len(indices):,} in the queue"
    if n <= IN_BATCH_SAMPLE:
        return np.arange(n), f"among all {n:,} (in-batch negatives: there is no queue)"
    sample = np.sort(np.random.default_rng(0).choice(n, IN_BATCH_SAMPLE, replace=False))
    return sample, f"in a fixed random sample of {IN_BATCH_SAMPLE:,} (in-batch negatives: there is no queue)"


def render(run: Run, sheets: Sequence[Sheet], explanation: str) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ifnd_fast"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    pictures = draw_figures(run.epochs, run.accuracies, run.levels)
    return environment.get_template("report.html").render(
        run=run,
        subtitle=_subtitle(run),
        headline=headline(run),
        pictures=[(picture, Markup(picture.svg)) for picture in pictures],
        sheets=sheets,
        explanation=explanation,
        wrong=any(thumbnail.wrong for sheet in sheets for row in sheet.rows for thumbnail in row.shown),
        settings=flatten(run.config),
    )


def headline(run: Run) -> list[tuple[str, str, str]]:
    """(what, value, remark) of the numbers on top: the result's, or the last epoch's while there is none."""
    last = run.epochs[-1]
    trained, untrained, raw = (
        number(run.accuracies.get(key)) for key in ("knn_top1", "knn_top1_untrained", "knn_top1_raw_pixels")
    )
    when: list[str] = []
    if trained is None:
        for line in run.epochs:
            if number(line.get("knn_top1")) is not None:
                trained, when = line["knn_top1"], [f"epoch {line['epoch']}"]
    cards = []
    if trained is not None:
        others = [("untrained", untrained), ("raw pixels", raw)]
        gains = [f"{trained - other:+.1f} on {name}" for name, other in others if other is not None]
        remark = ", ".join(when + gains).replace("-", "\N{MINUS SIGN}")
        cards.append(("kNN top-1, trained", f"{trained:.1f}%", remark))
    if untrained is not None:
        cards.append(("kNN top-1, untrained", f"{untrained:.1f}%", "same encoder, random weights"))
    if raw is not None:
        cards.append(("kNN top-1, raw pixels", f"{raw:.1f}%", "no encoder"))
    rate, loss, speed = (number(last.get(key)) for key in ("acceptance_rate", "loss", "images_per_second"))
    if rate is not None and run.levels and not run.result:
        cards.append(("Accepted labels", f"{rate:.0%}", f"epoch {last['epoch']}"))
    if loss is not None:
        cards.append(("Loss", f"{loss:.3f}", f"epoch {last['epoch']}"))
    seconds = number(run.result.get("seconds")) or sum(
        number(line.get(key)) or 0.0 for line in run.epochs for key in SECONDS.values()
    )
    if seconds:
        remark = f"{speed:,.0f} images/s in epoch {last['epoch']}" if speed else ""
        cards.append(("Time" if run.result else "Time so far", duration(seconds), remark))
    return cards


def _subtitle(run: Run) -> str:
    epoch, planned = run.epochs[-1]["epoch"], run.option("optim", "epochs")
    parts = [f"preset {run.config['preset']}"] if "preset" in run.config else []
    if run.config:
        parts.append(f"{run.detection} false negatives")
    parts += [", ".join(run.levels).replace(" clusters,", ",")] if run.levels else []
    parts.append(f"{epoch} epochs" if run.result else f"epoch {epoch}{f' of {planned}' if planned else ''}")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """ "48 s", "2 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as ("section.name", value) pairs, in their order."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows.append((f"{prefix}{key}", ", ".join(map(str, value)) or "none"))
        else:
            rows.append((f"{prefix}{key}", "none" if value is None else str(value)))
    return rows
