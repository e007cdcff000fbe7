"""What is measured in a run, and where its figures go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ifnd_fast.config import Config, DataConfig
from ifnd_fast.contrast.encoder import Encoder
from ifnd_fast.data import features
from ifnd_fast.data.images import Images
from ifnd_fast.data.unreadable import Unreadable
from ifnd_fast.metrics.false_negatives import detection_statistics
from ifnd_fast.metrics.few_shot import SHOTS, few_shot_accuracies, summary, usable_shots
from ifnd_fast.metrics.knn import knn_accuracy
from ifnd_fast.metrics.labelled import LabelledFeatures, LabelledImages
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.compute import Compute
from ifnd_fast.runtime.console import say, stage, warn
from ifnd_fast.runtime.errors import CommandError
from ifnd_fast.runtime.run_folder import append_metrics

FEW_LABELS = 10_000
"""Labelled images that a run's own logistic regressions take at most: `ifnd-fast-eval few-shot` takes more."""


def pixels_are_few(config: DataConfig, n_images: int) -> bool:
    """Whether the images are as small and as few as figures of their raw pixels are quick for."""
    return config.image_size <= 64 and n_images <= 100_000


class Measuring:
    """Accuracies of the encoder on the way, where the images are labelled, by kNN and, before training and at its end,
    with few labels; labels only measure, they never train.

    Args:
        config: of the run.
        images: that it trains on.
        tests: that it measures with; None: every tenth of those.
        unreadable: gets the training images that are.
        compute: how the encoder is evaluated.

    Attributes:
        result: accuracies by name, percent, for result.json: see `accuracies`.
    """

    def __init__(self, config: Config, images: Images, tests: Images | None, unreadable: Unreadable, compute: Compute):
        self.config, self.images, self.compute = config, images, compute
        self.unreadable = unreadable
        self.unreadable_tests = unreadable if tests is None else Unreadable(tests, config.data.strict)
        measurable = images.labels is not None and (tests is None or tests.labels is not None)
        self.labelled = LabelledImages(images, tests) if measurable else None
        self.shots: tuple[int, ...] | None = None  # of few labels: what the classes have; None: not looked at yet
        self.result: dict[str, Any] = {}

    def before_training(self, encoder: Encoder) -> None:
        """Of the untrained backbone, and of the pixels of images as small and few as they are quick for."""
        if "knn_top1_untrained" in self.result:
            return
        if pixels_are_few(self.config.data, len(self.images)):
            self.result |= self._measure("_raw_pixels", nn.Flatten(), Compute(torch.device("cpu")), few_labels=True)
        self.result |= self._measure("_untrained", encoder.backbone, self.compute, few_labels=True)

    def after_epoch(self, epoch: int, encoder: Encoder) -> dict[str, float]:
        """The metrics that are due after so many epochs."""
        every, last = self.config.run.knn_every, epoch == self.config.optim.epochs
        if not (last or (every and epoch % every == 0)):
            return {}
        found = self._measure("", encoder.backbone, self.compute, few_labels=last)
        self.result |= found if last else {}
        return {name: value for name, value in found.items() if name == "knn_top1"}

    def detection(self, labels: Tensor, negative_labels: Tensor, negative_indices: Tensor) -> dict[str, Any]:
        """What labels detect among negatives, counted over the readable images: see `detection_statistics`; all ranks
        have to call it."""
        counted = self.unreadable.readable(self.compute.device)
        return detection_statistics(labels, negative_labels, negative_indices, self.images.labels, counted=counted)

    def _measure(self, suffix: str, network: nn.Module, compute: Compute, few_labels: bool) -> dict[str, Any]:
        """Accuracies by name; empty, with a warning, where no image that they take can be read."""
        if self.labelled is None:
            return {}

        def features_of(images: Images) -> tuple[Tensor, Tensor]:
            unreadable = self.unreadable if images is self.images else self.unreadable_tests
            return features.extract(network, images, self.config.data, compute, "kNN features", unreadable=unreadable)

        try:
            labelled = self.labelled.features(features_of)
        except CommandError as error:
            if type(error) is not CommandError or self.config.data.strict:  # a signal, say
                raise
            warn(f"knn_top1{suffix} was not measured: {error}")
            return {}
        with stage("kNN"):
            found: dict[str, Any] = {f"knn_top1{suffix}": knn_accuracy(*labelled)}
        if few_labels:
            found[f"few_shot_top1{suffix}"] = self._with_few_labels(labelled)
        return found

    def _with_few_labels(self, labelled: LabelledFeatures) -> dict[str, dict[str, Any]]:
        if self.shots is None:
            most = max(1, FEW_LABELS // len(labelled.train_labels.unique()))
            if most < max(SHOTS):
                say(f"few labels: up to {most} a class; ifnd-fast-eval few-shot measures more")
            self.shots = usable_shots(labelled.train_labels, [n for n in SHOTS if n <= most])
        return summary(few_shot_accuracies(*labelled, shots=self.shots)) if self.shots else {}


def report_epoch(settings: Config, metrics: dict[str, Any]) -> None:
    """An epoch's line of metrics.jsonl, and a line for the person.

    Raises:
        CommandError: the disk is full or not writable.
    """
    counts = " ".join(f"{count:.1f}" for count in metrics["false_negatives_per_query"])
    knn = f"  kNN {metrics['knn_top1']:.2f} %" if "knn_top1" in metrics else ""
    skipped = f"  {metrics['skipped_steps']} steps skipped" if metrics.get("skipped_steps") else ""
    say(
        f"epoch {metrics['epoch']}/{settings.optim.epochs}  loss {metrics['loss']:.3f}"
        f"  accepted {metrics['acceptance_rate']:.0%}  false negatives/query {counts}"
        f"  {metrics['images_per_second']:.0f} images/s{knn}{skipped}"
    )
    if distributed.rank() == 0:
        append_metrics(settings.run.out, metrics)
