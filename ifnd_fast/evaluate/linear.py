"""ifnd-fast-eval linear: a linear classifier on frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from ifnd_fast.config import above
from ifnd_fast.data.images import Images
from ifnd_fast.data.sources import rank_in_class
from ifnd_fast.evaluate.classifier import ClassifierTraining, TrainingOptions, top_accuracies
from ifnd_fast.evaluate.labelled import number_of_classes, open_labelled, warn_of_lacking
from ifnd_fast.evaluate.subject import Options, Subject
from ifnd_fast.runtime import run_folder
from ifnd_fast.runtime.console import say, track, warn
from ifnd_fast.runtime.errors import UsageError

PENALTIES = tuple(10.0**power for power in range(-3, 4))


@dataclass
class LinearOptions(TrainingOptions):
    """Defaults: MoCo's protocol for ImageNet (He et al., CVPR 2020, section 4.1; lr drops after epochs 60 and 80)."""

    lr: Annotated[float, above(0)] = 30.0
    """learning rate at the start; MoCo's 30 suits features as small as contrastive ResNets' on photographs"""
    fast: bool = False
    """instead of SGD on random views: multinomial logistic regression (scikit-learn's L-BFGS) on standardised features
    of the centre views, computed once; its penalty is chosen on a tenth of the training images, then all are used"""


def linear(common: tyro.conf.OmitArgPrefixes[Options], training: tyro.conf.OmitArgPrefixes[LinearOptions]) -> None:
    """Accuracy of a linear classifier on a backbone's frozen features."""
    training.check()
    subject = Subject(common)
    train, test = open_labelled(subject.data)
    measure(subject, train, test, training, "linear")


def measure(subject: Subject, train: Images, test: Images, training: LinearOptions, task: str) -> None:
    """Train the classifier, test it, and write the figures."""
    if training.fast:
        figures = _by_regression(subject, train, test, training)
    else:
        figures = _by_sgd(subject, train, test, training, task)
    how = "L-BFGS on centre views" if training.fast else f"SGD, {training.epochs} epochs"
    columns = [name for name in ("top1", "top5") if name in figures]
    subject.write_result(
        f"Linear classification of {subject.data.data}",
        ["classifier", *(f"{name[:3]}-{name[3:]}" for name in columns)],
        [[how, *(f"{figures[name]:.2f} %" for name in columns)]],
        {"task": task, "classifier": how, **figures},
    )


def _by_sgd(subject: Subject, train: Images, test: Images, training: LinearOptions, task: str) -> dict[str, Any]:
    out = training.folder(subject, task)
    run = ClassifierTraining(subject, train, number_of_classes(train), training, training.lr, None, out)
    run.fit()
    assert train.labels is not None
    rows = run.train_rows
    warn_of_lacking(train.labels[rows], number_of_classes(train), "readable training image")
    figures = {"train_images": len(rows), **run.test(test)}
    run_folder.write_json(out / "result.json", {**figures, "unreadable": subject.unreadable})
    say(f"classifier and result: {out}")
    return figures


def _by_regression(subject: Subject, train: Images, test: Images, training: LinearOptions) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    assert train.labels is not None and test.labels is not None
    x, rows = subject.readable_features(train, "training features")
    test_x, test_rows = subject.readable_features(test, "test features")
    y, test_y = train.labels[rows], test.labels[test_rows]
    if len(np.unique(y)) < 2:
        raise UsageError("all readable training images are of one class; a classifier needs two or more")
    warn_of_lacking(y, number_of_classes(train), "readable training image")

    def fitted(penalty: float, rows: np.ndarray) -> Any:
        regression = LogisticRegression(C=1 / penalty, max_iter=1000)
        return make_pipeline(StandardScaler(), regression).fit(x[rows], y[rows])

    held_out = rank_in_class(y, training.seed) % 10 == 9
    if not held_out.any():
        held_out = rank_in_class(y, training.seed) == 1  # fewer than ten a class
    if not held_out.any():
        raise UsageError("--fast chooses its penalty on held-out training images: a class needs two or more")
    scores = [
        fitted(penalty, ~held_out).score(x[held_out], y[held_out])
        for penalty in track(PENALTIES, "penalties", len(PENALTIES))
    ]
    best = int(np.argmax(scores))
    if best in (0, len(scores) - 1):
        warn(f"the best penalty, {PENALTIES[best]:g}, is the end of those tried")
    model = fitted(PENALTIES[best], np.ones(len(y), dtype=bool))
    logits = np.full((len(test_x), number_of_classes(train)), -np.inf)
    logits[:, model.classes_] = model.predict_log_proba(test_x)
    accuracies = top_accuracies(torch.from_numpy(logits), torch.from_numpy(test_y))
    counts = {"train_images": len(rows), "test_images": len(test_rows)}
    return {**counts, "penalty": PENALTIES[best], "held_out_top1": 100.0 * scores[best], **accuracies}
