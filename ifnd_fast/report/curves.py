"""A run's curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ifnd_fast.report.plots import (
    INK,
    SERIES,
    Picture,
    Texts,
    add_legend,
    alt_text,
    draw_picture,
    epoch_axis,
    percent_axis,
    plot_line,
)
from ifnd_fast.training.saved_run import SECONDS, Epochs, number

Series = tuple[list[float], list[float]]
"""Epochs and values."""


def draw_figures(epochs: Epochs, result: Mapping[str, Any], levels: Sequence[str]) -> list[Picture]:
    """Every figure that the run has numbers for.

    Args:
        epochs: See :data:`Epochs`; at least one.
        result: kNN accuracies as in result.json, those that are known.
        levels: Names of the levels of clustering, for the legends. Empty: nothing detects false negatives.
    """
    pictures = [
        draw_picture("loss", _loss, epochs),
        draw_picture("knn", _knn, epochs, result),
        draw_picture("spread", _spread, epochs),
        draw_picture("uniformity", _uniformity, epochs),
    ]
    if levels:
        pictures += [
            draw_picture("acceptance", _acceptance, epochs),
            draw_picture("false-negatives", _false_negatives, epochs, levels),
            draw_picture("precision-recall", _precision_recall, epochs, levels),
            draw_picture("clusters", _clusters, epochs, levels),
            draw_picture("inertia", _inertia, epochs, levels),
        ]
    pictures.append(draw_picture("time", _time, epochs))
    return [picture for picture in pictures if picture]


def _loss(figure: Figure, epochs: Epochs) -> Texts | None:
    epoch, loss = _series(epochs, "loss")
    lr_epoch, lr = _series(epochs, "lr")
    if not epoch:
        return None
    if lr_epoch:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        plot_line(bottom, lr_epoch, lr, 1)
        bottom.set(ylabel="learning rate", ylim=(0, None))
        bottom.yaxis.set_major_locator(MaxNLocator(2))
    else:
        top = bottom = figure.subplots()
    plot_line(top, epoch, loss, 0)
    top.set_ylabel("loss (nats)")
    epoch_axis(bottom, epochs)
    caption = f"Mean contrastive loss of each epoch{', and the learning rate at its end' if lr_epoch else ''}."
    return "Loss", caption, alt_text("loss", epoch, loss, "{:.3f}")


def _knn(figure: Figure, epochs: Epochs, result: Mapping[str, Any]) -> Texts | None:
    epoch, top1 = _series(epochs, "knn_top1")
    last = number(epochs[-1].get("epoch"))
    final = number(result.get("knn_top1"))
    if final is not None and last is not None and (not epoch or epoch[-1] != last):
        epoch, top1 = [*epoch, last], [*top1, final]
    if not epoch:
        return None
    axes = figure.subplots()
    plot_line(axes, epoch, top1, 0, label="trained")
    alt = alt_text("kNN top-1 accuracy", epoch, top1, "{:.1f}%")
    for name, key, dash, colour in (
        ("raw pixels", "knn_top1_raw_pixels", "--", SERIES[1]),
        ("before training", "knn_top1_untrained", ":", INK),
    ):
        level = number(result.get(key))
        if level is not None:
            axes.axhline(level, linestyle=dash, color=colour, linewidth=1.3, label=f"{name}, {level:.1f}%")
            alt += f" {name.capitalize()}: {level:.1f}%."
    axes.set_ylabel("kNN top-1 (%)")
    add_legend(axes)
    epoch_axis(axes, epochs)
    return "kNN accuracy", "Weighted k-nearest-neighbour top-1 on held-out images, higher is better.", alt


def _spread(figure: Figure, epochs: Epochs) -> Texts | None:
    whats = {"effective rank": ("feature_rank", "{:.1f}"), "standard deviation": ("feature_std", "{:.3f}")}
    caption = (
        "Of the queries that each epoch ended with: in how many directions they spread (RankMe), and their standard "
        "deviation, mean over the dimensions. Near 1, or near 0, they have collapsed; higher is better as a rule."
    )
    alt = _panels_below(figure, epochs, whats)
    return ("Spread of the features", caption, alt) if alt else None


def _uniformity(figure: Figure, epochs: Epochs) -> Texts | None:
    whats = {"alignment": ("alignment", "{:.2f}"), "uniformity": ("uniformity", "{:.2f}")}
    caption = (
        "Mean squared distance of two views' features, and the log of how close those of different images are "
        "(Wang and Isola, 2020); lower is better for both together."
    )
    alt = _panels_below(figure, epochs, whats)
    return ("Alignment and uniformity", caption, alt) if alt else None


def _panels_below(figure: Figure, epochs: Epochs, whats: Mapping[str, tuple[str, str]]) -> str:
    """A panel for each of `whats`, {name: (key, format)}, that has numbers, one below the other; the text, empty where
    none has."""
    series = {what: (_series(epochs, key), form) for what, (key, form) in whats.items()}
    shown = {what: found for what, found in series.items() if found[0][0]}
    if not shown:
        return ""
    grid = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for style, (axes, (what, ((epoch, values), _))) in enumerate(zip(grid, shown.items(), strict=True)):
        plot_line(axes, epoch, values, style)
        axes.set_ylabel(what)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    epoch_axis(grid[-1], epochs)
    return " ".join(alt_text(what, *found, form) for what, (found, form) in shown.items())


def _acceptance(figure: Figure, epochs: Epochs) -> Texts | None:
    epoch, rate = _series(epochs, "acceptance_rate")
    if not epoch:
        return None
    axes = figure.subplots()
    plot_line(axes, epoch, rate, 0)
    axes.fill_between(epoch, rate, color=SERIES[0], alpha=0.15, linewidth=0)
    percent_axis(axes, "accepted labels")
    epoch_axis(axes, epochs)
    caption = "Share of pseudo labels, the most confident first, that training trusts."
    return "Acceptance rate", caption, alt_text("acceptance rate", epoch, rate, "{:.0%}")


def _false_negatives(figure: Figure, epochs: Epochs, names: Sequence[str]) -> Texts | None:
    levels = _level_series(epochs, "false_negatives_per_query", names)
    if not levels:
        return None
    axes = figure.subplots()
    alt = _lines(axes, levels, "{:.1f}", "false negatives per query")
    axes.set(ylabel="false negatives per query", ylim=(0, None))
    epoch_axis(axes, epochs)
    add_legend(axes)
    caption = "Negatives that share an anchor's accepted pseudo label, on average."
    return "False negatives per query", caption, alt


def _precision_recall(figure: Figure, epochs: Epochs, names: Sequence[str]) -> Texts | None:
    whats = {"precision": "false_negative_precision", "recall": "false_negative_recall"}
    alt = _percent_panels(figure, epochs, names, whats)
    caption = "Share of the detected false negatives that truly are, and share of the true ones detected."
    return ("Precision and recall of detection", caption, alt) if alt else None


def _clusters(figure: Figure, epochs: Epochs, names: Sequence[str]) -> Texts | None:
    whats = {"images in the largest 1%": "cluster_largest", "agreement with the last": "cluster_agreement"}
    alt = _percent_panels(figure, epochs, names, whats)
    caption = (
        "Share of the images in the largest 1% of the clusters (at least one cluster), and the adjusted mutual "
        "information of each clustering with the one before."
    )
    return ("Balance and agreement of clusters", caption, alt) if alt else None


def _inertia(figure: Figure, epochs: Epochs, names: Sequence[str]) -> Texts | None:
    """Of the last clustering, an iteration a point."""
    iterations = epochs[-1].get("cluster_inertia")
    if not isinstance(iterations, list) or not all(isinstance(found, list) for found in iterations):
        return None
    steps = [{"epoch": i + 1, "found": list(found)} for i, found in enumerate(itertools.zip_longest(*iterations))]
    levels = _level_series(steps, "found", names)
    if not levels:
        return None
    axes = figure.subplots()
    alt = _lines(axes, levels, "{:.3f}", "inertia", "iteration")
    axes.set(ylabel="mean squared distance", xlabel="iteration of k-means", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    add_legend(axes)
    return "Inertia of the last clustering", "Mean squared distance of the features to their centroid.", alt


def _percent_panels(figure: Figure, epochs: Epochs, names: Sequence[str], whats: Mapping[str, str]) -> str:
    """A panel for each of `whats`, {name: key}, that has numbers, side by side; the text, empty where none has."""
    panels = []
    for what, key in whats.items():
        if levels := _level_series(epochs, key, names):
            panels.append((what, levels))
    if not panels:
        return ""
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    alts = []
    for axes, (what, levels) in zip(grid, panels, strict=True):
        alts.append(_lines(axes, levels, "{:.0%}", what))
        percent_axis(axes, what)
        epoch_axis(axes, epochs)
    handles, labels = grid[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4)
    return " ".join(alts)


def _time(figure: Figure, epochs: Epochs) -> Texts | None:
    edges, seconds = _bins([[number(line.get(key)) or 0.0 for key in SECONDS.values()] for line in epochs])
    if not seconds.any():
        return None
    axes = figure.subplots()
    x = np.array([line["epoch"] for line in epochs] + [epochs[-1]["epoch"] + 1])[edges] - 0.5
    below = np.zeros(len(seconds))
    for name, part, colour in zip(SECONDS, seconds.T, (SERIES[0], SERIES[4], SERIES[3]), strict=True):
        if part.any():
            axes.stairs(below + part, x, baseline=below, fill=True, color=colour, label=name)
            below = below + part
    axes.set(ylabel="seconds per epoch", ylim=(0, None))
    epoch_axis(axes, epochs)
    add_legend(axes)
    shares = seconds.sum(axis=0) / seconds.sum()
    told = ", ".join(f"{name} {share:.0%}" for name, share in zip(SECONDS, shares, strict=True))
    caption = f"Wall-clock time of each epoch{f', means over {edges[1]} epochs' if edges[1] > 1 else ''}."
    return "Time", caption, f"Stacked bars of seconds per epoch. Of the total: {told}."


def _bins(values: list[list[float]], most: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Edges (bins + 1,) and means (bins, columns) of equally many rows each, the last bin what is left."""
    rows = np.array(values)
    edges = np.append(np.arange(0, len(rows), math.ceil(len(rows) / most)), len(rows))
    return edges, np.add.reduceat(rows, edges[:-1], axis=0) / np.diff(edges)[:, None]


def _series(epochs: Epochs, key: str, level: int | None = None) -> Series:
    """Epochs and values of the lines with a finite number under `key` (of `level`, in a list of levels)."""
    points = []
    for line in epochs:
        value = line.get(key)
        if level is not None:
            value = value[level] if isinstance(value, list) and level < len(value) else None
        epoch, y = number(line.get("epoch")), number(value)
        if epoch is not None and y is not None:
            points.append((epoch, y))
    return [x for x, _ in points], [y for _, y in points]


def _level_series(epochs: Epochs, key: str, names: Sequence[str]) -> list[tuple[int, str, Series]]:
    """(level, name, series) of each level that has numbers."""
    found = [(level, name, _series(epochs, key, level)) for level, name in enumerate(names)]
    return [item for item in found if item[2][0]]


def _lines(axes: Axes, levels: list[tuple[int, str, Series]], form: str, what: str, at: str = "epoch") -> str:
    for level, name, (x, y) in levels:
        plot_line(axes, x, y, level, label=name)
    return " ".join(alt_text(f"{what} at {name}", x, y, form, at) for _, name, (x, y) in levels)
