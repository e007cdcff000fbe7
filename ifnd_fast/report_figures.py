"""A run's curves as SVG that takes its text and line colours from the page around it."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

Epochs = Sequence[dict[str, Any]]
"""The lines of metrics.jsonl, in order of "epoch"."""
Series = tuple[list[float], list[float]]
"""Epochs and values."""

INK, GRID = "#24292f", "#b8bfc6"
# Okabe and Ito's colours, told apart under the common kinds of colour blindness; markers differ as well.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS, DASHES = "os^Dv*", ("-", "--", "-.", ":")
SECONDS = {"training": "seconds", "features": "feature_seconds", "clustering": "cluster_seconds"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.alpha": 0.45,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Picture:
    """A figure of the page: inline SVG, title, a line of explanation, and a text for who can't see it."""

    title: str
    caption: str
    alt: str
    svg: str


def draw_figures(epochs: Epochs, result: Mapping[str, Any], levels: Sequence[str]) -> list[Picture]:
    """Every figure that the run has numbers for.

    Args:
        epochs: See :data:`Epochs`; at least one.
        result: kNN accuracies as in result.json, those that are known.
        levels: Names of the levels of clustering, for the legends. Empty: nothing detects false negatives.
    """
    pictures = [_draw("loss", _loss, epochs), _draw("knn", _knn, epochs, result)]
    if levels:
        pictures += [
            _draw("acceptance", _acceptance, epochs),
            _draw("false-negatives", _false_negatives, epochs, levels),
            _draw("precision-recall", _precision_recall, epochs, levels),
            _draw("clusters", _clusters, epochs, levels),
            _draw("inertia", _inertia, epochs, levels),
        ]
    pictures.append(_draw("time", _time, epochs))
    return [picture for picture in pictures if picture]


def _loss(figure: Figure, epochs: Epochs) -> tuple[str, str, str] | None:
    epoch, loss = _series(epochs, "loss")
    lr_epoch, lr = _series(epochs, "lr")
    if not epoch:
        return None
    if lr_epoch:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _line(bottom, lr_epoch, lr, 1)
        bottom.set(ylabel="learning rate", ylim=(0, None))
        bottom.yaxis.set_major_locator(MaxNLocator(2))
    else:
        top = bottom = figure.subplots()
    _line(top, epoch, loss, 0)
    top.set_ylabel("loss (nats)")
    _epoch_axis(bottom, epochs)
    caption = (
        f"Mean contrastive loss of each epoch{', and the learning rate at its end' if lr_epoch else ''}."
    )
    return "Loss", caption, _tell("loss", epoch, loss, "{:.3f}")


def _knn(figure: Figure, epochs: Epochs, result: Mapping[str, Any]) -> tuple[str, str, str] | None:
    epoch, top1 = _series(epochs, "knn_top1")
    last = number(epochs[-1].get("epoch"))
    final = number(result.get("knn_top1"))
    if final is not None and last is not None and (not epoch or epoch[-1] != last):
        epoch, top1 = [*epoch, last], [*top1, final]
    if not epoch:
        return None
    axes = figure.subplots()
    _line(axes, epoch, top1, 0, label="trained")
    alt = _tell("kNN top-1 accuracy", epoch, top1, "{:.1f}%")
    for name, key, dash, colour in (
        ("raw pixels", "knn_top1_raw_pixels", "--", SERIES[1]),
        ("untrained encoder", "knn_top1_untrained", ":", INK),
    ):
        level = number(result.get(key))
        if level is not None:
            axes.axhline(level, linestyle=dash, color=colour, linewidth=1.3, label=f"{name}, {level:.1f}%")
            alt += f" {name.capitalize()}: {level:.1f}%."
    axes.set_ylabel("kNN top-1 (%)")
    _legend(axes)
    _epoch_axis(axes, epochs)
    return "kNN accuracy", "Weighted k-nearest-neighbour top-1 on held-out images, higher is better.", alt


def _acceptance(figure: Figure, epochs: Epochs) -> tuple[str, str, str] | None:
    epoch, rate = _series(epochs, "acceptance_rate")
    if not epoch:
        return None
    axes = figure.subplots()
    _line(axes, epoch, rate, 0)
    axes.fill_between(epoch, rate, color=SERIES[0], alpha=0.15, linewidth=0)
    _percent_axis(axes, "accepted labels")
    _epoch_axis(axes, epochs)
    caption = "Share of pseudo labels, the most confident first, that training trusts."
    return "Acceptance rate", caption, _tell("acceptance rate", epoch, rate, "{:.0%}")


def _false_negatives(figure: Figure, epochs: Epochs, names: Sequence[str]) -> tuple[str, str, str] | None:
    levels = _level_series(epochs, "false_negatives_per_query", names)
    if not levels:
        return None
    axes = figure.subplots()
    alt = _lines(axes, levels, "{:.1f}", "false negatives per query")
    axes.set(ylabel="false negatives per query", ylim=(0, None))
    _epoch_axis(axes, epochs)
    _legend(axes)
    caption = "Negatives that share an anchor's accepted pseudo label, on average."
    return "False negatives per query", caption, alt


def _precision_recall(figure: Figure, epochs: Epochs, names: Sequence[str]) -> tuple[str, str, str] | None:
    whats = {"precision": "false_negative_precision", "recall": "false_negative_recall"}
    alt = _percent_panels(figure, epochs, names, whats)
    caption = "Share of the detected false negatives that truly are, and share of the true ones detected."
    return ("Precision and recall of detection", caption, alt) if alt else None


def _clusters(figure: Figure, epochs: Epochs, names: Sequence[str]) -> tuple[str, str, str] | None:
    whats = {"images in the largest 1%": "cluster_largest", "agreement with the last": "cluster_agreement"}
    alt = _percent_panels(figure, epochs, names, whats)
    caption = (
        "Share of the images in the largest 1% of the clusters (at least one cluster), and the adjusted mutual "
        "information of each clustering with the one before."
    )
    return ("Balance and agreement of clusters", caption, alt) if alt else None


def _inertia(figure: Figure, epochs: Epochs, names: Sequence[str]) -> tuple[str, str, str] | None:
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
    _legend(axes)
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
        _percent_axis(axes, what)
        _epoch_axis(axes, epochs)
    handles, labels = grid[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4)
    return " ".join(alts)


def _time(figure: Figure, epochs: Epochs) -> tuple[str, str, str] | None:
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
    _epoch_axis(axes, epochs)
    _legend(axes)
    shares = seconds.sum(axis=0) / seconds.sum()
    told = ", ".join(f"{name} {share:.0%}" for name, share in zip(SECONDS, shares, strict=True))
    caption = f"Wall-clock time of each epoch{f', means over {edges[1]} epochs' if edges[1] > 1 else ''}."
    return "Time", caption, f"Stacked bars of seconds per epoch. Of the total: {told}."


def _bins(values: list[list[float]], most: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Edges (bins + 1,) and means (bins, columns) of equally many rows each, the last bin what is left."""
    rows = np.array(values)
    edges = np.append(np.arange(0, len(rows), math.ceil(len(rows) / most)), len(rows))
    return edges, np.add.reduceat(rows, edges[:-1], axis=0) / np.diff(edges)[:, None]


def number(value: Any) -> float | None:
    """A finite number as float; None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


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
        _line(axes, x, y, level, label=name)
    return " ".join(_tell(f"{what} at {name}", x, y, form, at) for _, name, (x, y) in levels)


def _line(axes: Axes, x: list[float], y: list[float], style: int, **options: Any) -> None:
    options.setdefault("marker", MARKERS[style % len(MARKERS)] if len(x) <= 40 else "")
    options.setdefault("linestyle", DASHES[style // len(SERIES) % len(DASHES)])
    axes.plot(x, y, color=SERIES[style % len(SERIES)], clip_on=False, zorder=3, **options)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, borderaxespad=0.2, columnspacing=1.4)


def _epoch_axis(axes: Axes, epochs: Epochs) -> None:
    """The same for all figures: from the run's first epoch to its last."""
    first, last = epochs[0]["epoch"], epochs[-1]["epoch"]
    space = 0.5 + 0.01 * (last - first)
    axes.set(xlabel="epoch", xlim=(first - space, last + space))
    if last - first < 8:
        axes.set_xticks(range(first, last + 1))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=(1, 2, 5, 10)))


def _percent_axis(axes: Axes, label: str) -> None:
    axes.set(ylabel=label, ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _tell(what: str, x: list[float], y: list[float], form: str, at: str = "epoch") -> str:
    start, end = form.format(y[0]), form.format(y[-1])
    if len(y) == 1:
        return f"{what[0].upper()}{what[1:]}: {end} at {at} {x[-1]:.0f}."
    return f"{what[0].upper()}{what[1:]}: {start} at {at} {x[0]:.0f}, {end} at {at} {x[-1]:.0f}."


def _draw(name: str, draw: Callable[..., tuple[str, str, str] | None], *data: Any) -> Picture | None:
    # A salt of its own keeps a figure's ids apart from the others', and the same in every run.
    with matplotlib.style.context(["default", STYLE, {"svg.hashsalt": name}]):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        texts = draw(figure, *data)
        if texts is None:
            return None
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    title, caption, alt = texts
    return Picture(title, caption, alt, _inline(buffer.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """The <svg> element alone, scalable, in the page's colours: currentColor, --grid, --series-1 ..."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    opening = r'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" \1>'
    svg = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', opening, svg, count=1)
    svg = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(INK, "currentColor").replace(GRID, f"var(--grid, {GRID})")
    for i, colour in enumerate(SERIES, start=1):
        svg = svg.replace(colour, f"var(--series-{i}, {colour})")
    return svg
