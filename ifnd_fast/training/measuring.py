"""What is measured in a run, and where its figures go."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ifnd_fast.config import Config
from ifnd_fast.contrast.encoder import Encoder
from ifnd_fast.data import features
from ifnd_fast.data.images import Images
from ifnd_fast.metrics.knn import KnnProbe
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.console import say
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.runtime.run_folder import append_metrics


class Measuring:
    """The encoder's accuracy on the way, where the images are labelled; labels only measure, they never train.

    Args:
        config: of the run.
        images: that it trains on.
        tests: to measure with; None: a part of the images.
        device: to compute on.
        autocast: the run's precision.

    Attributes:
        result: accuracies, percent, for result.json.
    """

    def __init__(self, config: Config, images: Images, tests: Images | None, device: torch.device,
                 autocast: Callable[[], AbstractContextManager]):  # fmt: skip
        self.config, self.images, self.device, self.autocast = config, images, device, autocast
        labelled = images.labels is not None and (tests is None or tests.labels is not None)
        self.probe = KnnProbe(images, tests) if labelled else None
        self.result: dict[str, float] = {}

    def before_training(self, encoder: Encoder) -> None:
        """What the trained encoder is compared with: raw pixels and the encoder as it is now."""
        if self.probe is None or "knn_top1_untrained" in self.result:
            return
        data = self.config.data
        if data.image_size <= 64 and len(self.images) <= 100_000:  # else their kNN takes too long
            self.result["knn_top1_raw_pixels"] = self.probe.accuracy(lambda images: features.raw_pixels(images, data))
        self.result["knn_top1_untrained"] = self._knn_top1(self.probe, encoder)

    def after_epoch(self, epoch: int, encoder: Encoder) -> dict[str, float]:
        """The metrics that are due after so many epochs."""
        every, last = self.config.run.knn_every, epoch == self.config.optim.epochs
        if self.probe is None or not (last or (every and epoch % every == 0)):
            return {}
        accuracy = self._knn_top1(self.probe, encoder)
        if last:
            self.result["knn_top1"] = accuracy
        return {"knn_top1": accuracy}

    def _knn_top1(self, probe: KnnProbe, encoder: Encoder) -> float:
        """kNN accuracy of the backbone's features, percent."""
        return probe.accuracy(
            lambda images: features.extract(
                encoder.backbone, images, self.config.data, self.device, self.autocast, "kNN features"
            )[0]
        )


def report_epoch(settings: Config, metrics: dict[str, Any]) -> None:
    """An epoch's line of metrics.jsonl, its TensorBoard scalars if asked for, and a line for the person.

    Raises:
        CommandError: the disk is full or not writable.
        UsageError: tensorboard is not installed.
    """
    counts = " ".join(f"{count:.1f}" for count in metrics["false_negatives_per_query"])
    knn = f"  kNN {metrics['knn_top1']:.2f} %" if "knn_top1" in metrics else ""
    skipped = f"  {metrics['skipped_steps']} steps skipped" if metrics.get("skipped_steps") else ""
    say(
        f"epoch {metrics['epoch']}/{settings.optim.epochs}  loss {metrics['loss']:.3f}"
        f"  accepted {metrics['acceptance_rate']:.0%}  false negatives/query {counts}"
        f"  {metrics['images_per_second']:.0f} images/s{knn}{skipped}"
    )
    if distributed.rank() != 0:
        return
    append_metrics(settings.run.out, metrics)
    if settings.run.tensorboard:
        _write_scalars(settings.run.out / "tensorboard", metrics)


def _write_scalars(folder: Path, metrics: dict[str, Any]) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard: pip install 'ifnd-fast[tensorboard]' first") from error
    with SummaryWriter(str(folder)) as writer:
        for name, value in metrics.items():
            if isinstance(value, list):
                for level, item in enumerate(value):
                    if isinstance(item, list):  # a figure per iteration: where it ended
                        item = item[-1]
                    if item is not None:
                        writer.add_scalar(f"{name}/level_{level}", item, metrics["epoch"])
            elif name not in ("epoch", "step"):
                writer.add_scalar(name, value, metrics["epoch"])
