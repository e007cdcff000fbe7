"""What the options may be."""

from __future__ import annotations

import math

from ifnd_fast.config.options import Config
from ifnd_fast.runtime.errors import UsageError

# (least, most) of each option that is a number, or numbers; those in ABOVE and BELOW exclude that end.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("epochs", "queue_size", "bn_groups", "image_size", "width", "dim", "kmeans_iterations", "kmeans_restarts",
         "keep_checkpoints"), (1, math.inf)
    ),
    "batch_size": (2, math.inf), "levels": (2, math.inf),  # batch norm needs two; of one cluster all images are
    **dict.fromkeys(
        ("workers", "hidden", "knn_every", "warm_iterations", "weight_decay", "rotation", "warmup_epochs"),
        (0, math.inf),
    ),
    "seed": (0, 2**62),
    **dict.fromkeys(("recluster_every", "checkpoint_every", "lr", "pixel_std"), (0, math.inf)),
    "rank_timeout": (0, 1e6), "pixel_mean": (-math.inf, math.inf),
    **dict.fromkeys(
        ("crop_min", "acceptance_end", "grayscale", "blur", "color_jitter", "whiten", "hold_out", "momentum",
         "sgd_momentum"), (0, 1)
    ),
    "temperature": (1e-6, 1e6),
}  # fmt: skip
ABOVE = {"recluster_every", "checkpoint_every", "lr", "pixel_std", "rank_timeout", "crop_min", "acceptance_end"}
BELOW = {"momentum", "sgd_momentum", "hold_out"}  # at 1 nothing would move, or be left to train on


def check_range(name: str, value: float, called: str | None = None) -> None:
    """Raises UsageError: the value of the option `name`, of RANGES, is not finite or out of range; `called` is what the
    option is called, if something else."""
    low, high = RANGES[name]
    above = value > low if name in ABOVE else value >= low
    below = value < high if name in BELOW else value <= high
    if not (math.isfinite(value) and above and below):
        if low == -math.inf:
            wanted = "a finite number"
        elif high == math.inf:
            wanted = f"a finite number above {low:g}" if name in ABOVE else f"{low:g} or more"
        else:
            excluded, up_to = " (excluded)" if name in ABOVE else "", "below " if name in BELOW else ""
            wanted = f"from {low:g}{excluded} to {up_to}{high:g}"
        raise UsageError(f"--{called or name.replace('_', '-')} must be {wanted}, got {value}")


def check_levels(levels: tuple[int, ...]) -> None:
    """Raises UsageError: --levels are none, too many, too small or two of them the same."""
    if not 1 <= len(levels) <= 16:
        raise UsageError(f"--levels must be 1 to 16 numbers of clusters, got {len(levels)}")
    for level in levels:
        check_range("levels", level)
    if len(set(levels)) < len(levels):
        raise UsageError(f"--levels must differ from each other, got {' '.join(map(str, levels))}")


def validate(config: Config) -> None:
    """Raises UsageError for a value out of range, naming the option, the value and the range."""
    for section in (config.run, config.data, config.model, config.optim, config.contrast, config.cluster):
        for name, value in vars(section).items():
            if name in RANGES and name != "levels":
                for one in value if isinstance(value, tuple) else (value,):
                    check_range(name, one)
    check_levels(config.cluster.levels)
    if config.cluster.cluster_space == "backbone" and config.cluster.features == "bank":
        raise UsageError("--features bank holds the head's keys: --cluster-space backbone needs --features fresh")
