"""ifnd-fast-eval knn: the usual quick test of features."""

from __future__ import annotations

import tyro

from ifnd_fast.evaluate.labelled import open_labelled
from ifnd_fast.evaluate.subject import Options, Subject
from ifnd_fast.metrics.knn import KnnProbe
from ifnd_fast.runtime.errors import UsageError


def knn(common: tyro.conf.OmitArgPrefixes[Options], k: int = 20, temperature: float = 0.07) -> None:
    """Weighted k-nearest-neighbour accuracy of a backbone's features.

    Args:
        k: neighbours that vote
        temperature: of the votes' weights exp(similarity / temperature)
    """
    if k < 1:
        raise UsageError(f"--k must be 1 or more, got {k}")
    if not temperature > 0:
        raise UsageError(f"--temperature must be above 0, got {temperature}")
    subject = Subject(common)
    probe = KnnProbe(*open_labelled(subject.data, subject.known))
    accuracy = probe.accuracy(lambda images: subject.features(images)[0], k=k, temperature=temperature)
    subject.tell(
        f"kNN on {subject.data.data}",
        ["k", "temperature", "top-1"],
        [[str(k), f"{temperature:g}", f"{accuracy:.2f} %"]],
        {"k": k, "temperature": temperature, "knn_top1": accuracy},
    )
