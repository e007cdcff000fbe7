"""Unreadable images count for nothing: every figure is that of the readable ones, and says how many those are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ifnd_fast.evaluate.cluster_images import ClusterOptions
from ifnd_fast.evaluate.clusters import clusters
from ifnd_fast.evaluate.false_negatives import false_negatives
from ifnd_fast.evaluate.few_shot import FewShotOptions, few_shot
from ifnd_fast.evaluate.knn import knn
from ifnd_fast.evaluate.linear import LinearOptions, linear
from ifnd_fast.evaluate.semi import SemiOptions, semi
from ifnd_fast.evaluate.subject import Options
from ifnd_fast.evaluate.svm import SvmOptions, svm
from ifnd_fast.evaluate.transfer import ListOptions, transfer
from ifnd_fast.metrics.false_negatives import detection_statistics
from ifnd_fast.report.page import render
from ifnd_fast.runtime import checkpoint
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.training.saved_run import read_run
from tests.training.test_trainer import metrics, new

BROKEN = 12  # of each class and split


@pytest.fixture(scope="module")
def broken_folders(class_folders, tmp_path_factory) -> Path:
    """class_folders, and as many unreadable files again as there are readable ones in some classes."""
    root = tmp_path_factory.mktemp("broken") / "classes"
    shutil.copytree(class_folders, root)
    for folder in root.glob("*/n0000000[024]"):
        for number in range(BROKEN):
            (folder / f"{folder.name}_x{number}.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    return root


FAST = LinearOptions(fast=True)
TASKS = {
    "knn": lambda options, tmp: knn(options),
    "few-shot": lambda options, tmp: few_shot(options, FewShotOptions(shots=(2,), draws=2)),
    "linear": lambda options, tmp: linear(options, FAST),
    "linear sweep": lambda options, tmp: linear(options, LinearOptions(lrs=(1.0,), weight_decays=(0.0,), epochs=2)),
    "transfer": lambda options, tmp: transfer(options, ListOptions(), FAST),
    "svm": lambda options, tmp: svm(options, SvmOptions(costs=(0.1, 1.0), shots=(1,), samplings=1)),
    "clusters": lambda options, tmp: clusters(options, ClusterOptions(levels=(5,))),
    "false-negatives": lambda options, tmp: false_negatives(options, ClusterOptions(levels=(5,))),
}


def options(run: Path, data: Path, file: Path, **more) -> Options:
    return Options(run, data=str(data), device="cpu", json_file=file, **more)


def flat(figures: dict) -> tuple[list[str], list[float]]:
    """The names of all figures, and the numbers among them, in order."""
    names, numbers = [], []

    def walk(name: str, value: object) -> None:
        if isinstance(value, dict | list):
            for key, one in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{name}.{key}", one)
        else:
            names.append(name)
            numbers.extend([value] if isinstance(value, int | float) else [])

    walk("", {key: value for key, value in figures.items() if key not in ("data", "unreadable")})
    return names, numbers


@pytest.mark.parametrize("task", TASKS)
def test_figures_are_those_of_the_readable_images(task, untrained_run, class_folders, broken_folders, tmp_path, capsys):
    """The same bits as without the broken files, and not those with black pictures among the images."""
    figures = []
    for name, data in (("whole", class_folders), ("broken", broken_folders)):
        TASKS[task](options(untrained_run, data, tmp_path / f"{name}.json"), tmp_path / name)
        figures.append(json.loads((tmp_path / f"{name}.json").read_text()))
    (names, numbers), (other_names, other_numbers) = map(flat, figures)
    assert names == other_names and other_numbers == pytest.approx(numbers, abs=1e-6)
    told = capsys.readouterr().err
    assert told.count("unreadable image skipped") == BROKEN * (3 if task in ("clusters", "false-negatives") else 6)
    if "train_images" in figures[1]:
        assert (figures[1]["train_images"], figures[1]["test_images"]) == (240, 120)
    if task in ("knn", "few-shot"):
        assert f"accuracy: {6 * BROKEN} unreadable images are left out" in told


@pytest.mark.parametrize("task", [*TASKS, "linear by steps", "semi"])
def test_strict_stops_every_evaluation(task, untrained_run, broken_folders, tmp_path):
    tasks = TASKS | {
        "linear by steps": lambda options, tmp: linear(options, LinearOptions(lr=30.0, epochs=1, out=tmp)),
        "semi": lambda options, tmp: semi(options, SemiOptions(shares=(1.0,), epochs=1, out=tmp)),
    }
    with pytest.raises(CommandError, match=r"unreadable image \(--strict\): .*_x\d+.png"):
        tasks[task](options(untrained_run, broken_folders, tmp_path / "f.json", strict=True), tmp_path / "out")


def test_a_classifier_counts_what_it_could_read(untrained_run, broken_folders, tmp_path):
    by_steps = LinearOptions(lr=30.0, epochs=1, out=tmp_path / "out")
    linear(options(untrained_run, broken_folders, tmp_path / "linear.json"), by_steps)
    found = json.loads((tmp_path / "linear.json").read_text())
    assert (found["train_images"], found["test_images"]) == (240, 120)


def spoil(files) -> None:
    for file in files:
        file.write_bytes(b"broken")


def test_a_class_and_a_split_of_which_nothing_can_be_read(untrained_run, class_folders, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(class_folders, data)
    spoil((data / "train" / "n00000001").iterdir())
    knn(options(untrained_run, data, tmp_path / "knn.json"))
    told = capsys.readouterr().err
    assert "accuracy: 1 classes have no readable image to learn from: none of their images can be recognised" in told
    assert json.loads((tmp_path / "knn.json").read_text())["train_images"] == 200
    linear(options(untrained_run, data, tmp_path / "linear.json"), FAST)
    assert "1 of 6 classes have no readable training image" in capsys.readouterr().err
    with pytest.raises(UsageError, match="1 classes have no readable training image: n00000001"):
        svm(options(untrained_run, data, tmp_path / "svm.json"), SvmOptions())
    for label in (0, 2, 3, 4):
        spoil((data / "train" / f"n0000000{label}").iterdir())
    with pytest.raises(UsageError, match="all readable training images are of one class"):
        linear(options(untrained_run, data, tmp_path / "linear.json"), FAST)
    spoil(data.glob("val/*/*.png"))
    for task in (knn, lambda options: linear(options, FAST)):
        with pytest.raises(CommandError, match="none of 120 images can be read"):
            task(options(untrained_run, data, tmp_path / "f.json"))


# ---- in training ----


@pytest.fixture
def spoiled(digit_folder, tmp_path) -> Path:
    """120 digits in 5 classes, of which one class and some others can't be read: 10 of 24 in the second."""
    shutil.copytree(digit_folder, tmp_path / "data")
    spoil(sorted((tmp_path / "data" / "digit-1").iterdir())[:10])
    return tmp_path / "data"


def test_knn_in_training_is_that_of_the_readable_images(spoiled, tmp_path, capsys):
    trainer = new(tmp_path / "run", spoiled, "--epochs", 1)
    trainer.measuring.before_training(trainer.encoder)
    found = trainer.measuring.result
    told = capsys.readouterr().err
    assert (
        told.count("unreadable image skipped") == 10 and told.count("accuracy: 10 unreadable images are left out") == 1
    )
    assert set(trainer.unreadable.reasons) == set(range(24, 34)) == set(range(120)) - readable_of(trainer)
    kept = np.array(sorted(readable_of(trainer)))
    votes, queries = kept[kept % 10 != 9], kept[kept % 10 == 9]

    def pixels(index: int) -> np.ndarray:
        values = np.asarray(trainer.images.image(int(index)), dtype=np.float64).transpose(2, 0, 1).ravel()
        data = trainer.config.data
        return (values - 255 * np.repeat(data.pixel_mean, 256)) / (255 * np.repeat(data.pixel_std, 256))

    bank, asked = (np.stack([pixels(i) for i in rows]) for rows in (votes, queries))
    bank, asked = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (bank, asked))
    labels, right = trainer.images.labels, 0
    for row, query in zip(asked, queries, strict=True):
        near = np.argsort(-(bank @ row), kind="stable")[:20]
        weights = np.bincount(labels[votes[near]], np.exp(bank[near] @ row / 0.07), minlength=5)
        right += weights.argmax() == labels[query]
    assert found["knn_top1_raw_pixels"] == pytest.approx(100 * right / len(queries))


def readable_of(trainer) -> set[int]:
    return set(trainer.unreadable.readable(trainer.device).nonzero().flatten().tolist())


def test_test_images_that_can_not_be_read_leave_accuracy_out_but_training_goes_on(class_folders, tmp_path, capsys):
    shutil.copytree(class_folders, tmp_path / "data")
    spoil((tmp_path / "data").glob("val/*/*.png"))
    result = new(tmp_path / "run", tmp_path / "data", "--epochs", 1).fit()
    assert "knn_top1" not in result and len(metrics(tmp_path / "run")) == 1
    assert "knn_top1 was not measured: none of 120 images can be read" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--features", "bank"], ["--negatives", "in-batch"]])
def test_unreadable_images_are_no_data_for_clusters_queue_and_detection(more, spoiled, tmp_path):
    trainer = new(tmp_path / "run", spoiled, *more)
    trainer.fit()
    bad = torch.arange(24, 34)
    labeller, labels = trainer.labeller, trainer.labeller.labels
    assert len(labeller.job.pseudo_labels.labels) == int(labels.usable.sum()) <= 110 and not labels.usable[bad].any()
    assert (labels.accepted[bad] == -1).all() and (labels.clustered[bad] == -1).all()
    if labeller.source.bank is not None:
        assert not labeller.source.bank[bad].any()
    if trainer.config.contrast.negatives == "queue":
        queue = trainer.objective.queue
        assert not np.isin(queue.indices.numpy(), bad.numpy()).any()
        kept = np.setdiff1d(np.arange(120), bad.numpy())
        place = torch.full((120,), -1)
        place[torch.from_numpy(kept)] = torch.arange(110)
        _, queue_labels, queue_indices = queue.negatives()
        expected = detection_statistics(
            labels.accepted[kept], queue_labels, place[queue_indices], trainer.images.labels[kept]
        )
        last = metrics(tmp_path / "run")[-1]
        assert {name: last[name] for name in expected} == expected  # as if the unreadable ones weren't there


def test_queries_that_do_not_count():
    labels, truth = torch.tensor([[0], [0], [0], [1]]).int(), np.array([0, 0, 1, 1])
    counted = torch.tensor([True, True, False, True])
    found = detection_statistics(labels, labels, torch.arange(4), truth, counted=counted)
    rest = torch.tensor([0, 1, 3])
    assert found == detection_statistics(labels[rest], labels[rest], torch.arange(3), truth[rest])
    for wrong in (torch.ones(3, dtype=torch.bool), torch.zeros(4, dtype=torch.bool), torch.ones(4)):
        with pytest.raises(ValueError, match="counted"):
            detection_statistics(labels, labels, torch.arange(4), truth, counted=wrong)


def test_the_report_counts_and_shows_readable_images_alone(spoiled, tmp_path):
    new(tmp_path / "run", spoiled).fit()
    state = checkpoint.load_latest(tmp_path / "run")
    assert sorted(state["unreadable"]) == list(range(24, 34))
    page = render(read_run(tmp_path / "run"))
    assert "of 110 labels accepted (100%)" in page and "of 120 labels accepted" not in page
