"""What is refused before a run takes any time."""

from __future__ import annotations

import sys

import pytest

from ifnd_fast.cli import parse_train
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.training.precheck import check_packages
from tests.forked import python
from tests.training.test_trainer import new


@pytest.mark.parametrize(
    "options, module, words",
    [
        (["--tensorboard"], "tensorboard", r"--tensorboard: pip install 'ifnd-fast\[tensorboard\]' first"),
        (["--wandb", "cats"], "wandb", r"--wandb: pip install 'ifnd-fast\[wandb\]' first"),
        (["--mlflow", "cats"], "mlflow", r"--mlflow: pip install 'ifnd-fast\[mlflow\]' first"),
        (["--augment", "device", "--color-jitter", "0.4"], "kornia", r"pip install 'ifnd-fast\[augment\]' first"),
        (["--kmeans-engine", "faiss"], "faiss", "--kmeans-engine faiss: pip install faiss-cpu first"),
    ],
)
def test_a_package_that_an_option_needs(options, module, words, monkeypatch):
    check_packages(parse_train(options))
    for name in [name for name in sys.modules if name.split(".")[0] == module or name == "torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(UsageError, match=words):
        check_packages(parse_train(options))
    check_packages(parse_train([]))


def test_a_package_that_is_missing_leaves_nothing_behind(digit_folder, tmp_path):
    code = "import sys; sys.modules['tensorboard'] = None\nfrom ifnd_fast.cli import train; train()"
    done = python(code, "--data", digit_folder, "--out", tmp_path / "run", "--tensorboard")
    assert done.returncode == 2 and "--tensorboard: pip install" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists() and "Traceback" not in done.stderr


def folder_of(files: list[bytes], root):
    root.mkdir()
    for number, content in enumerate(files):
        (root / f"{number:04d}.png").write_bytes(content)
    return root


@pytest.fixture
def pictures(flat_folder) -> list[bytes]:
    return [file.read_bytes() for file in sorted(flat_folder.iterdir())]


@pytest.mark.parametrize(
    "make, options, error, words",
    [
        (lambda p: p[:1], [], UsageError, "has 1 images to train on: contrast needs at least two"),
        (lambda p: p[:2], [], UsageError, r"--batch-size 32 is larger than the data set \(2 images\)"),
        (lambda p: p[:2], ["--batch-size", 2], UsageError, "2 readable and distinct images are too few for 2 levels"),
        (lambda p: [b"broken"] * 40, [], CommandError, "none of 40 images .all. can be read: .*0000.png"),
        (lambda p: [b"broken"] * 90, [], CommandError, r"none of 90 images \(64 looked at\) can be read"),
        (lambda p: p[:1] * 40, [], UsageError, "no two distinct images among 40 readable ones .all.: there is nothing"),
        (lambda p: p[:1] * 39 + [b"broken"], [], UsageError, "no two distinct images among 39 readable ones"),
        (lambda p: p[:11], ["--batch-size", 2], UsageError, "11 readable and distinct images are too few"),
    ],
)
def test_data_that_can_not_be_trained_on(make, options, error, words, pictures, tmp_path):
    with pytest.raises(error, match=words):
        new(tmp_path / "run", folder_of(make(pictures), tmp_path / "data"), *options)


def test_two_images_are_enough_without_clusters(pictures, tmp_path, capsys):
    data = folder_of(pictures[:2], tmp_path / "data")
    new(tmp_path / "run", data, "--batch-size", 2, "--false-negatives", "keep", "--epochs", 1).fit()
    assert "--queue-size 64 is longer than an epoch (2 images)" in capsys.readouterr().err


def test_copies_are_told_before_training_and_stop_clustering(pictures, tmp_path, capsys):
    trainer = new(tmp_path / "run", folder_of(pictures[:1] * 90, tmp_path / "data"))
    assert "no two distinct images among 64 readable ones (64 looked at)" in capsys.readouterr().err
    with pytest.raises(CommandError, match="90 of 90 images are readable, .* with distinct features; .* too few"):
        trainer.fit()


@pytest.mark.parametrize(
    "make, levels, scaled",
    [
        (lambda p: p[:89] + [p[89][:60]], (11, 22), None),  # one truncated file of 90: 89 // 4 clusters are left
        (lambda p: p[:80] + [b"broken"] * 10, (11, 22), (10, 20)),
        (lambda p: p[:30] * 3, (11, 22), (3, 7)),
    ],
)
def test_levels_scale_to_what_is_usable_and_distinct(make, levels, scaled, pictures, tmp_path, capsys):
    trainer = new(tmp_path / "run", folder_of(make(pictures), tmp_path / "data"), "--levels", 45, 90)
    assert trainer.labeller.levels == levels
    trainer.fit()
    told = capsys.readouterr().err
    assert "--levels 45 90 scaled to 11 22: at most one cluster for every 4 images, of which there are 90" in told
    assert ("--levels 11 22 scaled to" in told) == (scaled is not None)
    if scaled is not None:
        assert f"--levels 11 22 scaled to {scaled[0]} {scaled[1]}: at most one cluster for every 4 images that" in told
    found = trainer.labeller.job.pseudo_labels
    assert found.levels == (scaled or levels) and len(found.centroids[1]) == (scaled or levels)[1]
    assert (trainer.labeller.labels.accepted >= 0).any()


def test_a_run_with_scaled_levels_resumes(pictures, tmp_path):
    from ifnd_fast.training.trainer import Trainer

    data, out = folder_of(pictures[:80] + [b"broken"] * 10, tmp_path / "data"), tmp_path / "run"
    new(out, data, "--levels", 45, 90).fit()
    resumed = Trainer(parse_train(["--resume", "--out", str(out)]))
    resumed.session.go_on(resumed)
    assert resumed.labeller.levels == (11, 22) and resumed.labeller.job.pseudo_labels.levels == (10, 20)


def test_with_strict_no_level_is_scaled(pictures, tmp_path):
    data = folder_of(pictures[:30] * 3, tmp_path / "data")
    with pytest.raises(UsageError, match=r"--levels 45 90: at most one cluster for every 4 images.*\(--strict\)"):
        new(tmp_path / "run", data, "--levels", 45, 90, "--strict")
    with pytest.raises(CommandError, match=r"--levels 11 22: .* of which there are 30 \(--strict\)"):
        new(tmp_path / "other", data, "--levels", 11, 22, "--strict").fit()
