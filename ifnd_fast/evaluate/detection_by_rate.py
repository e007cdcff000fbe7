"""ifnd-fast-eval false-negatives: precision and recall of the detection at every acceptance rate.

The diagnostic of Chen et al., Incremental False Negative Detection for Contrastive Learning, ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ifnd_fast import config as configs
from ifnd_fast.clustering.image_clusters import Clustering
from ifnd_fast.config import DataConfig
from ifnd_fast.evaluate.clustering import ClusterOptions, cluster_images, labelled_training_images
from ifnd_fast.evaluate.subject import Options, Subject, tell
from ifnd_fast.labelling import clustering_in
from ifnd_fast.metrics.false_negatives import DetectionByRate, detection_of
from ifnd_fast.plots import INK, Texts, check_file_kind, percent_axis, plot_line, save_picture
from ifnd_fast.runtime.checkpoint import list_checkpoints, load_latest
from ifnd_fast.runtime.console import say
from ifnd_fast.runtime.errors import UsageError


def false_negatives(
    options: tyro.conf.OmitArgPrefixes[Options],
    clustering: tyro.conf.OmitArgPrefixes[ClusterOptions],
    plot: Path | None = None,
) -> None:
    """Precision and recall of false negative detection against true classes, at every acceptance rate and level.

    Of a run's folder its own last pseudo labels, where it has any and neither --data nor an option of the clustering
    asks for another one; else the training images' features are clustered. All pairs of two different training images
    count.

    Args:
        plot: write the curves to this file (.png, .svg or .pdf)
    """
    if plot is not None:
        check_file_kind("--plot", plot)
    found, data, source = _own_clustering(options) if clustering == ClusterOptions() else (None, None, "")
    if found is None or data is None:
        subject = Subject(options)
        data = subject.data
        images, truth = labelled_training_images(data)
        found, kind = cluster_images(subject, subject.config, images, clustering)
        source = f"clusters of {kind} features"
    else:
        _, truth = labelled_training_images(data)
        if len(truth) != len(found.labels):
            raise UsageError(
                f"--data {data.data} has {len(truth):,} training images, but the run's labels are of "
                f"{len(found.labels):,}: give --levels to cluster these images"
            )
    detected = detection_of(found, truth)
    tell(
        options, data, f"Detection by {source}, {data.data}",
        ["accepted", *(f"{what} {n:,}" for n in found.levels for what in ("prec.", "recall"))],
        _rows(detected, every=5),
        {
            "source": source, "levels": list(found.levels), "acceptance_rate": detected.rates,
            "false_negatives_per_query": detected.per_query, "false_negative_precision": detected.precision,
            "false_negative_recall": detected.recall,
        },
    )  # fmt: skip
    if plot is not None:
        save_picture(plot, draw_detection_by_rate, detected, [f"{n:,} clusters" for n in found.levels])
        say(f"plot: {plot}")


def _own_clustering(options: Options) -> tuple[Clustering | None, DataConfig | None, str]:
    """The last clustering of the run that CHECKPOINT is the folder of, its data and what to call it; or None."""
    out = options.checkpoint
    if not out.is_dir() or not list_checkpoints(out):
        return None, None, ""
    data = configs.load(out / "config.yaml").data
    if options.data not in (None, data.data):
        return None, None, ""
    data.data_root = options.data_root or data.data_root
    state = load_latest(out)
    return clustering_in(state), data, f"the run's own labels of epoch {state['epoch']}"


def _rows(detected: DetectionByRate, every: int) -> list[list[str]]:
    """Of every so many rates: the rate, and precision and recall of each level."""
    rows = []
    for at in range(0, len(detected.rates), every):
        shares = [
            levels[at] for of_level in zip(detected.precision, detected.recall, strict=True) for levels in of_level
        ]
        rows.append([f"{detected.rates[at]:.0%}", *("-" if s is None else f"{s:.3f}" for s in shares)])
    return rows


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
