"""ifnd-fast-eval knn: the usual quick test of features."""

from __future__ import annotations

from typing import Annotated

import tyro

from ifnd_fast.config import TEMPERATURE, at_least, check_arguments
from ifnd_fast.evaluate.labelled import open_labelled
from ifnd_fast.evaluate.subject import Options, Subject
from ifnd_fast.metrics.knn import knn_accuracy
from ifnd_fast.metrics.labelled import LabelledImages
from ifnd_fast.runtime.console import stage


def knn(
    common: tyro.conf.OmitArgPrefixes[Options],
    k: Annotated[int, at_least(1)] = 20,
    temperature: Annotated[float, TEMPERATURE] = 0.07,
) -> None:
    """Weighted k-nearest-neighbour accuracy of a backbone's features.

    Args:
        k: neighbours that vote
        temperature: of the votes' weights exp(similarity / temperature)
    """
    check_arguments(knn, k=k, temperature=temperature)
    subject = Subject(common)
    found = LabelledImages(*open_labelled(subject.data)).features(subject.features)
    with stage("kNN"):
        top1 = knn_accuracy(*found, k=k, temperature=temperature)
    subject.write_result(
        f"kNN on {subject.data.data}",
        ["k", "temperature", "top-1"],
        [[str(k), f"{temperature:g}", f"{top1:.2f} %"]],
        {
            "k": k, "temperature": temperature, "knn_top1": top1, "train_images": len(found.train_labels),
            "test_images": len(found.test_labels),
        },
    )  # fmt: skip
