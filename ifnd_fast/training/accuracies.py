"""A run's accuracies as result.json holds them, and how a table and a headline show them.

`knn_top1` is percent; `few_shot_top1` is, for each number of labels a class, {"mean", "sd", "values"} over draws. Both
are there for the trained encoder and, with a suffix, for what it is compared with. Runs of earlier versions lack some.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ifnd_fast.training.saved_run import number

HEADLINE_LABELS = 10
"""a class: enough to tell encoders apart, and so few that raw pixels do not do"""
NONE = "\N{EN DASH}"


def suffixes(from_weights: bool = False) -> dict[str, str]:
    """By the names of the kinds of features; a run `from_weights` began with an encoder that was trained elsewhere."""
    before = "encoder before training" if from_weights else "untrained encoder"
    return {"raw pixels": "_raw_pixels", before: "_untrained", "trained encoder": ""}


class FewLabels(NamedTuple):
    """Percent, over draws of the labelled images."""

    mean: float
    sd: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.sd:.1f} %"


def few_labels(accuracies: Mapping[str, Any], suffix: str = "") -> dict[int, FewLabels]:
    """By the number of labels a class, ascending; what is missing or broken is left out."""
    found = accuracies.get(f"few_shot_top1{suffix}")
    known = {}
    for n, values in found.items() if isinstance(found, dict) else ():
        mean, sd = (number(values.get(key)) if isinstance(values, dict) else None for key in ("mean", "sd"))
        if str(n).isdecimal() and mean is not None and sd is not None:
            known[int(n)] = FewLabels(mean, sd)
    return dict(sorted(known.items()))


def accuracy_table(accuracies: Mapping[str, Any], from_weights: bool = False) -> tuple[list[str], list[list[str]]]:
    """Columns, one for each kind of features that has figures, and rows by the number of labels; none: no rows."""
    kinds = {
        name: (few_labels(accuracies, suffix), number(accuracies.get(f"knn_top1{suffix}")))
        for name, suffix in suffixes(from_weights).items()
    }
    kinds = {name: (few, knn) for name, (few, knn) in kinds.items() if few or knn is not None}
    rows = [
        [f"{n} a class", *(str(few.get(n, NONE)) for few, _ in kinds.values())]
        for n in sorted({n for few, _ in kinds.values() for n in few})
    ]
    if any(knn is not None for _, knn in kinds.values()):
        rows.append(["all, by kNN", *(NONE if knn is None else f"{knn:.2f} %" for _, knn in kinds.values())])
    return ["labels", *kinds], rows


def headline(accuracies: Mapping[str, Any], from_weights: bool = False) -> str:
    """ "with 10 labels a class: trained encoder 89.2 %, raw pixels 76.3 %"; empty where that is not known."""
    found = {
        name: few_labels(accuracies, suffix).get(HEADLINE_LABELS) for name, suffix in suffixes(from_weights).items()
    }
    if found["trained encoder"] is None:
        return ""
    shown = [f"{name} {few.mean:.1f} %" for name, few in reversed(found.items()) if few is not None]
    return f"with {HEADLINE_LABELS} labels a class: {', '.join(shown)}"
