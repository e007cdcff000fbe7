"""The tasks of ifnd-fast-eval: each is a function whose arguments are its options."""

from __future__ import annotations

from collections.abc import Callable

from ifnd_fast.evaluate.detection import detection
from ifnd_fast.evaluate.knn import knn

TASKS: dict[str, Callable[..., None]] = {"knn": knn, "detection": detection}
