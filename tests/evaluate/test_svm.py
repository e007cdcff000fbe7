"""Linear SVMs on features: what they see, how C is chosen, and VOC's annotations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ifnd_fast.evaluate.svm import Problem, Split, SvmOptions, choose_costs, sample, score
from ifnd_fast.evaluate.voc import IGNORED, find_voc, open_voc
from ifnd_fast.runtime.errors import CommandError, UsageError
from tests.forked import command


@pytest.fixture(scope="module")
def voc(tmp_path_factory) -> Path:
    """VOCdevkit/VOC2007 of pieces of scikit-learn's two photographs: a Chinese temple, and a flower.

    Images 0, 3, 6, ... show the temple, 1, 4, ... the flower, 2, 5, ... both, side by side; 24 to train, 12 to test.
    """
    from sklearn.datasets import load_sample_images

    root = tmp_path_factory.mktemp("voc")
    year = root / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (year / name).mkdir(parents=True)
    temple, flower = load_sample_images().images
    random = np.random.default_rng(0)
    for number in range(36):
        top, left = random.integers(0, 300), random.integers(0, 500)
        window = slice(top, top + 64), slice(left, left + 64)
        pieces = {"temple": temple[window], "flower": flower[window]}
        shown = [["temple"], ["flower"], ["temple", "flower"]][number % 3]
        pixels = np.concatenate([pieces[name] for name in shown], axis=1)
        Image.fromarray(pixels).save(year / "JPEGImages" / f"{number:06d}.jpg")
        annotate(year, number, [(name, 0) for name in shown])
    lists = year / "ImageSets" / "Main"
    (lists / "trainval.txt").write_text("".join(f"{number:06d}\n" for number in range(24)))
    (lists / "test.txt").write_text("".join(f"{number:06d}\n" for number in range(24, 36)))
    return root


def annotate(year: Path, number: int, things: list[tuple[str, int]]) -> None:
    objects = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
        for name, difficult in things
    )
    text = f"<annotation><filename>{number:06d}.jpg</filename>{objects}</annotation>"
    (year / "Annotations" / f"{number:06d}.xml").write_text(text)


@pytest.fixture
def own_voc(voc, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(voc / "VOCdevkit", tmp_path / "VOCdevkit")) / "VOC2007"


def test_voc_classes_of_each_image_and_difficult_ones(own_voc):
    annotate(own_voc, 0, [("flower", 1), ("temple", 0)])
    annotate(own_voc, 1, [("flower", 1), ("flower", 0)])
    annotate(own_voc, 2, [])
    for named in (own_voc, own_voc.parent, own_voc.parent.parent):
        assert find_voc(str(named)) == own_voc
    train, test = open_voc(own_voc)
    assert train.class_names == test.class_names == ["flower", "temple"]
    assert train.targets[:6].tolist() == [[IGNORED, 1], [1, 0], [0, 0], [0, 1], [1, 0], [1, 1]]
    assert (len(train), len(test)) == (24, 12) and test.name(0).endswith("000024.jpg")
    assert train.image(2).size == (128, 64)


def test_voc_that_is_broken_is_named(own_voc, tmp_path):
    (own_voc / "Annotations" / "000003.xml").write_text("<annotation><obj")
    with pytest.raises(CommandError, match="000003.xml can't be read"):
        open_voc(own_voc)
    (own_voc / "ImageSets" / "Main" / "trainval.txt").unlink()
    with pytest.raises(UsageError, match="can't read its trainval split"):
        open_voc(own_voc)
    shutil.copytree(own_voc, own_voc.with_name("VOC2012"))
    with pytest.raises(UsageError, match="which of .*VOC2007, .*VOC2012"):
        find_voc(str(own_voc.parent))
    assert find_voc(str(tmp_path / "nothing")) is None


def split(n: int, seed: int) -> Split:
    """Three classes around three orthogonal directions, with a fourth that is noise."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    features = np.eye(4)[labels] + 0.3 * random.normal(size=(n, 4))
    return Split(features / np.linalg.norm(features, axis=1, keepdims=True), np.eye(3, dtype=np.int8)[labels])


def test_separable_classes_are_told_apart_and_wrong_labels_are_not():
    problem = Problem(split(90, 0), split(60, 1), ["a", "b", "c"], single_label=True)
    everything = np.ones((90, 3), dtype=bool)
    found = score(problem, np.ones(3), everything, "")
    assert found["map_area"] > 95 and found["map_11-point"] > 95 and found["top1"] > 90
    assert set(found["ap"]["area"]) == {"a", "b", "c"}
    problem.test.targets[:] = np.roll(problem.test.targets, 1, axis=1)
    assert score(problem, np.ones(3), everything, "")["map_area"] < 40


def test_only_used_and_known_rows_are_learned_from():
    problem = Problem(split(90, 0), split(60, 1), ["a", "b", "c"], single_label=False)
    good = np.arange(90) < 45
    problem.train.targets[~good] = 1 - problem.train.targets[~good]  # wrong labels, of rows that must not be used
    assert score(problem, np.ones(3), good[:, None] & np.ones(3, dtype=bool), "")["map_area"] > 95
    assert score(problem, np.ones(3), np.ones((90, 3), dtype=bool), "")["map_area"] < 95
    problem.train.targets[~good] = IGNORED
    assert score(problem, np.ones(3), np.ones((90, 3), dtype=bool), "")["map_area"] > 95


def test_ignored_and_untested_classes_do_not_count(capsys):
    test = split(60, 1)
    test.targets[:, 2] = 0
    problem = Problem(split(90, 0), test, ["a", "b", "c"], single_label=False)
    found = score(problem, np.ones(3), np.ones((90, 3), dtype=bool), "")
    assert "1 of 3 classes have no test image" in capsys.readouterr().err
    assert set(found["ap"]["area"]) == {"a", "b"} and found["map_area"] == np.mean(list(found["ap"]["area"].values()))
    worst = 1 - (np.arange(60) % 3 == 0)
    test.targets[:, 0] = np.where(worst, test.targets[:, 0], IGNORED)
    test.targets[0, 0] = 1
    assert score(problem, np.ones(3), np.ones((90, 3), dtype=bool), "")["ap"]["area"]["a"] == 100


@pytest.mark.parametrize("noise, wrong_labels, best", [(0.3, 0.2, 1e-4), (1.0, 0.0, 1e3)])
def test_c_is_chosen_by_cross_validation(noise, wrong_labels, best):
    """Little where labels are wrong; much where features are noisy and labels right."""
    train, random = split(90, 0), np.random.default_rng(3)
    features = np.concatenate([train.features, noise * random.normal(size=(90, 60 if wrong_labels else 20))], axis=1)
    targets, wrong = train.targets.copy(), random.random(90) < wrong_labels
    targets[wrong] = np.roll(targets[wrong], 1, axis=1)
    costs, validated = choose_costs(Split(features, targets), SvmOptions(costs=(1e-4, 1e3)))
    assert costs.tolist() == [best] * 3 and (validated > 0.5).all()
    targets[np.flatnonzero(targets[:, 0])[1:], 0] = 0  # a class with one positive takes what is best for the others
    costs, validated = choose_costs(Split(features, targets), SvmOptions(costs=(1e-4, 1e3)))
    assert costs.tolist() == [best] * 3 and np.isnan(validated).tolist() == [True, False, False]


def test_c_can_not_be_chosen_on_single_images():
    train = split(3, 0)
    with pytest.raises(UsageError, match="no class has two training images"):
        choose_costs(train, SvmOptions())


def test_low_shot_samples_are_balanced_repeatable_and_differ():
    targets = np.eye(4, dtype=np.int8)[np.arange(80) % 4]
    targets[0, 1] = IGNORED
    used = sample(targets, 2, [0, 2, 0])
    for column in range(4):
        assert sorted(targets[used[:, column], column]) == [0] * 6 + [1] * 2
    assert np.array_equal(used, sample(targets, 2, [0, 2, 0]))
    assert not np.array_equal(used, sample(targets, 2, [0, 2, 1]))
    assert sample(targets, 20, [0])[:, 0].all()


def test_voc_as_a_process(voc, untrained_run, tmp_path):
    done = command("evaluate", "svm", untrained_run, "--data", voc, "--image-size", "64", "--shots", "1", "2", "64",
                   "--samplings", "2", "--costs", "0.1", "1", "10", "--json-file", tmp_path / "svm.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "svm.json").read_text())
    assert figures["classes"] == ["flower", "temple"] and figures["map_11-point"] > 80 and "top1" not in figures
    assert set(figures["low_shot"]) == {"1", "2"} and len(figures["low_shot"]["2"]["map_area"]["values"]) == 2
    assert "--shots 64 is left out: the smallest class has 16" in done.stderr
    assert f"{figures['map_area']:.2f} %" in done.stdout and "11-point" in done.stdout
