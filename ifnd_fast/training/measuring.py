"""What is measured in a run, and where its figures go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ifnd_fast.config import Config
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.console import say
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.runtime.run_folder import append_metrics


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
