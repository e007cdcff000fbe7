"""A data set's identity: in config, checkpoints and among ranks; what has another one is refused with what differs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ifnd_fast import config as configs
from ifnd_fast.cli import parse_train
from ifnd_fast.data import identity
from ifnd_fast.data.identity import Listing, difference
from ifnd_fast.data.images import ArrayImages, Subset
from ifnd_fast.data.sources import open_images
from ifnd_fast.evaluate.classifier import ClassifierTraining, TrainingOptions
from ifnd_fast.evaluate.labelled import RunData, open_labelled
from ifnd_fast.evaluate.subject import Options, Subject
from ifnd_fast.runtime import checkpoint, run_folder
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.training.saved_run import images_of, read_run
from ifnd_fast.training.saved_state import SavedState
from ifnd_fast.training.trainer import Trainer
from tests.conftest import TINY
from tests.forked import run_ranks
from tests.training.test_trainer import new


def listing(**sizes: int) -> Listing:
    return Listing(list(sizes), np.array(list(sizes.values()), dtype=np.int64))


@pytest.mark.parametrize(
    "now, words",
    [
        (listing(a=1, b=2, c=3), ""),
        (listing(a=1, c=3), "1 missing (b)"),
        (listing(a=1, b=2, b2=2, c=3), "1 new (b2)"),
        (listing(a=1, b=9, c=9), "2 of another size (b, c)"),
        (listing(a=1, z=2, c=3), "1 missing (b), 1 new (z)"),
        (listing(a=1, c=3, b=2), "in another order"),
        (listing(), "3 missing (a, b, c)"),
        (listing(**{f"n{i}": 0 for i in range(1000)}), "3 missing (a, b, c), 1,000 new (n0, n1, n2, ...)"),
        (Listing(["a", "b", "c", "c"], np.array([1, 2, 3, 3])), "named another number of times: c"),
        (Listing(["a", "b", "c"], np.array([1, 2, 3]), "other labels"), "of other content"),
    ],
)
def test_what_differs_is_said_and_changes_the_digest(now, words):
    then = listing(a=1, b=2, c=3)
    assert difference(then, now) == words
    same = identity.identity_of({"train": then}) == identity.identity_of({"train": now})
    assert same == (not words)


def test_images_in_memory_are_known_by_their_pixels_and_labels():
    pixels, labels = np.zeros((6, 4, 4), dtype=np.uint8), np.arange(6)
    names = [str(label) for label in range(6)]
    other = pixels.copy()
    other[3, 1, 1] = 1
    whole = ArrayImages(pixels, labels, names)
    listings = [
        whole, ArrayImages(other, labels, names), ArrayImages(pixels, labels[::-1], names),
        Subset(whole, np.array([0, 1])), Subset(whole, np.array([1, 0])),
    ]  # fmt: skip
    digests = [identity.identity_of({"train": images.listing()})["train"] for images in listings]
    assert len(set(digests)) == 5
    assert digests[0] == identity.identity_of({"train": ArrayImages(pixels.copy(), labels, names).listing()})["train"]
    assert difference(whole.listing(), listings[1].listing()) == "of other content"
    assert difference(whole.listing(), listings[3].listing()) == "6 then, 2 now"


def test_it_is_of_names_and_sizes_wherever_the_folder_is(digit_folder, tmp_path):
    shutil.copytree(digit_folder, tmp_path / "copy")
    (tmp_path / "link").symlink_to(digit_folder)
    folders = [digit_folder, tmp_path / "copy", tmp_path / "link", f"{tmp_path}/copy/../copy/"]
    found = [identity.identity_of({"train": open_images(str(folder)).listing()}) for folder in folders]
    assert all(other == found[0] for other in found)


def test_a_listing_is_kept_beside_checkpoints_and_its_loss_is_no_traceback(tmp_path):
    then, now = {"train": listing(**{"a\udce9": 1, "b\n": 2})}, {"train": listing(**{"a\udce9": 1, "c": 2})}
    known = identity.keep(tmp_path, then)
    assert identity.changes(tmp_path, known, then) == ""
    assert identity.changes(tmp_path, known, now) == r"train images: 1 missing (b\n), 1 new (c)"
    (path,) = checkpoint.folder(tmp_path).glob("images-*")
    for damage in (path.read_bytes()[:20], b"", b"no gzip"):
        path.write_bytes(damage)
        assert "is lost" in identity.changes(tmp_path, known, now)
    identity.keep(tmp_path, now)
    assert len(list(checkpoint.folder(tmp_path).iterdir())) == 1


# ---- runs ----


def stopped(out: Path, data: Path, *options: object) -> None:
    """A run that was stopped after its first epoch."""
    trainer = new(out, data, *options)
    identity.keep(out, trainer.data.listings())
    epochs = trainer.epochs()
    next(epochs)
    epochs.close()


def resumed(out: Path, *args: object) -> Trainer:
    trainer = Trainer(parse_train(["--resume", "--out", str(out), *map(str, args)]))
    with trainer.open():
        pass
    return trainer


@pytest.fixture
def data(digit_folder, tmp_path) -> Path:
    shutil.copytree(digit_folder, tmp_path / "data")
    return tmp_path / "data"


def test_the_identity_is_in_the_config_and_in_every_checkpoint(data, tmp_path):
    stopped(tmp_path / "run", data)
    known = configs.load(tmp_path / "run" / "config.yaml").identity
    assert known == identity.identity_of({"train": open_images(str(data)).listing()})
    assert checkpoint.load_latest(tmp_path / "run")["config"]["identity"] == known


def test_data_that_moved_go_on_to_the_same_bits(data, tmp_path, monkeypatch):
    whole = new(tmp_path / "whole", data)
    whole.fit()
    stopped(tmp_path / "run", data)
    data.rename(tmp_path / "moved")
    for file in (tmp_path / "moved").rglob("*.png"):
        os.utime(file, (1, 1))  # as a copy may have it
    monkeypatch.chdir(tmp_path)
    trainer = resumed(tmp_path / "run", "--data", "moved")
    assert configs.load(tmp_path / "run" / "config.yaml").data.data == str(tmp_path / "moved")
    trainer.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    images, missing = images_of(read_run(tmp_path / "run"))
    assert images is not None and not missing
    assert not configs.load(tmp_path / "run" / "config.yaml").run.resume


def replace(data):
    (data / "digit-1" / "003.png").write_bytes((data / "digit-1" / "003.png").read_bytes() + b"\0")


def remove(data):
    (data / "digit-1" / "003.png").unlink()


def add(data):
    shutil.copy(data / "digit-1" / "003.png", data / "digit-1" / "003a.png")


def rename(data):
    (data / "digit-1" / "003.png").rename(data / "digit-1" / "999.png")


def relabel(data):
    (data / "digit-1" / "003.png").rename(data / "digit-2" / "103.png")


def rename_class(data):
    (data / "digit-1").rename(data / "digit-x")


CHANGES = [
    (replace, r"1 of another size \(digit-1/003.png\)"), (remove, r"1 missing \(digit-1/003.png\)"),
    (add, r"1 new \(digit-1/003a.png\)"), (rename, r"1 missing \(digit-1/003.png\), 1 new \(digit-1/999.png\)"),
    (relabel, r"1 missing \(digit-1/003.png\), 1 new \(digit-2/103.png\)"),
    (rename_class, r"24 missing \(digit-1/000.png, .*, \.\.\.\), 24 new \(digit-x/000.png"),
]  # fmt: skip


@pytest.fixture(scope="module")
def stopped_run(digit_folder, tmp_path_factory) -> Path:
    """A folder with data/ and a run that was stopped on them."""
    root = tmp_path_factory.mktemp("stopped")
    shutil.copytree(digit_folder, root / "data")
    stopped(root / "run", root / "data")
    return root


@pytest.mark.parametrize("change, words", CHANGES)
def test_other_images_are_refused_with_what_differs(change, words, stopped_run, tmp_path):
    shutil.copytree(stopped_run / "data", tmp_path / "data")
    shutil.copytree(stopped_run / "run", tmp_path / "run")
    change(tmp_path / "data")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UsageError, match=f"--resume: --data {tmp_path}/data .*train images: {words}"):
        resumed(tmp_path / "run", "--data", tmp_path / "data")
    assert before == (tmp_path / "run" / "config.yaml").read_bytes()
    settings = configs.load(tmp_path / "run" / "config.yaml")
    settings.data.data = str(tmp_path / "data")  # as if changed in place
    (tmp_path / "run" / "config.yaml").write_text(configs.to_yaml(settings))
    (tmp_path / "run" / "metrics.jsonl").write_text((stopped_run / "run" / "metrics.jsonl").read_text())
    images, missing = images_of(read_run(tmp_path / "run"))
    assert images is None and missing


def test_before_the_first_checkpoint_too(data, tmp_path):
    trainer = new(tmp_path / "run", data)
    identity.keep(tmp_path / "run", trainer.data.listings())
    replace(data)
    with pytest.raises(UsageError, match="1 of another size"):
        resumed(tmp_path / "run")


def test_test_images_count_too(class_folders, tmp_path):
    shutil.copytree(class_folders, tmp_path / "data")
    stopped(tmp_path / "run", tmp_path / "data")
    (tmp_path / "data" / "val" / "n00000002" / "n00000002_5.png").unlink()
    with pytest.raises(UsageError, match=r"test images: 1 missing \(n00000002/n00000002_5.png\)"):
        resumed(tmp_path / "run")
    images, _ = images_of(read_run(tmp_path / "run"))
    assert images is not None, "the training images are the same, and a report needs no others"
    shutil.rmtree(tmp_path / "data" / "val")
    with pytest.raises(UsageError, match="no test images"):
        resumed(tmp_path / "run")


@pytest.mark.parametrize("moved", [False, True])
def test_runs_of_earlier_versions_go_on_where_they_were(moved, data, tmp_path, capsys):
    out = tmp_path / "run"
    stopped(out, data)
    state = checkpoint.load_latest(out)
    del state["config"]["identity"]
    state["config"]["data"]["data"] = "data"  # relative, as it was stored
    checkpoint.save(out, state)
    shutil.rmtree(checkpoint.folder(out), ignore_errors=False)
    checkpoint.save(out, state)
    lines = (out / "config.yaml").read_text().replace(f"data: {data}", "data: data").splitlines()
    lines = [line for line in lines if not line.startswith(("identity", "  train:"))]
    (out / "config.yaml").write_text("\n".join(lines))
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        if moved:
            data.rename(tmp_path / "moved")
            with pytest.raises(UsageError, match="--data: the run has"):
                resumed(out, "--data", "moved")
            return
        trainer = resumed(out)
    finally:
        os.chdir(before)
    assert "can't be checked" in capsys.readouterr().err
    trainer.fit()
    assert checkpoint.load_latest(out)["config"]["identity"] == trainer.config.identity


def test_hold_out_is_part_of_it(data, tmp_path):
    stopped(tmp_path / "run", data, "--hold-out", 0.2)
    trainer = resumed(tmp_path / "run")
    assert set(trainer.config.identity) == {"train", "test"}
    images, missing = images_of(read_run(tmp_path / "run"))
    assert images is not None and len(images) == len(trainer.images), missing
    add(data)
    with pytest.raises(UsageError, match="does not hold the images"):
        resumed(tmp_path / "run")


@pytest.mark.parametrize("hold_out", [0.0, 0.25])
def test_an_evaluation_of_a_runs_own_data_says_what_changed(hold_out, data, tmp_path, capsys):
    trainer = new(tmp_path / "run", data, "--hold-out", hold_out)
    identity.keep(tmp_path / "run", trainer.data.listings())
    options = RunData(**vars(trainer.config.data), run=tmp_path / "run", identity=trainer.config.identity)
    capsys.readouterr()
    open_labelled(options)
    assert "warning" not in capsys.readouterr().err
    add(data)
    if hold_out:  # the numbers of the images are drawn from, so that others are held out now
        with pytest.raises(UsageError, match="held out is mixed"):
            open_labelled(options)
    else:
        open_labelled(options)
        assert "was trained on: train images: 1 new (digit-1/003a.png)" in capsys.readouterr().err


def test_false_negatives_of_other_images_are_refused(data, tmp_path):
    from ifnd_fast.evaluate.false_negatives import _check_same

    stopped(tmp_path / "run", data)
    images = open_images(str(data))
    options = configs.load(tmp_path / "run" / "config.yaml").data
    state = SavedState.latest(tmp_path / "run")
    _check_same(tmp_path / "run", state, options, images, len(images))
    rename(data)
    with pytest.raises(UsageError, match=r"1 missing \(digit-1/003.png\), 1 new .* give --levels"):
        _check_same(tmp_path / "run", state, options, open_images(str(data)), len(images))


def test_the_classifiers_of_evaluations_know_their_images(untrained_run, data, tmp_path, capsys):
    def training(folder: Path, **options) -> ClassifierTraining:
        subject = Subject(Options(untrained_run, data=str(folder), device="cpu"))
        train, _ = open_labelled(subject.data)
        wanted = TrainingOptions(epochs=2, batch_size=48, **options)
        return ClassifierTraining(subject, train, 5, wanted, 1.0, None, tmp_path / "out")

    def begin(folder: Path, **options) -> ClassifierTraining:
        it = training(folder, **options)
        with run_folder.locked(it.out):
            it.session.go_on(it)
        return it

    first = training(data)
    first.fit()
    data.rename(tmp_path / "moved")
    assert begin(tmp_path / "moved", resume=True).step == first.step
    replace(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"train images: 1 of another size \(digit-1/003.png\)"):
        begin(tmp_path / "moved", resume=True)
    state = checkpoint.load_latest(tmp_path / "out")
    del state["identity"]
    checkpoint.save(tmp_path / "out", state)
    assert begin(tmp_path / "moved", resume=True).step == first.step
    assert "can't be checked" in capsys.readouterr().err


def test_the_detectors_know_their_images_and_annotations(coco_folder, tmp_path):
    from ifnd_fast.evaluate.detection import coco

    def parts(root: Path) -> dict[str, Listing]:
        return {part: coco.CocoImages(*coco.find(part, root, None, None)).listing() for part in ("train", "val")}

    known = identity.keep(tmp_path, parts(coco_folder))
    shutil.copytree(coco_folder, tmp_path / "moved")
    assert identity.changes(tmp_path, known, parts(tmp_path / "moved")) == ""
    image = next((tmp_path / "moved" / "train2017").glob("*.png"))
    image.write_bytes(image.read_bytes() + b"\0")
    with pytest.raises(UsageError, match=rf"train images: 1 of another size \({image.name}\)"):
        identity.check(tmp_path, known, parts(tmp_path / "moved"), "--data X")
    shutil.copy(coco_folder / "train2017" / image.name, image)
    annotations = tmp_path / "moved" / "annotations" / "instances_val2017.json"
    annotations.write_text(annotations.read_text().replace('"zero"', '"ZERO"'))
    with pytest.raises(UsageError, match="val images: of other content"):
        identity.check(tmp_path, known, parts(tmp_path / "moved"), "--data X")


# ---- ranks ----

RANK = """
import os, sys
from ifnd_fast.cli import train
sys.argv[sys.argv.index("DATA")] = os.environ["DATA_" + os.environ["RANK"]]
train()
"""


@pytest.mark.parametrize(
    "change, words",
    [
        (remove, "rank 1, compared with rank 0: train images: 1 missing (digit-1/003.png)"),
        (shutil.rmtree, "no such folder"),
    ],
)  # fmt: skip
def test_ranks_that_find_different_images_stop_at_once(change, words, digit_folder, data, tmp_path, monkeypatch):
    change(data)
    script = tmp_path / "train.py"
    script.write_text(RANK)
    monkeypatch.setenv("DATA_0", str(digit_folder))
    monkeypatch.setenv("DATA_1", str(data))
    done = run_ranks(2, script, "--data", "DATA", "--out", tmp_path / "run", *TINY, "--rank-timeout", 2)
    assert done.returncode != 0 and words in done.stderr, done.stderr[-3000:]
    told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(told) == 1, told
    assert not (tmp_path / "run").exists()


# ---- cost ----


def test_files_are_looked_at_once_and_never_read(tmp_path, monkeypatch):
    root = tmp_path / "many"
    for folder in range(20):
        (root / f"{folder:03d}").mkdir(parents=True)
        for number in range(500):
            (root / f"{folder:03d}" / f"{number}.png").touch()

    def refuse(*args, **_):
        raise AssertionError(f"opened {args}")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("PIL.Image.open", refuse)
    looked, is_file = [], os.path.isfile
    monkeypatch.setattr("os.path.isfile", lambda path: looked.append(path) or is_file(path))
    found = identity.identity_of({"train": open_images(str(root)).listing()})
    assert len(found["train"]) == 32 and not looked  # the sizes come with the listing


LOCALE = """
import os, sys
from pathlib import Path
from ifnd_fast.data.images import ListImages
from ifnd_fast.data.sources import open_images
from ifnd_fast.data.identity import identity_of
for images in (open_images(sys.argv[1]), ListImages(Path(sys.argv[2]), Path(sys.argv[1]))):
    print(ascii([identity_of({"train": images.listing()}), images.class_names, images.listing().names]))
"""


def test_the_locale_changes_neither_names_nor_order(digit_folder, tmp_path):
    names = [b"b/\xc3\xa9.png", b"b/\xe9.png", b"caf\xc3\xa9/1.png", b"Z/1.png"]
    for name in names:
        path = tmp_path / "data" / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(digit_folder / "digit-0" / "000.png", path)
    (tmp_path / "list.txt").write_bytes(b"".join(name + b" 1\n" for name in names))
    told = {
        subprocess.run(
            [sys.executable, "-c", LOCALE, tmp_path / "data", tmp_path / "list.txt"], capture_output=True, text=True,
            check=True, env={**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        ).stdout for locale in ("C", "C.UTF-8")
    }  # fmt: skip
    assert len(told) == 1
    assert r"['Z', 'b', 'caf\xe9']" in told.pop()
