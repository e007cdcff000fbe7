"""The look of the project's figures, as files and as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ifnd_fast.runtime.checkpoint import write_atomically
from ifnd_fast.runtime.errors import UsageError

INK, GRID = "#24292f", "#b8bfc6"
# Okabe and Ito's colours, told apart under the common kinds of colour blindness; markers differ as well.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS, DASHES = "os^Dv*", ("-", "--", "-.", ":")
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
    "text.parse_math": False,  # names of classes may have dollar signs
}
FILE_KINDS = (".png", ".svg", ".pdf")
Texts = tuple[str, str, str]
"""Title, caption and alternative text of a figure."""
Paint = Callable[..., Texts | None]
"""Draws on the Figure that is its first argument; None where there is nothing to show."""


@dataclass(frozen=True)
class Picture:
    """A figure of the page: inline SVG, title, a line of explanation, and a text for who can't see it."""

    title: str
    caption: str
    alt: str
    svg: str


def plot_line(axes: Axes, x: list[float], y: list[float], style: int, **options: Any) -> None:
    options.setdefault("marker", MARKERS[style % len(MARKERS)] if len(x) <= 40 else "")
    options.setdefault("linestyle", DASHES[style // len(SERIES) % len(DASHES)])
    axes.plot(x, y, color=SERIES[style % len(SERIES)], clip_on=False, zorder=3, **options)


def add_legend(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, borderaxespad=0.2, columnspacing=1.4)


def epoch_axis(axes: Axes, epochs: Sequence[dict[str, Any]]) -> None:
    """From the first "epoch" to the last, the same for all figures of a page."""
    first, last = min(line["epoch"] for line in epochs), max(line["epoch"] for line in epochs)
    space = 0.5 + 0.01 * (last - first)
    axes.set(xlabel="epoch", xlim=(first - space, last + space))
    if last - first < 8:
        axes.set_xticks(range(first, last + 1))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=(1, 2, 5, 10)))


def percent_axis(axes: Axes, label: str) -> None:
    axes.set(ylabel=label, ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def shortened(name: str, most: int = 14) -> str:
    """A name that fits a legend."""
    return name if len(name) <= most else name[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def alt_text(what: str, x: list[float], y: list[float], form: str, at: str = "epoch") -> str:
    start, end = form.format(y[0]), form.format(y[-1])
    if len(y) == 1:
        return f"{what[0].upper()}{what[1:]}: {end} at {at} {x[-1]:.0f}."
    return f"{what[0].upper()}{what[1:]}: {start} at {at} {x[0]:.0f}, {end} at {at} {x[-1]:.0f}."


def draw_picture(name: str, paint: Paint, *data: Any) -> Picture | None:
    """The figure as a part of a page; None where the data has nothing to show. `name` tells it from the others."""
    with _styled(name), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser's fonts draw the text
        figure, texts = _painted(paint, *data)
        if texts is None:
            return None
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    title, caption, alt = texts
    return Picture(title, caption, alt, _inline(buffer.getvalue(), name))


def save_picture(path: Path, paint: Paint, *data: Any) -> None:
    """The figure as a file of the kind that its name ends in, one of FILE_KINDS (see `check_file_kind`).

    Raises:
        CommandError: the file can't be written.
    """
    with _styled(path.name):
        figure, _ = _painted(paint, *data)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=200)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def check_file_kind(option: str, path: Path) -> None:
    """Raises UsageError: it is no name of a picture; before long work that would be lost."""
    if path.suffix.lower() not in FILE_KINDS:
        raise UsageError(f"{option} {path}: give a name that ends in one of {', '.join(FILE_KINDS)}")


def _styled(salt: str) -> AbstractContextManager:
    # A salt of its own keeps a figure's ids apart from the others', and the same in every run.
    return matplotlib.style.context(["default", STYLE, {"svg.hashsalt": salt}])


def _painted(paint: Paint, *data: Any) -> tuple[Figure, Texts | None]:
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    return figure, paint(figure, *data)


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
