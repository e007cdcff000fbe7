"""A clustering to evaluate: of the features that training would cluster, or of a backbone's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ifnd_fast.clustering.distinct import count_distinct
from ifnd_fast.clustering.image_clusters import ImageClusters
from ifnd_fast.clustering.levels import cluster_levels
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.config import SEED, TEMPERATURE, Config, DataConfig, at_least, check, check_levels
from ifnd_fast.data.found import tell_found
from ifnd_fast.data.images import Images
from ifnd_fast.data.sources import open_for_run
from ifnd_fast.evaluate.subject import Subject
from ifnd_fast.runtime.console import progress, warn
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.training.saved_run import has_checkpoint, load_encoder
from ifnd_fast.training.schedule import IMAGES_PER_CLUSTER, fit_levels


@dataclass
class LevelOptions:
    """How features are clustered."""

    levels: Annotated[tuple[int, ...] | None, at_least(2)] = None
    """clusters at each level; default: the run's (of bare weights the imagenet preset's), scaled down to at most one
    cluster for every 4 images that are readable and distinct"""
    kmeans_iterations: Annotated[int, at_least(1)] = 20
    """most Lloyd iterations per level"""
    confidence_temperature: Annotated[float | None, TEMPERATURE] = None
    """of the labels' confidence; default: the run's"""
    seed: Annotated[int, SEED] = 0
    """of the initial centroids"""


@dataclass
class ClusterOptions(LevelOptions):
    """How the training images are clustered."""

    features: Literal["encoder", "backbone"] | None = None
    """features of the run's momentum encoder, which training clusters, or of the backbone; default: the encoder's of
    a run's folder, else the backbone's"""


def labelled_training_images(data: DataConfig) -> tuple[Images, np.ndarray]:
    """The images and their true labels (N,).

    Raises:
        UsageError: no such data, or no labels.
    """
    images, tests = open_for_run(data)
    if images is not None:
        tell_found(data, images, tests)
    if images is None or images.labels is None:
        raise UsageError(f"--data {data.data}: needs true labels, that is images in one folder per class")
    return images, images.labels


def cluster_images(
    subject: Subject, config: Config, images: Images, options: ClusterOptions
) -> tuple[ImageClusters, str]:
    """Cluster the images' unit features at every level; and what kind of features, "encoder" or "backbone".

    Raises:
        UsageError: an option is out of range, or there are fewer images than clusters were asked for.
        CommandError: the run has no checkpoint to take the encoder from, or the features can't be clustered.
    """
    check_clustering(config, options)
    out = subject.options.checkpoint
    kind = options.features or ("encoder" if has_checkpoint(out) else "backbone")
    if kind == "encoder":
        subject.network = load_encoder(out, config, subject.state).to(subject.compute.device)
    vectors, usable = subject.features(images)
    return cluster_vectors(vectors, usable, config, options), kind


def check_clustering(config: Config, options: LevelOptions) -> float:
    """The temperature of confidence, the run's where none was given.

    Raises:
        UsageError: an option is out of range.
    """
    temperature = options.confidence_temperature
    temperature = config.contrast.temperature if temperature is None else temperature
    check(dataclasses.replace(options, confidence_temperature=temperature))
    if options.levels is not None:
        check_levels(options.levels)
    return temperature


def cluster_vectors(vectors: Tensor, usable: Tensor, config: Config, options: LevelOptions) -> ImageClusters:
    """Cluster unit vectors of features (N, D) of N images, of those that are usable, (N,) bool, not zero, and finite.

    Raises:
        UsageError: an option is out of range, or there are fewer images than clusters were asked for.
        CommandError: the features can't be clustered.
    """
    temperature = check_clustering(config, options)
    vectors = F.normalize(vectors)
    usable = usable & vectors.isfinite().all(dim=1) & vectors.any(dim=1)
    if not bool(usable.all()):
        warn(f"{int((~usable).sum()):,} images without features (unreadable, or all zero) are left out")
    levels = _levels(options.levels, config.cluster.levels, count_distinct(vectors[usable], Shards.alone(vectors)))
    labels = torch.full((len(vectors), len(levels)), -1, dtype=torch.int32, device="cpu")
    confidence = torch.zeros(labels.shape, dtype=torch.float32, device="cpu")
    labels[usable.cpu()], confidence[usable.cpu()] = _cluster(vectors[usable], levels, temperature, options)
    return ImageClusters(tuple(levels), labels, confidence)


def _levels(wanted: tuple[int, ...] | None, of_run: tuple[int, ...], n: int) -> tuple[int, ...]:
    """As asked for, or those of the run, scaled to n images with distinct features."""
    if wanted is None:
        levels = fit_levels(of_run, n)
        if levels != of_run:
            warn(
                f"the run's levels {' '.join(map(str, of_run))} scaled to {' '.join(map(str, levels))}: at most one "
                f"cluster for every {IMAGES_PER_CLUSTER} images with distinct features, of which there are {n:,}"
            )
        return levels
    if max(wanted) > n:
        raise UsageError(f"--levels {' '.join(map(str, wanted))}: more clusters than the {n} images (distinct ones)")
    return wanted


def _cluster(
    vectors: Tensor, levels: tuple[int, ...], temperature: float, options: LevelOptions
) -> tuple[Tensor, Tensor]:
    """Labels and confidence (n, L) of unit vectors (n, D), on the CPU."""
    with progress("clustering", len(levels) * options.kmeans_iterations) as advance:
        try:
            found = cluster_levels(
                vectors, levels, temperature=temperature, max_iter=options.kmeans_iterations, seed=options.seed,
                progress=lambda *_: advance(),
            )  # fmt: skip
        except ValueError as error:  # too few different features, say
            raise CommandError(f"the features can't be clustered: {error}") from error
    labels = torch.stack([level.labels for level in found], dim=1)
    confidence = torch.stack([level.confidence for level in found], dim=1)
    return labels.cpu(), confidence.cpu()
