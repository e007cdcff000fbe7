"""ifnd-fast-eval linear: a linear classifier on frozen features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from ifnd_fast.config import above, at_least
from ifnd_fast.data.images import Images
from ifnd_fast.data.sources import rank_in_class
from ifnd_fast.evaluate.classifier import ClassifierTraining, TrainingOptions, top_accuracies
from ifnd_fast.evaluate.labelled import number_of_classes, open_labelled, warn_of_lacking
from ifnd_fast.evaluate.linear_sweep import Setting, choose, held_out_figures, standardise, train_heads
from ifnd_fast.evaluate.subject import Options, Subject
from ifnd_fast.runtime import run_folder
from ifnd_fast.runtime.console import say, track, warn
from ifnd_fast.runtime.errors import CommandError, UsageError

PENALTIES = tuple(10.0**power for power in range(-3, 4))
CHANCE = "log(classes), which guessing has"


RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
DECAYS = (0.0, 1e-5, 1e-4, 1e-3)
OF_VIEWS = ("weight_decay", "crop_min", "flip", "resume")
"""Options that only a training on random views has."""


@dataclass
class LinearOptions(TrainingOptions):
    """By default features of the centre views are computed once, and a classifier for each of --lrs and
    --weight-decays is trained on them, all together; the one that is best on a tenth of the training images is trained
    again on all of them. With --lr: MoCo's protocol (He et al., CVPR 2020, section 4.1: --lr 30, which drops after
    epochs 60 and 80), on random views."""

    lr: Annotated[float | None, above(0)] = None
    """train one classifier at this learning rate on random views, as MoCo does with 30; that suits features as small as
    contrastive ResNets' on photographs and diverges on others, which is warned of"""
    lrs: Annotated[tuple[float, ...], above(0, words="finite numbers above 0", empty=False)] = RATES
    """learning rates to choose from, of features that are standardised and scaled to rows of length 1"""
    weight_decays: Annotated[tuple[float, ...], at_least(0, words="finite numbers, 0 or more", empty=False)] = DECAYS
    """L2 penalties to choose from"""
    fast: bool = False
    """instead of SGD: multinomial logistic regression (scikit-learn's L-BFGS) on standardised features of the centre
    views, computed once; its penalty is chosen on a tenth of the training images, then all are used"""

    def check(self) -> None:
        """Raises UsageError: an option is out of range, or goes with --lr, which is not given."""
        super().check()
        if self.fast and self.lr is not None:
            raise UsageError("--fast and --lr are two ways to train the classifier: give one")
        for name in OF_VIEWS:
            if self.lr is None and getattr(self, name) != getattr(TrainingOptions(), name):
                raise UsageError(
                    f"--{name.replace('_', '-')} goes with --lr (MoCo's: 30), which trains on random views; features "
                    "of centre views, computed once, have --lrs and --weight-decays, and nothing to resume from"
                )


def linear(common: tyro.conf.OmitArgPrefixes[Options], training: tyro.conf.OmitArgPrefixes[LinearOptions]) -> None:
    """Accuracy of a linear classifier on a backbone's frozen features."""
    training.check()
    subject = Subject(common)
    train, test = open_labelled(subject.data)
    measure(subject, train, test, training, "linear")


def measure(subject: Subject, train: Images, test: Images, training: LinearOptions, task: str) -> None:
    """Train the classifier, test it, and write the figures."""
    if training.fast:
        figures, how = _by_regression(subject, train, test, training), "L-BFGS on centre views"
    elif training.lr is None:
        figures = _by_sweep(subject, train, test, training)
        how = f"SGD on centre views, {training.epochs} epochs, lr {figures['lr']:g}, decay {figures['weight_decay']:g}"
    else:
        figures = _by_views(subject, train, test, training, training.lr, task)
        how = f"SGD, {training.epochs} epochs"
    if training.lr is None and training.out is not None:
        run_folder.write_json(training.out / "result.json", {**figures, "unreadable": subject.unreadable})
    columns = [name for name in ("top1", "top5") if name in figures]
    subject.write_result(
        f"Linear classification of {subject.data.data}",
        ["classifier", *(f"{name[:3]}-{name[3:]}" for name in columns)],
        [[how, *(f"{figures[name]:.2f} %" for name in columns)]],
        {"task": task, "classifier": how, **figures},
    )


def _by_views(
    subject: Subject, train: Images, test: Images, training: LinearOptions, lr: float, task: str
) -> dict[str, Any]:
    out = training.folder(subject, task)
    run = ClassifierTraining(subject, train, number_of_classes(train), training, lr, None, out)
    run.fit()
    assert train.labels is not None
    rows = run.train_rows
    warn_of_lacking(train.labels[rows], number_of_classes(train), "readable training image")
    figures = {"train_images": len(rows), **run.test(test)}
    run_folder.write_json(out / "result.json", {**figures, "unreadable": subject.unreadable})
    say(f"classifier and result: {out}")
    return figures


class Parts(NamedTuple):
    """Readable training and test images."""

    x: np.ndarray
    """(N, D) features"""
    y: np.ndarray
    """(N,) classes"""
    test_x: np.ndarray
    test_y: np.ndarray
    held_out: np.ndarray
    """(N,) bool: training images to choose with"""


def _parts(subject: Subject, train: Images, test: Images, seed: int) -> Parts:
    assert train.labels is not None and test.labels is not None
    x, rows = subject.readable_features(train, "training features")
    test_x, test_rows = subject.readable_features(test, "test features")
    y = train.labels[rows]
    if len(np.unique(y)) < 2:
        raise UsageError("all readable training images are of one class; a classifier needs two or more")
    warn_of_lacking(y, number_of_classes(train), "readable training image")
    rank = rank_in_class(y, seed)
    held_out = rank % 10 == 9
    if not held_out.any():
        held_out = rank == 1  # fewer than ten a class
    if not held_out.any():
        raise UsageError("the classifier is chosen on held-out training images: a class needs two or more")
    return Parts(x, y, test_x, test.labels[test_rows], held_out)


def _by_sweep(subject: Subject, train: Images, test: Images, training: LinearOptions) -> dict[str, Any]:
    parts, n_classes = _parts(subject, train, test, training.seed), number_of_classes(train)
    device = subject.compute.device
    x, y, test_x, test_y, held_out = map(torch.from_numpy, parts)
    standardise(x, test_x)
    rows = torch.arange(len(y))
    settings = [Setting(*pair) for pair in product(training.lrs, training.weight_decays)]
    name = f"{len(settings)} classifiers"
    heads = train_heads(x, y, rows[~held_out], n_classes, settings, training, name, device)
    found = held_out_figures(heads, x[held_out].to(device), y[held_out].to(device))
    try:
        best, sweep = choose(settings, heads, *found)
    except ValueError as error:
        raise CommandError("linear: at every one of --lrs the loss rose above log(classes): give lower ones") from error
    chosen = settings[best]
    if diverged := sum(one["diverged"] for one in sweep):
        warn(f"{diverged} of {len(sweep)} settings diverged, to a loss above {CHANCE}, and were not chosen from")
    if len(training.lrs) > 2 and chosen.lr in (min(training.lrs), max(training.lrs)):
        warn(f"the best learning rate, {chosen.lr:g}, is the end of those tried")
    final = train_heads(x, y, rows, n_classes, [chosen], training, "classifier", device)
    loss = final.losses.item()
    if not loss <= math.log(n_classes):
        warn(
            f"the classifier diverged: its loss, {loss:.4g}, is above {CHANCE}; its accuracy tells of that more than "
            "of the features"
        )
    logits = F.linear(test_x.to(device), final.weights[0], final.biases[0])
    accuracies = top_accuracies(logits, test_y.to(device))
    counts = {"train_images": len(y), "test_images": len(test_y)}
    return {
        **counts, **chosen._asdict(), "loss": loss if math.isfinite(loss) else None,
        "held_out_top1": sweep[best]["held_out_top1"], "sweep": sweep, **accuracies,
    }  # fmt: skip


def _by_regression(subject: Subject, train: Images, test: Images, training: LinearOptions) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, test_x, test_y, held_out = _parts(subject, train, test, training.seed)

    def fitted(penalty: float, rows: np.ndarray) -> Any:
        regression = LogisticRegression(C=1 / penalty, max_iter=1000)
        return make_pipeline(StandardScaler(), regression).fit(x[rows], y[rows])

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
    counts = {"train_images": len(y), "test_images": len(test_y)}
    return {**counts, "penalty": PENALTIES[best], "held_out_top1": 100.0 * scores[best], **accuracies}
