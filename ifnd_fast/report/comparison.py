"""The page that compares several runs; those of the same settings and other seeds count as one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ifnd_fast.config import Config, flatten, may_change
from ifnd_fast.report.html import inline, render_template, write_page
from ifnd_fast.report.plots import SERIES, Texts, draw_picture, epoch_axis, percent_axis, plot_line, shortened
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.training.accuracies import HEADLINE_LABELS, few_labels
from ifnd_fast.training.saved_run import Run, number, read_run

NO_SETTING = may_change(Config) | {"seed"}
"""Options that two runs of the same settings may have differently."""
NONE = "\N{EN DASH}"

Curve = tuple[list[float], list[float], list[float]]
"""Epochs, means and standard deviations (0 for one run)."""


@dataclass
class Group:
    """Runs of the same settings."""

    settings: dict[str, str]
    runs: list[Run] = field(default_factory=list)
    name: str = ""

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.option("run", "seed", "?")) for run in self.runs)


def write_comparison(outs: Sequence[Path], path: Path) -> Path:
    """Write the comparison of two or more runs, one self-contained file, and return its path.

    Raises:
        UsageError: a run is given twice.
        FileNotFoundError, ValueError, CommandError: as `write_report` does, for any of the runs.
    """
    resolved = [out.resolve() for out in outs]
    for out in resolved:
        if resolved.count(out) > 1:
            raise UsageError(f"{out} is given more than once: name each run once")
    return write_page(path, render_comparison([_read_slim(out) for out in outs]))


def _read_slim(out: Path) -> Run:
    """The run without its checkpoint's weights: of many runs they would fill the memory."""
    run = read_run(out)
    run.state = run.state.without_tensors()
    return run


def render_comparison(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    name_apart(runs)
    groups = group_by_settings(runs)
    curves = [
        draw_picture("loss", _curves, groups, "loss", "Loss", "loss (nats)", "{:.3f}"),
        draw_picture("knn", _curves, groups, "knn_top1", "kNN accuracy", "kNN top-1 (%)", "{:.1f}%"),
        draw_picture("rank", _curves, groups, "feature_rank", "Effective rank", "effective rank", "{:.1f}"),
        draw_picture("acceptance", _acceptance, groups),
    ]
    levels = range(max(len(group.runs[0].levels) for group in groups))
    curves += [draw_picture(f"detection-{level}", _detection, groups, level) for level in levels]
    several = any(len(group.runs) > 1 for group in groups)
    return render_template(
        "comparison.html",
        title=f"{len(runs)} runs compared",
        groups=groups,
        notes=[f"{run.name}: {note}" for run in runs for note in run.notes] + _cautions(runs),
        several=several,
        pictures=inline(curves),
        figures_header=[title for title, *_ in _columns()],
        figures_rows=_figure_rows(groups),
        settings=differing_settings(groups),
        swatches=[f"var(--series-{i % len(SERIES) + 1})" for i in range(len(groups))],
    )


def name_apart(runs: Sequence[Run]) -> None:
    """Runs whose folders have the same name get those of the folders above too."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)


def group_by_settings(runs: Sequence[Run]) -> list[Group]:
    """Groups in order of their first run; a run without readable settings is alone in its own."""
    groups: list[Group] = []
    for run in runs:
        config = {section: values for section, values in run.config.items() if section != "identity"}
        settings = {name: value for name, value in flatten(config) if name.split(".")[-1] not in NO_SETTING}
        same = [group for group in groups if settings and group.settings == settings]
        if not same:
            same = [Group(settings)]
            groups += same
        same[0].runs.append(run)
    differing = differing_settings(groups)
    for group, *values in zip(groups, *(values for _, values in differing), strict=True):
        if 1 <= len(differing) <= 2:
            names = [name.split(".")[-1].replace("_", " ") for name, _ in differing]
            group.name = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
        else:
            group.name = group.runs[0].name + (f" and {len(group.runs) - 1} more" if len(group.runs) > 1 else "")
    return groups


def differing_settings(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Each setting that the groups don't all have alike, with its value in each."""
    names = dict.fromkeys(name for group in groups for name in group.settings)
    table = [(name, [group.settings.get(name, NONE) for group in groups]) for name in names]
    return [(name, values) for name, values in table if len(set(values)) > 1]


def mean_curve(runs: Sequence[Run], value_of: Callable[[dict[str, Any]], float | None]) -> Curve:
    """Mean and standard deviation over the runs, at those epochs at which all of them have a value."""
    series = []
    for run in runs:
        values = {line["epoch"]: value_of(line) for line in run.epochs}
        series.append({epoch: value for epoch, value in values.items() if value is not None})
    epochs = sorted(set.intersection(*(set(values) for values in series)))
    at = [[values[epoch] for values in series] for epoch in epochs]
    return epochs, [statistics.mean(values) for values in at], [spread_of(values) for values in at]


def spread_of(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _plot_groups(
    axes: Axes, groups: Sequence[Group], value_of: Callable[[dict[str, Any]], float | None], form: str, what: str,
    detecting: bool = False,
) -> str:  # fmt: skip
    """A line for each group that has values, with a band of one standard deviation; what it shows, in words."""
    told = []
    for style, group in enumerate(groups):
        if detecting and not group.runs[0].levels:
            continue
        epochs, means, spreads = mean_curve(group.runs, value_of)
        if not epochs:
            continue
        plot_line(axes, epochs, means, style, label=shortened(group.name, 36))
        if any(spreads):
            low, high = ([m + side * s for m, s in zip(means, spreads, strict=True)] for side in (-1, 1))
            axes.fill_between(epochs, low, high, color=SERIES[style % len(SERIES)], alpha=0.18, linewidth=0)
        told.append(f"{what} of {group.name}: {form.format(means[-1])} at epoch {epochs[-1]}.")
    epoch_axis(axes, [line for group in groups for run in group.runs for line in run.epochs])
    return " ".join(told)


def _legend(figure: Figure, *panels: Axes) -> None:
    """Of the lines of all panels, each once; the figure grows with it."""
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if lines:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.2 * ((len(lines) - 1) // 2))
        figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=2)


def _curves(figure: Figure, groups: Sequence[Group], key: str, title: str, label: str, form: str) -> Texts | None:
    axes = figure.subplots()
    alt = _plot_groups(axes, groups, lambda line: number(line.get(key)), form, title)
    axes.set_ylabel(label)
    _legend(figure, axes)
    return (title, "At the end of each epoch.", alt) if alt else None


def _acceptance(figure: Figure, groups: Sequence[Group]) -> Texts | None:
    axes = figure.subplots()
    alt = _plot_groups(
        axes, groups, lambda line: number(line.get("acceptance_rate")), "{:.0%}", "Acceptance rate", True
    )
    percent_axis(axes, "accepted labels")
    _legend(figure, axes)
    return ("Acceptance rate", "Share of pseudo labels that training trusts.", alt) if alt else None


def _detection(figure: Figure, groups: Sequence[Group], level: int) -> Texts | None:
    alts = []
    panels = figure.subplots(1, 2, sharey=True)
    for axes, what in zip(panels, ("precision", "recall"), strict=True):
        alts.append(
            _plot_groups(
                axes,
                groups,
                lambda line, key=f"false_negative_{what}": _of_level(line, key, level),  # type: ignore[misc]
                "{:.0%}",
                what.capitalize(),
                True,
            )  # fmt: skip
        )
        percent_axis(axes, what)
    _legend(figure, *panels)
    names = list(dict.fromkeys(group.runs[0].levels[level] for group in groups if level < len(group.runs[0].levels)))
    title = f"Detection with {' or '.join(names)}"
    caption = "Share of the detected false negatives that truly are, and share of the true ones detected."
    return (title, caption, " ".join(alts)) if any(alts) else None


def _of_level(line: dict[str, Any], key: str, level: int) -> float | None:
    values = line.get(key)
    return number(values[level]) if isinstance(values, list) and level < len(values) else None


def _columns() -> list[tuple[str, Callable[[Run], list[float | None]], Callable[[float], str]]]:
    """Title, values of a run (of each level, or one), and how to write one."""

    def last(key: str) -> Callable[[Run], list[float | None]]:
        return lambda run: [number(run.epochs[-1].get(key))]

    def levels(key: str) -> Callable[[Run], list[float | None]]:
        return lambda run: [_of_level(run.epochs[-1], key, level) for level in range(len(run.levels))]

    def few(run: Run) -> list[float | None]:
        found = few_labels(run.accuracies).get(HEADLINE_LABELS)
        return [None if found is None else found.mean]

    return [
        ("kNN top-1, %", lambda run: [run.trained[0]], "{:.2f}".format),
        (f"{HEADLINE_LABELS} labels a class, %", few, "{:.2f}".format),
        ("untrained, %", lambda run: [number(run.accuracies.get("knn_top1_untrained"))], "{:.2f}".format),
        ("raw pixels, %", lambda run: [number(run.accuracies.get("knn_top1_raw_pixels"))], "{:.2f}".format),
        ("loss", last("loss"), "{:.3f}".format),
        ("precision, %", levels("false_negative_precision"), lambda share: f"{100 * share:.0f}"),
        ("recall, %", levels("false_negative_recall"), lambda share: f"{100 * share:.0f}"),
        ("epochs", lambda run: [float(run.epochs[-1]["epoch"])], "{:.0f}".format),
        ("minutes", lambda run: [run.seconds / 60 or None], "{:,.1f}".format),
    ]


@dataclass(frozen=True)
class FigureRow:
    name: str
    cells: list[str]
    group: int
    is_part: bool  # a run of the group above


def _figure_rows(groups: Sequence[Group]) -> list[FigureRow]:
    """A row for each group, of its finished runs where there are any, and for each run of a group of several."""
    rows = []
    for i, group in enumerate(groups):
        counted = [run for run in group.runs if run.result] or group.runs
        cells = [_cell([values(run) for run in counted], form) for _, values, form in _columns()]
        name = group.name
        if len(group.runs) > 1:
            name += f" (mean of {len(counted)}{' finished' if len(counted) < len(group.runs) else ''})"
        elif name != group.runs[0].name:
            name += f" ({group.runs[0].name})"
        rows.append(FigureRow(name, cells, i, False))
        if len(group.runs) > 1:
            for run in group.runs:
                name = f"{run.name}, seed {run.option('run', 'seed', '?')}"
                rows.append(FigureRow(name, [_cell([values(run)], form) for _, values, form in _columns()], i, True))
    return rows


def _cell(values: list[list[float | None]], form: Callable[[float], str]) -> str:
    """Of one or more runs' values: the value, or mean (standard deviation) where they differ, for each level."""
    texts = []
    for of_runs in zip(*values, strict=False):
        known = [value for value in of_runs if value is not None]
        text = form(statistics.mean(known)) if known else NONE
        texts.append(f"{text} ({form(spread_of(known))})" if len(set(known)) > 1 else text)
    return " / ".join(texts) or NONE


def _cautions(runs: Sequence[Run]) -> list[str]:
    notes = []
    data = dict.fromkeys(str(run.option("data", "data", "?")) for run in runs)
    if len(data) > 1:
        notes.append(f"The runs are of different data ({', '.join(data)}): their figures are not of one kind.")
    going = [f"{run.name} ({run.progress})" for run in runs if not run.result]
    if going:
        notes.append(f"Without a result yet, so as of the last epoch: {', '.join(going)}.")
    return notes
