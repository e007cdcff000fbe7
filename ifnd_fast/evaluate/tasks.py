"""The tasks of ifnd-fast-eval: each is a function whose arguments are its options."""

from __future__ import annotations

from collections.abc import Callable

from ifnd_fast.evaluate.clusters import clusters
from ifnd_fast.evaluate.detection.command import detection
from ifnd_fast.evaluate.false_negatives import false_negatives
from ifnd_fast.evaluate.few_shot import few_shot
from ifnd_fast.evaluate.knn import knn
from ifnd_fast.evaluate.linear import linear
from ifnd_fast.evaluate.semi import semi
from ifnd_fast.evaluate.svm import svm
from ifnd_fast.evaluate.transfer import transfer

TASKS: dict[str, Callable[..., None]] = {
    "knn": knn,
    "few-shot": few_shot,
    "linear": linear,
    "semi": semi,
    "svm": svm,
    "transfer": transfer,
    "detection": detection,
    "clusters": clusters,
    "false-negatives": false_negatives,
}
"""Names and functions; a function's parameters are its options."""
