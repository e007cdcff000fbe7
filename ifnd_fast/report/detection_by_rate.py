"""Precision and recall of detection at every acceptance rate, drawn."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ifnd_fast.metrics.false_negatives import DetectionByRate
from ifnd_fast.report.plots import INK, Texts, percent_axis, plot_line


def draw_detection_by_rate(
    figure: Figure, found: DetectionByRate, names: Sequence[str], rate: float | None = None
) -> Texts | None:
    """Precision above, recall below, over the acceptance rate, a line for each level; `rate` is marked."""
    if not any(value is not None for level in found.recall for value in level):
        return None
    alts = []
    figure.set_size_inches(5.6, 5.0)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, what, levels in zip(panels, ("precision", "recall"), (found.precision, found.recall), strict=True):
        for level, (name, values) in enumerate(zip(names, levels, strict=True)):
            points = [(x, y) for x, y in zip(found.rates, values, strict=True) if y is not None]
            plot_line(axes, [x for x, _ in points], [y for _, y in points], level, label=name, marker="")
            told = ", ".join(f"{y:.0%} at {x:.0%}" for x, y in points if x in (0.1, 0.5, 1.0))
            alts.append(f"{what.capitalize()} at {name}: {told or 'none'} accepted.")
        percent_axis(axes, what)
        axes.set(xlim=(0, 1))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if rate is not None:
            axes.axvline(rate, color=INK, linestyle=":", linewidth=1.0)
    panels[1].set_xlabel("acceptance rate")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4)
    caption = (
        "If that share of the labels were accepted, the most confident first: of all pairs of images that share an "
        "accepted label, how many are of one class; and of all pairs of one class, how many share a label."
    )
    caption += "" if rate is None else f" Dotted: the rate in use, {rate:.0%}."
    return "Precision and recall at every acceptance rate", caption, " ".join(alts)
