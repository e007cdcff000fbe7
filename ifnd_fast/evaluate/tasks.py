"""The tasks of ifnd-fast-eval: each is a function whose arguments are its options."""

from __future__ import annotations

from collections.abc import Callable

from ifnd_fast.evaluate.clusters import clusters
from ifnd_fast.evaluate.detection_by_rate import false_negatives
from ifnd_fast.evaluate.knn import knn

TASKS: dict[str, Callable[..., None]] = {"knn": knn, "clusters": clusters, "false-negatives": false_negatives}
