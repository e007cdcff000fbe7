"""ifnd-fast-eval knn: the usual quick test of features."""

from __future__ import annotations

import tyro

from ifnd_fast.config import check_range
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
    check_range("temperature", temperature)
    subject = Subject(common)
    probe = KnnProbe(*open_labelled(subject.data))
    found = probe.measure(subject.features, k=k, temperature=temperature)
    subject.tell(
        f"kNN on {subject.data.data}",
        ["k", "temperature", "top-1"],
        [[str(k), f"{temperature:g}", f"{found.top1:.2f} %"]],
        {
            "k": k, "temperature": temperature, "knn_top1": found.top1, "train_images": found.train_images,
            "test_images": found.test_images,
        },
    )  # fmt: skip
