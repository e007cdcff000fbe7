"""A run's page: one HTML file with its numbers, curves and pictures, readable anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ifnd_fast.clustering.image_clusters import ImageClusters
from ifnd_fast.config import flatten
from ifnd_fast.data.images import Images
from ifnd_fast.metrics.false_negatives import detection_of
from ifnd_fast.metrics.feature_quality import collapse
from ifnd_fast.report.clusters import cluster_sheets
from ifnd_fast.report.curves import draw_figures
from ifnd_fast.report.detection_by_rate import draw_detection_by_rate
from ifnd_fast.report.detections import detection_sheets
from ifnd_fast.report.embedding import draw_embedding
from ifnd_fast.report.html import inline, render_template, write_page
from ifnd_fast.report.plots import Picture, draw_picture
from ifnd_fast.report.thumbnails import Sheet, name_of_class
from ifnd_fast.training.accuracies import HEADLINE_LABELS, accuracy_table, few_labels
from ifnd_fast.training.saved_run import Run, duration, images_of, number, read_run

Sheets = tuple[list[Sheet], str]
"""Contact sheets and what they show; or none, and why."""


def write_report(out: Path, path: Path | None = None) -> Path:
    """Write a run's page, one self-contained file, and return its path. Works during a run and after it.

    Args:
        out: The run's folder.
        path: The file; default: OUT/report.html.

    Raises:
        FileNotFoundError: OUT or its metrics.jsonl is not there.
        ValueError: metrics.jsonl has no complete epoch.
        CommandError: the page can't be written (the old one, if any, is as it was).
    """
    out = Path(out)
    run = read_run(out)
    return write_page(out / "report.html" if path is None else path, render(run))


def render(run: Run) -> str:
    """The page as HTML."""
    images, missing = images_of(run)
    clustering = run.state.clustering()
    detections, explanation = _detections(run, images, missing, clustering)
    clusters, clusters_explanation = _clusters(run, images, missing, clustering)
    return render_template(
        "report.html",
        run=run,
        subtitle=_subtitle(run),
        headline=headline(run),
        accuracies=accuracy_table(run.accuracies, run.from_weights),
        pictures=inline(draw_figures(run.epochs, run.accuracies, run.levels)),
        states=inline([_detection_picture(run, images, clustering), _embedding(run, images, clustering)]),
        sheets=detections,
        explanation=explanation,
        clusters=clusters,
        clusters_explanation=clusters_explanation,
        settings=flatten(run.config),
        unreadable=unreadable_images(run, images),
    )


def unreadable_images(run: Run, images: Images | None) -> list[tuple[str, str]]:
    """(image, reason) of those that the run left out, as its result or its checkpoint says."""
    if isinstance(listed := run.result.get("unreadable"), list):
        return [(str(one.get("image")), str(one.get("reason"))) for one in listed if isinstance(one, dict)]
    reasons = run.state.unreadable.items()
    return [(images.name(index) if images else f"image {index}", why) for index, why in reasons]


def _detections(run: Run, images: Images | None, missing: str, clustering: ImageClusters | None) -> Sheets:
    if not run.levels:
        return [], "This run keeps false negatives: it detects none."
    if images is None:
        return [], f"No contact sheets: {missing}"
    return detection_sheets(images, run.state, clustering, run.levels)


def _clusters(run: Run, images: Images | None, missing: str, clustering: ImageClusters | None) -> Sheets:
    if run.detection in ("keep", "oracle"):
        return [], "This run clusters nothing."
    if images is None:
        return [], f"No contact sheets: {missing}"
    if clustering is None:
        return [], f"No contact sheets: nothing was clustered by epoch {run.state.epoch}."
    return cluster_sheets(images, clustering, run.levels)


def _detection_picture(run: Run, images: Images | None, clustering: ImageClusters | None) -> Picture | None:
    if images is None or images.labels is None or clustering is None:
        return None
    found = detection_of(clustering, images.labels)
    return draw_picture("by-rate", draw_detection_by_rate, found, run.levels, run.state.acceptance_rate)


def _embedding(run: Run, images: Images | None, clustering: ImageClusters | None) -> Picture | None:
    stored = run.state.features()
    if stored is None:
        return None
    groups, names, what = None, [], "nothing"
    if images is not None and images.labels is not None:
        groups, what = images.labels[stored.indices], "true class"
        names = [name_of_class(images, label) for label in range(int(images.labels.max()) + 1)]
    elif clustering is not None:
        level = int(np.argmin(clustering.levels))
        groups, what = clustering.labels[:, level].numpy()[stored.indices], f"cluster of {run.levels[level]}"
        names = [f"cluster {cluster}" for cluster in range(clustering.levels[level])]
    return draw_picture("embedding", draw_embedding, stored, groups, names, what)


def headline(run: Run) -> list[tuple[str, str, str]]:
    """(what, value, remark) of the numbers on top: the result's, or the last epoch's while there is none."""
    last = run.epochs[-1]
    untrained, raw = (number(run.accuracies.get(key)) for key in ("knn_top1_untrained", "knn_top1_raw_pixels"))
    trained, epoch = run.trained
    start = "of --weights" if run.from_weights else "random weights"
    before = "before training" if run.from_weights else "untrained"
    suffixes = {before: "_untrained", "raw pixels": "_raw_pixels"}
    cards = []
    if own := few_labels(run.accuracies).get(HEADLINE_LABELS):
        few = {name: few_labels(run.accuracies, suffix).get(HEADLINE_LABELS) for name, suffix in suffixes.items()}
        gains = _gains(own.mean, {name: other.mean for name, other in few.items() if other is not None})
        cards.append((f"With {HEADLINE_LABELS} labels a class", f"{own.mean:.1f}%", ", ".join(gains)))
    if trained is not None:
        gains = _gains(trained, {before: untrained, "raw pixels": raw})
        remark = ", ".join([f"epoch {epoch}"] * (epoch is not None) + gains)
        cards.append(("kNN top-1, trained", f"{trained:.1f}%", remark))
    if untrained is not None:
        cards.append((f"kNN top-1, {before}", f"{untrained:.1f}%", f"same encoder, {start}"))
    if raw is not None:
        cards.append(("kNN top-1, raw pixels", f"{raw:.1f}%", "no encoder"))
    rate, loss, speed = (number(last.get(key)) for key in ("acceptance_rate", "loss", "images_per_second"))
    if rate is not None and run.levels and not run.result:
        cards.append(("Accepted labels", f"{rate:.0%}", f"epoch {last['epoch']}"))
    rank, std, dim = (
        number(value) for value in (last.get("feature_rank"), last.get("feature_std"), run.option("model", "dim"))
    )
    if rank is not None and std is not None and dim:
        remark = f"of {dim:.0f} dimensions, epoch {last['epoch']}"
        cards.append(("Effective rank", f"{rank:.1f}", "collapsed" if collapse(rank, std, int(dim)) else remark))
    if loss is not None:
        cards.append(("Loss", f"{loss:.3f}", f"epoch {last['epoch']}"))
    if run.seconds:
        remark = f"{speed:,.0f} images/s in epoch {last['epoch']}" if speed else ""
        cards.append(("Time" if run.result else "Time so far", duration(run.seconds), remark))
    return cards


def _gains(value: float, others: Mapping[str, float | None]) -> list[str]:
    """ "+24.8 on untrained", "\N{MINUS SIGN}2.2 on raw pixels"; of those that are known."""
    known = {name: other for name, other in others.items() if other is not None}
    return [f"{value - other:+.1f} on {name}".replace("-", "\N{MINUS SIGN}") for name, other in known.items()]


def _subtitle(run: Run) -> str:
    parts = [f"preset {run.config['preset']}"] if "preset" in run.config else []
    if run.config:
        parts.append(f"{run.detection} false negatives")
    parts += [", ".join(run.levels).replace(" clusters,", ",")] if run.levels else []
    parts.append(run.progress)
    return " · ".join(parts)
