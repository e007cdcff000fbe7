"""What can be said of a run before it takes any time: images that can't be trained on, missing packages, labels that
will never act."""

from __future__ import annotations

import importlib

import numpy as np

from ifnd_fast.config import Config
from ifnd_fast.data.images import Images
from ifnd_fast.data.views import centre_view
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.console import say, warn
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.training.schedule import acting_epochs, labels_by_clustering, never_acts

SAMPLE = 64  # images that are looked at


def check_packages(config: Config) -> None:
    """Raises UsageError: an option needs a package that is not installed, or can't be imported."""
    wanted = [
        (config.run.tensorboard, "--tensorboard", "torch.utils.tensorboard", "'ifnd-fast[tensorboard]'"),
        (config.run.wandb, "--wandb", "wandb", "'ifnd-fast[wandb]'"),
        (config.run.mlflow, "--mlflow", "mlflow", "'ifnd-fast[mlflow]'"),
        (config.data.augment == "device" and config.data.color_jitter > 0, "--augment device with --color-jitter",
         "kornia", "'ifnd-fast[augment]'"),
        (config.cluster.kmeans_engine == "faiss", "--kmeans-engine faiss", "faiss", "faiss-cpu"),
    ]  # fmt: skip
    for asked, option, module, package in wanted:
        try:
            if asked:
                importlib.import_module(module)
        except ImportError as error:
            raise UsageError(f"{option}: pip install {package} first ({error})") from error


def checked(images: Images | None, config: Config) -> Images:
    """The images, which can be trained on as far as a sample of them shows.

    Raises:
        UsageError: they are too few for the batches, or all alike.
        CommandError: none can be read.
    """
    n, batch, ranks = 0 if images is None else len(images), config.optim.batch_size, distributed.world_size()
    if images is None or n < 2:
        raise UsageError(f"--data {config.data.data} has {n} images to train on: contrast needs at least two")
    if batch > n:
        raise UsageError(f"--batch-size {batch} is larger than the data set ({n} images): lower it")
    if batch % ranks or batch < 2 * ranks:
        raise UsageError(f"--batch-size {batch} must divide by the {ranks} ranks, and be two or more for each")
    if batch // ranks < 2 * config.optim.accumulate:
        parts = f"{batch // ranks} images of a rank in {config.optim.accumulate} parts"
        raise UsageError(f"--accumulate: {parts} would be less than two in each: batch norm needs two")
    with distributed.raise_on_all_ranks(True):
        if distributed.rank() == 0:
            _look_at_some(images, config)
    return images


def _look_at_some(images: Images, config: Config) -> None:
    view, seen, readable, reason = centre_view(config.data), set(), 0, ""
    numbers = np.unique(np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).astype(int)).tolist()
    for number in numbers:
        try:
            seen.add(view(images.image(number)).numpy().tobytes())
            readable += 1
        except CommandError:  # a signal that asks to stop
            raise
        except Exception as error:  # whatever a broken file makes of it
            reason = reason or f"{images.name(number)}: {error}"
    looked = "all" if len(numbers) == len(images) else f"{len(numbers)} looked at"
    if not readable:
        data = f"--data {config.data.data}: none of {len(images):,} images ({looked})"
        raise CommandError(f"{data} can be read: {reason}")
    if len(seen) == 1 and readable > 1:
        alike = f"--data {config.data.data}: no two distinct images among {readable} readable ones ({looked})"
        if len(numbers) == len(images):
            raise UsageError(f"{alike}: there is nothing to tell apart")
        warn(alike)


def tell_plan(config: Config, n_images: int, epoch: int = 0) -> None:
    """Say from when on labels act, and warn where they never do, or the queue holds more than an epoch's images.

    Args:
        n_images: to train on.
        epoch: (from 0) that training goes on with.
    """
    if reason := never_acts(config, n_images):
        warn(reason)
    elif labels_by_clustering(config):
        acting = acting_epochs(config, n_images)
        if acting[0] >= epoch:
            say(
                f"--false-negatives {config.contrast.false_negatives} acts from epoch {acting[0] + 1} of "
                f"{config.optim.epochs} on, with new labels every {config.recluster_epochs}"
            )
    if config.contrast.negatives == "queue":
        per_epoch = n_images // config.optim.batch_size * config.optim.batch_size
        if config.contrast.queue_size > per_epoch:
            warn(
                f"--queue-size {config.contrast.queue_size} is longer than an epoch ({per_epoch} images): it holds "
                "several keys of an image; an image's own are never its negatives"
            )
