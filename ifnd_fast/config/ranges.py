"""What the options may be."""

from __future__ import annotations

import math

from ifnd_fast.config.options import Config
from ifnd_fast.ops import checks
from ifnd_fast.runtime.errors import UsageError


def validate(config: Config) -> None:
    """Raises UsageError for a value out of range, naming the option, the value and the range."""
    one_or_more = [
        ("epochs", config.optim.epochs), ("batch-size", config.optim.batch_size),
        ("queue-size", config.contrast.queue_size), ("bn-groups", config.contrast.bn_groups),
        ("image-size", config.data.image_size), ("width", config.model.width), ("dim", config.model.dim),
        ("kmeans-iterations", config.cluster.kmeans_iterations),
        ("kmeans-restarts", config.cluster.kmeans_restarts),
        ("keep-checkpoints", config.run.keep_checkpoints),
    ]  # fmt: skip
    for name, count in one_or_more:
        if count < 1:
            raise UsageError(f"--{name} must be 1 or more, got {count}")
    for name, count in (("workers", config.data.workers), ("hidden", config.model.hidden),
                        ("knn-every", config.run.knn_every)):  # fmt: skip
        if count < 0:
            raise UsageError(f"--{name} must be 0 or more, got {count}")
    above_zero = [
        ("recluster-every", config.cluster.recluster_every),
        ("checkpoint-every", config.run.checkpoint_every), ("lr", config.optim.lr),
        ("rank-timeout", config.run.rank_timeout),
        *(("pixel-std", value) for value in config.data.pixel_std),
    ]  # fmt: skip
    for name, value in above_zero:
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"--{name} must be a finite number above 0, got {value}")
    try:
        checks.temperature(config.contrast.temperature)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--{error}") from error
    shares = [
        ("crop-min", config.data.crop_min), ("acceptance-end", config.cluster.acceptance_end),
        ("momentum", config.contrast.momentum), ("grayscale", config.data.grayscale),
        ("blur", config.data.blur), ("color-jitter", config.data.color_jitter),
    ]  # fmt: skip
    for name, value in shares:
        low_open = name in ("crop-min", "acceptance-end")
        if not (0 < value <= 1 if low_open else 0 <= value <= 1):
            raise UsageError(f"--{name} must be from 0{' (excluded)' if low_open else ''} to 1, got {value}")
    if not 0 <= config.data.hold_out < 1:
        raise UsageError(f"--hold-out must be from 0 to below 1, got {config.data.hold_out}")
    if not 0 <= config.cluster.whiten <= 1:
        raise UsageError(f"--whiten must be from 0 (off) to 1, got {config.cluster.whiten}")
    if config.cluster.cluster_space == "backbone" and config.cluster.features == "bank":
        raise UsageError("--features bank holds the head's keys: --cluster-space backbone needs --features fresh")
    for name, value in (("weight-decay", config.optim.weight_decay), ("rotation", config.data.rotation),
                        ("sgd-momentum", config.optim.sgd_momentum),
                        ("warmup-epochs", config.optim.warmup_epochs)):  # fmt: skip
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"--{name} must be a finite number of 0 or more, got {value}")
    levels = config.cluster.levels
    if not levels or len(levels) > 16 or min(levels) < 1:
        raise UsageError(f"--levels must be 1 to 16 numbers of clusters, each 1 or more, got {levels}")
    if config.optim.batch_size < 2:
        raise UsageError("--batch-size must be 2 or more (batch norm needs it), got 1")
