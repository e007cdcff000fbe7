"""ifnd-fast-eval svm: a linear SVM for each class on frozen features, with all labels and with few."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from joblib import Parallel, delayed
from sklearn.model_selection import cross_val_score
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC

from ifnd_fast.config import SEED, above, at_least, check
from ifnd_fast.data.images import Images
from ifnd_fast.evaluate.labelled import number_of_classes, open_labelled
from ifnd_fast.evaluate.subject import Options, Subject
from ifnd_fast.evaluate.voc import IGNORED, VocImages, find_voc, open_voc
from ifnd_fast.metrics.average_precision import RULES, average_precision
from ifnd_fast.runtime.console import say, track, warn
from ifnd_fast.runtime.errors import UsageError

COSTS = above(0, words="finite numbers above 0", empty=False)


@dataclass
class SvmOptions:
    """Defaults: Goyal et al., ICCV 2019 (Scaling and Benchmarking Self-Supervised Visual Representation Learning) and
    its code, fair_self_supervision_benchmark: unit features, squared hinge loss, positives weighted twice."""

    costs: Annotated[tuple[float, ...], COSTS] = (*(2.0**power for power in range(-19, -3)), 0.01, 0.1, 1.0, 10.0)
    """the C to choose from, for each class by cross-validation on the training images; their code's, and 1 and 10"""
    folds: Annotated[int, at_least(2)] = 3
    """of the cross-validation; fewer for a class with fewer training images"""
    shots: Annotated[tuple[int, ...], at_least(1)] = (1, 2, 4, 8, 16)
    """positive images a class for the low-shot figures, beside (classes - 1) times as many negatives; each with the C
    that was chosen for the class on all training images. Give none to leave them out: --shots"""
    samplings: Annotated[int, at_least(1)] = 5
    """random choices of the low-shot images, of which mean and standard deviation are written"""
    seed: Annotated[int, SEED] = 0
    """of the samplings"""


class Split(NamedTuple):
    features: np.ndarray
    """(N, D) unit rows"""
    targets: np.ndarray
    """(N, C) int8: 1, 0 or IGNORED"""


@dataclass
class Problem:
    """Two splits of features, and what the classes are called."""

    train: Split
    test: Split
    names: list[str]
    single_label: bool
    """every image is of one class"""
    tested: list[int] = field(init=False)
    """classes with a positive in the test split: the others have no average precision"""

    def __post_init__(self) -> None:
        shown = (self.train.targets == 1).any(axis=0)
        lacking = [name for name, found in zip(self.names, shown, strict=True) if not found]
        if lacking:
            raise UsageError(f"{len(lacking)} classes have no readable training image: {', '.join(lacking[:4])}")
        positive = (self.test.targets == 1).any(axis=0)
        if not positive.all():
            warn(f"{(~positive).sum()} of {len(positive)} classes have no test image: they are left out of the mean")
        self.tested = np.flatnonzero(positive).tolist()


def svm(common: tyro.conf.OmitArgPrefixes[Options], options: tyro.conf.OmitArgPrefixes[SvmOptions]) -> None:
    """Mean average precision of linear SVMs on frozen features, with all labels and with few.

    --data: VOC 2007 (its folder VOCdevkit; several classes an image), or any labelled images (one class an image).
    """
    check(options)
    subject = Subject(common)
    problem = _features(subject, *_open(subject))
    costs, validated = choose_costs(problem.train, options)
    edges = int((np.isin(costs, (min(options.costs), max(options.costs)))).sum())
    if len(options.costs) > 2 and edges:
        warn(f"the C of {edges} classes is the smallest or largest of --costs: wider ones may be better")
    full = score(problem, costs, np.ones(problem.train.targets.shape, dtype=bool), "SVMs")
    low_shot = {str(shots): _low_shot(problem, costs, shots, options) for shots in _possible(problem.train, options)}
    _tell(subject, problem, full, low_shot, {"costs": costs.tolist(), "validation_ap": validated.tolist()})


# ---- data ----


def _open(subject: Subject) -> tuple[Images, Images]:
    year = find_voc(subject.data.data)
    return open_labelled(subject.data) if year is None else open_voc(year)


def _features(subject: Subject, train: Images, test: Images) -> Problem:
    splits = []
    for images, title in ((train, "training features"), (test, "test features")):
        vectors, rows = subject.readable_features(images, title)
        if isinstance(images, VocImages):
            targets = images.targets[rows]
        else:
            assert images.labels is not None
            targets = np.eye(number_of_classes(train), dtype=np.int8)[images.labels[rows]]
        splits.append(Split(normalize(vectors), targets))
    names = train.class_names or [str(number) for number in range(splits[0].targets.shape[1])]
    return Problem(splits[0], splits[1], names, single_label=not isinstance(train, VocImages))


# ---- support vector machines ----


def machine(cost: float) -> LinearSVC:
    """Goyal et al.'s, but for the solver: `dual="auto"` takes the primal one where there are more rows than columns."""
    return LinearSVC(C=cost, class_weight={1: 2, 0: 1}, dual="auto", max_iter=2000, random_state=0)


def choose_costs(train: Split, options: SvmOptions) -> tuple[np.ndarray, np.ndarray]:
    """The C of each class with the best average precision in cross-validation, and that precision, (C,) each.

    A class with a single positive can't be validated: it gets the C that is best for the others together.

    Raises:
        UsageError: that is so for all classes.
    """

    def validate(column: int, cost: float) -> float:
        known = train.targets[:, column] != IGNORED
        y = train.targets[known, column]
        folds = min(options.folds, int((y == 1).sum()), int((y == 0).sum()))
        if folds < 2:
            return np.nan
        return cross_val_score(machine(cost), train.features[known], y, cv=folds, scoring="average_precision").mean()

    n_classes = train.targets.shape[1]
    jobs = [(column, cost) for column in range(n_classes) for cost in options.costs]
    found = np.array(_in_parallel(validate, jobs, "cross-validation")).reshape(n_classes, len(options.costs))
    possible = ~np.isnan(found[:, 0])
    if not possible.any():
        raise UsageError("C can't be chosen by cross-validation: no class has two training images")
    common = found[possible].mean(axis=0).argmax()
    best = np.where(possible, found.argmax(axis=1), common)
    return np.array(options.costs)[best], found[np.arange(n_classes), best]


def score(problem: Problem, costs: np.ndarray, used: np.ndarray, description: str) -> dict[str, Any]:
    """Train each class's SVM on the rows that are `used`, (N, C) bool, and measure all on the test split.

    Returns:
        For each of RULES the mean average precision and that of each tested class, and the accuracy of the highest
        decision value where images are of one class; all in percent.
    """
    train, test = problem.train, problem.test

    def decide(column: int) -> np.ndarray:
        known = used[:, column] & (train.targets[:, column] != IGNORED)
        fitted = machine(costs[column]).fit(train.features[known], train.targets[known, column])
        return fitted.decision_function(test.features)

    decisions = np.stack(_in_parallel(decide, [(c,) for c in range(len(problem.names))], description), axis=1)
    found: dict[str, Any] = {rule: {} for rule in RULES}
    for column in problem.tested:
        known = test.targets[:, column] != IGNORED
        precision = average_precision(decisions[known, column], test.targets[known, column] == 1)
        for rule in RULES:
            found[rule][problem.names[column]] = 100.0 * precision[rule]
    means = {f"map_{rule}": float(np.mean(list(found[rule].values()))) for rule in RULES}
    if problem.single_label:
        means["top1"] = 100.0 * float((decisions.argmax(axis=1) == test.targets.argmax(axis=1)).mean())
    return {**means, "ap": found}


def _possible(train: Split, options: SvmOptions) -> Iterator[int]:
    """The --shots for which every class has enough positives."""
    fewest = int((train.targets == 1).sum(axis=0).min())
    for shots in options.shots:
        if shots <= fewest:
            yield shots
        else:
            warn(f"--shots {shots} is left out: the smallest class has {fewest} training images")


def _low_shot(problem: Problem, costs: np.ndarray, shots: int, options: SvmOptions) -> dict[str, Any]:
    """Mean and standard deviation of `score`'s mean average precisions over samplings."""
    results = []
    for sampling in range(options.samplings):
        used = sample(problem.train.targets, shots, seed=[options.seed, shots, sampling])
        results.append(score(problem, costs, used, f"{shots} shots, {sampling + 1}/{options.samplings}"))
    # no top-1: decision values of SVMs that saw different images are not to be compared
    values = {name: [result[name] for result in results] for name in (f"map_{rule}" for rule in RULES)}
    return {name: {"mean": float(np.mean(v)), "sd": float(np.std(v)), "values": v} for name, v in values.items()}


def sample(targets: np.ndarray, shots: int, seed: list[int]) -> np.ndarray:
    """Which rows each class's SVM sees, (N, C) bool: `shots` positives, (C - 1) shots negatives (or all there are)."""
    used = np.zeros(targets.shape, dtype=bool)
    random = np.random.default_rng(seed)
    for column, target in enumerate(targets.T):
        for value, count in ((1, shots), (0, (targets.shape[1] - 1) * shots)):
            rows = np.flatnonzero(target == value)
            used[random.choice(rows, min(count, len(rows)), replace=False), column] = True
    return used


def _in_parallel(function: Callable[..., Any], jobs: list[tuple], description: str) -> list[Any]:
    """Results in order, on all cores: liblinear lets other threads run."""
    results = Parallel(n_jobs=-1, prefer="threads", return_as="generator")(delayed(function)(*job) for job in jobs)
    return list(track(results, description, len(jobs)))


# ---- what is written ----


def _tell(subject: Subject, problem: Problem, full: dict, low_shot: dict, chosen: dict) -> None:
    columns = [name for name in full if name != "ap"]
    titles = {"map_11-point": "mAP, 11-point", "map_area": "mAP, area", "top1": "top-1"}
    rows = [["all", *(f"{full[name]:.2f} %" for name in columns)]]
    for shots, found in low_shot.items():
        means = {name: f"{value['mean']:.2f} ± {value['sd']:.2f} %" for name, value in found.items()}
        rows.append([shots, *(means.get(name, "") for name in columns)])
    figures = {
        "task": "svm", "train_images": len(problem.train.targets), "test_images": len(problem.test.targets),
        "classes": problem.names, **full, "low_shot": low_shot, **chosen,
    }  # fmt: skip
    title = f"Linear SVMs on {subject.data.data}"
    subject.write_result(title, ["images a class", *(titles[name] for name in columns)], rows, figures)
    say("± is the standard deviation over the samplings of the low-shot images")
