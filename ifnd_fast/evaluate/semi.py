"""ifnd-fast-eval semi: the whole network, fine-tuned on a few labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from ifnd_fast.config import above, at_least, between
from ifnd_fast.data.images import Images, Subset
from ifnd_fast.evaluate.classifier import ClassifierTraining, TrainingOptions
from ifnd_fast.evaluate.labelled import (
    balanced_share,
    image_ids,
    number_of_classes,
    open_labelled,
    read_ids,
    warn_of_lacking,
)  # fmt: skip
from ifnd_fast.evaluate.subject import Options, Subject
from ifnd_fast.runtime import checkpoint as checkpoints
from ifnd_fast.runtime import run_folder
from ifnd_fast.runtime.console import say
from ifnd_fast.runtime.errors import UsageError

FEW = 0.05  # up to this share of the labels, the learning rates are those for 1 %
SHARES = between(0, 1, exclude=0, words="from 0 (excluded) to 1", empty=False)


@dataclass
class SemiOptions(TrainingOptions):
    """Defaults: SwAV's for ImageNet (Caron et al., NeurIPS 2020; its eval_semisup.py and README)."""

    epochs: Annotated[int, at_least(1)] = 20
    """passes over the labelled training images"""
    drop_factor: Annotated[float, at_least(0)] = 0.2
    """what the learning rates are multiplied with after each of --drops"""
    shares: Annotated[tuple[float, ...], SHARES] = (0.01, 0.1)
    """shares of the training images whose labels are used, as many of each class and always the same; each is a
    training of its own. The lists are written to OUT/labels-SHARE/ids.txt"""
    ids: Path | None = None
    """instead of --shares: a file that names the labelled images, one a line (n01440764_10026.JPEG), such as SimCLR's
    1percent.txt and 10percent.txt"""
    lr: Annotated[float | None, above(0)] = None
    """learning rate of the backbone at the start; default: 0.02 up to 5 %% of the labels, else 0.01"""
    head_lr: Annotated[float | None, above(0)] = None
    """learning rate of the new last layer at the start; default: 5 up to 5 %% of the labels, else 0.2"""


def semi(common: tyro.conf.OmitArgPrefixes[Options], training: tyro.conf.OmitArgPrefixes[SemiOptions]) -> None:
    """Accuracy of the whole network, fine-tuned on 1 % and 10 % of the labels."""
    training.check()
    subject = Subject(common)
    train, test = open_labelled(subject.data)
    assert train.labels is not None
    if training.ids is not None:
        lists = {training.ids.stem: read_ids(training.ids, train)}
    else:
        lists = {f"{share:g}": balanced_share(train.labels, share) for share in training.shares}
    figures = {name: _fine_tune(subject, train, test, training, name, rows) for name, rows in lists.items()}
    columns = [name for name in ("top1", "top5") if all(name in found for found in figures.values())]
    subject.write_result(
        f"Fine-tuning on few labels of {subject.data.data}",
        ["labels", "images", *(f"{name[:3]}-{name[3:]}" for name in columns)],
        [
            [name if training.ids else f"{float(name):.3g}", str(found["train_images"]),
             *(f"{found[column]:.2f} %" for column in columns)]
            for name, found in figures.items()
        ],
        {
            "task": "semi", "epochs": training.epochs, "labels": figures,
            "test_images": next(iter(figures.values()))["test_images"],
        },
    )  # fmt: skip


def _fine_tune(
    subject: Subject, train: Images, test: Images, training: SemiOptions, name: str, rows: np.ndarray
) -> dict[str, Any]:
    labelled = Subset(train, rows)
    assert labelled.labels is not None
    if len(rows) < 2:
        raise UsageError(f"{len(rows)} labelled image is too few for batch norm, which needs two: raise --shares")
    n_classes = number_of_classes(train)
    warn_of_lacking(labelled.labels, n_classes, "labelled image")
    few = len(rows) <= FEW * len(train)
    lr = training.lr or (0.02 if few else 0.01)
    head_lr = training.head_lr or (5.0 if few else 0.2)
    say(f"labels {name}: {len(rows)} images, lr {lr:g}, of the last layer {head_lr:g}")
    out = training.folder(subject, "semi") / f"labels-{name}"
    run = ClassifierTraining(subject, labelled, n_classes, training, head_lr, lr, out)
    run.fit()
    ids = "".join(f"{line}\n" for line in np.array(image_ids(train))[rows])
    checkpoints.write_atomically(out / "ids.txt", lambda file: file.write(ids.encode()))
    figures = {"train_images": len(run.train_rows), "lr": lr, "head_lr": head_lr, **run.test(test)}
    run_folder.write_json(out / "result.json", {**figures, "unreadable": subject.unreadable})
    return figures
