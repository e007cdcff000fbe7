"""ifnd-fast-eval false-negatives: precision and recall of the detection at every acceptance rate.

The diagnostic of Chen et al., Incremental False Negative Detection for Contrastive Learning, ICLR 2022.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from ifnd_fast import config as configs
from ifnd_fast.clustering.image_clusters import ImageClusters
from ifnd_fast.config import DataConfig
from ifnd_fast.data import identity
from ifnd_fast.data.images import Images
from ifnd_fast.evaluate.cluster_images import ClusterOptions, cluster_images, labelled_training_images
from ifnd_fast.evaluate.subject import Options, Subject, check_json_file, chosen_state, write_result
from ifnd_fast.metrics.false_negatives import DetectionByRate, detection_of
from ifnd_fast.report.detection_by_rate import draw_detection_by_rate
from ifnd_fast.report.plots import check_file_kind, save_picture
from ifnd_fast.runtime.console import say
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.runtime.paths import refuse_folder
from ifnd_fast.training.saved_run import config_of, has_checkpoint
from ifnd_fast.training.saved_state import SavedState


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
        refuse_folder("--plot", plot)
    check_json_file(options.json_file)
    found, data, state = _own_clustering(options) if clustering == ClusterOptions() else (None, None, None)
    if found is None or data is None or state is None:
        subject = Subject(options)
        data, state = subject.data, subject.state
        images, truth = labelled_training_images(data)
        found, kind = cluster_images(subject, subject.config, images, clustering)
        source = f"clusters of {kind} features"
    else:
        images, truth = labelled_training_images(data)
        source = f"the run's own labels of epoch {state.epoch}"
        _check_same(options.checkpoint, state, data, images, len(found.labels))
    detected = detection_of(found, truth)
    write_result(
        options, data, f"Detection by {source}, {data.data}",
        ["accepted", *(f"{what} {n:,}" for n in found.levels for what in ("prec.", "recall"))],
        _rows(detected, every=5),
        {
            "source": source, "levels": list(found.levels), "acceptance_rate": detected.rates,
            "false_negatives_per_query": detected.per_query, "false_negative_precision": detected.precision,
            "false_negative_recall": detected.recall,
        },
        state,
    )  # fmt: skip
    if plot is not None:
        save_picture(plot, draw_detection_by_rate, detected, [f"{n:,} clusters" for n in found.levels])
        say(f"plot: {plot}")


def _own_clustering(options: Options) -> tuple[ImageClusters | None, DataConfig | None, SavedState | None]:
    """The last clustering of the run that CHECKPOINT is the folder of, its data and the checkpoint with it; or None."""
    out = options.checkpoint
    if not has_checkpoint(out):
        return None, None, None
    data = config_of(out).data
    if options.data is not None and configs.full_data(options.data) != configs.full_data(data.data):
        return None, None, None
    data.data_root = options.data_root or data.data_root
    state = chosen_state(out, options.step, options.json_file) or SavedState.latest(out)
    return state.clustering(), data, state


def _check_same(out: Path, state: SavedState, data: DataConfig, images: Images, labelled: int) -> None:
    """Raises UsageError: the images are not those that the run's labels are of."""
    then = state.identity
    text = identity.changes(out, then, {"train": images.listing()}) if then else ""
    if len(images) != labelled and not text:
        text = f"it has {len(images):,} training images, the run's labels are of {labelled:,}"
    if text:
        raise UsageError(
            f"--data {data.data} does not hold the images that the run's labels are of: {text}; give --levels to "
            "cluster these images"
        )


def _rows(detected: DetectionByRate, every: int) -> list[list[str]]:
    """Of every so many rates: the rate, and precision and recall of each level."""
    rows = []
    for at in range(0, len(detected.rates), every):
        shares = [
            levels[at] for of_level in zip(detected.precision, detected.recall, strict=True) for levels in of_level
        ]
        rows.append([f"{detected.rates[at]:.0%}", *("-" if s is None else f"{s:.3f}" for s in shares)])
    return rows
