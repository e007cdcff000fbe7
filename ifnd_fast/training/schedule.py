"""What changes over a training: the learning rate, which labels are in use, and how many clusters the images allow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ifnd_fast.clustering.acceptance import acceptance_rate, accepted_count
from ifnd_fast.clustering.levels import scale_levels
from ifnd_fast.config import Config, OptimConfig
from ifnd_fast.runtime.console import warn
from ifnd_fast.runtime.errors import UsageError

IMAGES_PER_CLUSTER = 4
"""At the finest level there is at most one cluster for so many images: of fewer a cluster says little."""


def learning_rate(step: int, steps_per_epoch: int, config: OptimConfig) -> float:
    """Linear warm-up, then half a cosine from lr to 0 over the rest of the training."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def rate_of(config: Config, epoch: int) -> float:
    """The acceptance rate at the start of an epoch (from 0)."""
    cluster = config.cluster
    return acceptance_rate(epoch / config.optim.epochs, cluster.acceptance_end, cluster.acceptance_max)


def labels_by_clustering(config: Config) -> bool:
    """Whether labels come from clusterings: they are neither the true ones, nor are there none."""
    return config.contrast.false_negatives in ("eliminate", "attract")


def clusters_before(config: Config, epoch: int) -> bool:
    """Whether a clustering begins before this epoch (from 0)."""
    if not labels_by_clustering(config):
        return False
    too_late = config.cluster.cluster_async and epoch + 1 == config.optim.epochs
    return epoch % config.recluster_epochs == 0 and rate_of(config, epoch) > 0 and not too_late


def acting_epochs(config: Config, n_images: int) -> list[int]:
    """The epochs (from 0) in which labels act: two or more images have accepted ones.

    Args:
        n_images: that have features.
    """
    if config.contrast.false_negatives == "oracle":
        return list(range(config.optim.epochs))
    late, acting, in_use = int(config.cluster.cluster_async), [], False
    for epoch in range(config.optim.epochs):
        if epoch >= late and clusters_before(config, epoch - late):
            in_use = accepted_count(rate_of(config, epoch), n_images) >= 2
        if in_use:
            acting.append(epoch)
    return acting


def never_acts(config: Config, n_images: int) -> str | None:
    """Why the detection of false negatives does nothing in the whole run, and what helps; None: it does something, or
    was not asked for."""
    if config.contrast.false_negatives == "keep" or acting_epochs(config, n_images):
        return None
    every, epochs, late = config.recluster_epochs, config.optim.epochs, int(config.cluster.cluster_async)
    first = every + late  # epochs without labels: at the start of the training none is accepted
    if first >= epochs:
        longest = epochs - 1 - late
        delay = ", an epoch late by --cluster-async," if late else ""
        why = f"the first labels come{delay} after epoch {first}, and the training has {epochs}"
        how = f"--recluster-every {longest} or less, or " if longest >= 1 else ""
        how += f"--epochs {first + 1} or more"
    else:
        why = f"of {n_images} images at most {accepted_count(rate_of(config, epochs - 1), n_images)} label is accepted"
        how = "a smaller --acceptance-end, a larger --acceptance-max, more --epochs or more images"
    strategy = config.contrast.false_negatives
    return (
        f"--false-negatives {strategy} never acts in this run: {why}. It trains as with --false-negatives keep; "
        f"for labels give {how}"
    )


def fewest_images(n_levels: int) -> int:
    """How many images so many levels need, each of 2 clusters or more and all different."""
    return IMAGES_PER_CLUSTER * (n_levels + 1)


def fit_levels(levels: Sequence[int], n: int) -> tuple[int, ...]:
    """The levels, scaled down together so that the finest has at most one cluster for every IMAGES_PER_CLUSTER of n
    images; all of them stay different, and of 2 clusters or more.

    Raises:
        UsageError: n images are too few for so many levels.
    """
    finest = n // IMAGES_PER_CLUSTER
    if n < fewest_images(len(levels)):
        raise UsageError(
            f"{n} readable and distinct images are too few for {len(levels)} levels of clusters, which need "
            f"{fewest_images(len(levels))}: give fewer --levels, more images, or --false-negatives keep"
        )
    scaled = list(scale_levels(levels, finest))
    order = sorted(range(len(levels)), key=lambda i: levels[i])
    least, most = 2, finest - len(order) + 1
    for i in order:
        scaled[i] = min(max(scaled[i], least), most)
        least, most = scaled[i] + 1, most + 1
    return tuple(scaled)


def levels_of(config: Config, n_images: int, true_labels: np.ndarray | None) -> tuple[int, ...]:
    """The run's clusters at each level, as its images allow them; of the oracle the number of classes.

    Raises:
        UsageError: the oracle has no true labels; or see `levels_for`.
    """
    if config.contrast.false_negatives == "oracle":
        if true_labels is None:
            raise UsageError("--false-negatives oracle needs images in one folder per class")
        return (int(true_labels.max()) + 1,)
    levels = config.cluster.levels
    return levels_for(config, levels, levels, n_images, "images") if labels_by_clustering(config) else levels


def levels_for(config: Config, wanted: tuple[int, ...], now: tuple[int, ...], n: int, what: str) -> tuple[int, ...]:
    """The wanted levels as n images allow them, with a warning where they differ from those now.

    Args:
        what: kind of images the n are, for messages.

    Raises:
        UsageError: the images are too few, or with --strict for the levels as they are.
    """
    fitting = fit_levels(wanted, n)
    rule = f"at most one cluster for every {IMAGES_PER_CLUSTER} {what}, of which there are {n:,}"
    if fitting != wanted and config.data.strict:
        raise UsageError(f"--levels {' '.join(map(str, wanted))}: {rule} (--strict)")
    if fitting != now:
        warn(f"--levels {' '.join(map(str, now))} scaled to {' '.join(map(str, fitting))}: {rule}")
    return fitting
