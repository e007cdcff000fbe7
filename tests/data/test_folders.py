"""Folders of images as they are in the world: what counts, which class it is of, and what is said of the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision

from ifnd_fast.config import DataConfig
from ifnd_fast.data import folders
from ifnd_fast.data.found import tell_found
from ifnd_fast.data.sources import open_for_run, open_images
from ifnd_fast.evaluate.labelled import open_labelled
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.runtime.paths import shown
from tests.conftest import TINY
from tests.forked import command


@pytest.fixture
def png(digit_folder) -> bytes:
    return (digit_folder / "digit-0" / "000.png").read_bytes()


@pytest.fixture
def make(tmp_path, png):
    """make("a/1.png", ...) makes files below a folder, and returns it; a name that ends in / is a folder."""
    root = tmp_path / "data"

    def make(*names: str | bytes) -> Path:
        for name in names:
            path = root / os.fsdecode(name)
            (path if os.fsdecode(name).endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not os.fsdecode(name).endswith("/"):
                path.write_bytes(png)
        return root

    return make


def listed(data: Path, split: str = "train") -> dict[str, list[str]] | list[str] | None:
    """Names by class, or of no class, or None; and the images are really there."""
    images = open_images(str(data), split)
    if images is None:
        return None
    names = [os.path.relpath(file, images.root) for file in images.files]
    assert names == images.listing().names and images.image(len(images) - 1).size == (16, 16)
    if images.labels is None:
        assert images.class_names is None
        return names
    return {
        name: [names[i] for i in np.flatnonzero(images.labels == label)]
        for label, name in enumerate(images.class_names)
    }


def test_parts_of_any_kind_of_picture(make):
    data = make("Train/a.gif", "Train/b.webp", "val/c.avif", "val/d.jfif")
    assert [listed(data), listed(data, "test")] == [["a.gif", "b.webp"], ["c.avif", "d.jfif"]]


def left_out(data: Path, split: str = "train") -> dict[str, int]:
    return dict(open_images(str(data), split).found.left_out.counts)


def told(data: Path, capsys, **options) -> tuple[str, str]:
    """What is said of a data set, and what is warned of."""
    config = DataConfig(data=str(data), **options)
    capsys.readouterr()
    tell_found(config, *open_for_run(config))
    return capsys.readouterr()


# ---- parts and classes ----


@pytest.mark.parametrize("beside", [[], ["val/b/1.png"], ["annotations/", "notes/readme.txt"]])
def test_train_is_a_part_beside_a_test_part_or_nothing_with_images(beside, make):
    data = make("train/a/1.png", "train/b/1.png", *beside)
    assert listed(data) == {"a": ["a/1.png"], "b": ["b/1.png"]}


def test_a_class_named_train(make, capsys):
    data = make("car/1.png", "plane/1.png", "train/1.png", "train/more/2.png")
    assert listed(data) == {
        "car": ["car/1.png"], "plane": ["plane/1.png"], "train": ["train/1.png", "train/more/2.png"],
    }  # fmt: skip
    assert listed(data, "test") is None
    out, err = told(data, capsys)
    assert "4 training images in 3 classes (car, plane, train)" in out and not err


@pytest.mark.parametrize("test", ["val", "valid", "validation", "test", "VAL", "Valid", "Test", "testing"])
@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training"])
def test_names_of_the_parts(train, test, make):
    data = make(f"{train}/a/1.png", f"{train}/b/1.png", f"{test}/b/2.png")
    assert listed(data) == {"a": ["a/1.png"], "b": ["b/1.png"]}
    assert listed(data, "test") == {"b": ["b/2.png"]}
    train_images, test_images = open_for_run(DataConfig(data=str(data)))
    assert test_images.labels.tolist() == [1] and test_images.class_names == train_images.class_names


def test_of_several_test_parts_one_measures_and_the_others_are_told(make, capsys):
    data = make("train/a/1.png", "train/b/1.png", "test/a/1.png", "Validation/a/2.png", "val/", "extra/1.png", "x.png")
    assert listed(data, "test") == {"a": ["a/2.png"]}
    out, err = told(data, capsys)
    assert f"1 {folders.UNUSED} (test)" in out and f"1 {folders.EMPTY} (val)" in out
    assert f"1 {folders.OUTSIDE} (x.png)" in err and f"1 {folders.ASIDE} (extra)" in err


def test_two_training_parts_are_refused(make):
    with pytest.raises(UsageError, match="which of Train, train is the training part"):
        open_images(str(make("train/a/1.png", "Train/a/1.png", "val/a/1.png")))


def test_an_empty_training_part_is_not_replaced_by_the_test_part(make):
    with pytest.raises(UsageError, match="train: no images below it"):
        open_images(str(make("train/", "val/a/1.png", "val/b/1.png")))


def test_loose_images_beside_classes_are_left_out_and_warned_of(make, capsys):
    data = make("a/1.png", "b/1.png", "0.png", "z1.png", "z2.png", "z3.png")
    assert listed(data) == {"a": ["a/1.png"], "b": ["b/1.png"]}
    _, err = told(data, capsys)
    assert f"warning: data {data}: left out: 4 {folders.LOOSE} (0.png, z1.png, z2.png, ...)" in err


def test_loose_images_count_where_there_are_no_classes(make, capsys):
    data = make("more/1.png", "0.png", "z.png")
    assert listed(data) == ["0.png", "more/1.png", "z.png"]
    out, err = told(data, capsys)
    assert "3 training images without classes" in out and "one sub-folder more" in err


@pytest.mark.parametrize("root", ["", "train/"])
def test_one_dummy_folder_is_no_class(root, make, capsys):
    data = make(*(f"{root}images/{i}.png" for i in range(30)))
    assert listed(data) == [f"images/{i}.png" for i in sorted(range(30), key=str)]
    assert "images: one class is none" in told(data, capsys)[1]
    with pytest.raises(UsageError, match="of one class"):
        open_labelled(DataConfig(data=str(data)))


def test_one_folder_that_holds_the_classes_is_named(make, capsys):
    data = make("pets/cat/1.png", "pets/dog/1.png", "empty/")
    assert listed(data) == ["pets/cat/1.png", "pets/dog/1.png"]
    assert f"give --data {data}/pets if cat, dog in it are the classes" in told(data, capsys)[1]
    assert listed(data / "pets") == {"cat": ["cat/1.png"], "dog": ["dog/1.png"]}


def test_the_first_level_is_the_class_as_in_torchvision(make):
    data = make("a/x/deep/er/1.png", "a/x-1.png", "a/x.png", "b/2.png", "b/1.PNG", "b/10.JpG", "b/.1.png")
    (data / "b/.1.png").unlink()
    found = listed(data)
    assert found == {"a": ["a/x/deep/er/1.png", "a/x-1.png", "a/x.png"], "b": ["b/1.PNG", "b/10.JpG", "b/2.png"]}
    theirs = torchvision.datasets.ImageFolder(str(data))
    assert {os.path.relpath(path, data) for path, _ in theirs.samples} == {n for names in found.values() for n in names}


def test_the_order_is_that_of_the_names_bytes(make):
    names = ["a/Z.png", "a/_.png", "a/a.png", "a/b/1.png", "a/b.png", "a/é.png", "a/日.png", "b/1.png"]
    data = make(*names[::-1], b"a/\xe9.png")
    assert [os.fsencode(name) for name in open_images(str(data)).listing().names] == [
        *(name.encode() for name in names[:6]), b"a/\xe6\x97\xa5.png", b"a/\xe9.png", b"b/1.png",
    ]  # fmt: skip


# ---- what is left out ----


def test_hidden_and_system_files_at_any_depth(make, capsys):
    data = make(
        "a/1.png", "b/sub/1.png", "a/._1.png", "b/sub/._1.png", "b/sub/.cache/1.png", ".ipynb_checkpoints/1.png",
        "a/.ipynb_checkpoints/1.png", "__MACOSX/a/1.png", "a/@eaDir/1.png/SYNO.png", "a/Thumbs.db", ".DS_Store",
    )  # fmt: skip
    assert listed(data) == {"a": ["a/1.png"], "b": ["b/sub/1.png"]}
    assert left_out(data) == {folders.HIDDEN: 9}
    out, err = told(data, capsys)
    assert f"9 {folders.HIDDEN} (.DS_Store, .ipynb_checkpoints, __MACOSX, ...)" in out and not err


def test_other_files_are_counted_by_extension(make, capsys):
    data = make("a/1.png", "b/1.png", "a/1.txt", "a/2.TXT", "labels.csv", "b/README")
    out, _ = told(data, capsys)
    assert f"4 {folders.OTHER} (.txt 2, without one 1, .csv 1)" in out


def test_empty_class_folders_do_not_shift_the_numbers(make, capsys):
    data = make("a/", "b/1.png", "c/only.txt", "d/1.png", "e/deep/er/")
    assert listed(data) == {"b": ["b/1.png"], "d": ["d/1.png"]}
    assert open_images(str(data)).labels.tolist() == [0, 1]
    assert f"3 {folders.EMPTY} (a, c, e)" in told(data, capsys)[0]


def test_broken_links_and_what_is_no_file(make, capsys):
    data = make("a/1.png", "b/1.png")
    (data / "a/2.png").symlink_to(data / "gone.png")
    (data / "a/3.png").symlink_to("3.png")  # to itself
    (data / "gone").symlink_to(data / "nowhere")
    os.mkfifo(data / "b/2.png")
    (data / "b/4.png").mkdir()
    assert listed(data) == {"a": ["a/1.png"], "b": ["b/1.png"]}
    assert left_out(data)[folders.BROKEN] == 2 and left_out(data)[folders.SPECIAL] == 1
    assert f"2 {folders.BROKEN} (a/2.png, a/3.png)" in told(data, capsys)[1]


@pytest.mark.parametrize("strict", [False, True])
def test_a_folder_that_cannot_be_read(strict, make, monkeypatch, capsys):
    data = make("a/1.png", "b/1.png", "b/closed/1.png", "c/1.png")
    scan = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith(("closed", "/c")):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    assert listed(data) == {"a": ["a/1.png"], "b": ["b/1.png"]}
    if strict:
        with pytest.raises(CommandError, match=r"--strict.*2 folders that can't be read \(b/closed, c\)"):
            told(data, capsys, strict=True)
    else:
        assert f"2 {folders.UNREADABLE} (b/closed, c)" in told(data, capsys)[1]
    with pytest.raises(UsageError, match="can't be read: Permission denied"):
        open_images(str(data / "c"))


def test_a_run_inside_the_data_is_no_data(make):
    data = make("a/1.png", "b/1.png", "runs/x/curves.png", "runs/x/evaluate/1.png", "a/old/1.png")
    for name in ("runs/x/config.yaml", "runs/x/.lock", "a/old/config.yaml"):
        (data / name).write_text("")
    assert listed(data) == {"a": ["a/1.png", "a/old/1.png"], "b": ["b/1.png"]}
    assert left_out(data) == {folders.RUN: 1, folders.OTHER: 1}
    (data / "a/old/checkpoints").mkdir()
    assert listed(data) == {"a": ["a/1.png"], "b": ["b/1.png"]}


def test_nothing_found_says_what_was_left_out(make):
    with pytest.raises(UsageError, match=rf"no images below it.*1 {folders.HIDDEN}.*1 {folders.OTHER} \(.heic 1\)"):
        open_images(str(make("a/.1.png", "a/1.heic")))


@pytest.mark.parametrize("data, words", [("", "--data is empty"), ("file.png", "is a file, not a folder")])
def test_what_is_no_folder_is_refused(data, words, make, monkeypatch):
    monkeypatch.chdir(make("file.png"))
    with pytest.raises(UsageError, match=words):
        open_images(data)


# ---- links ----


def test_links_are_followed_as_torchvision_follows_them(make, tmp_path):
    data = make("a/1.png", "b/1.png", "b/own/2.png")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    for name in ("3.png", "deep/4.png"):
        (elsewhere / name).write_bytes((data / "a/1.png").read_bytes())
    (data / "a/linked").symlink_to(elsewhere)
    (data / "b/again").symlink_to("own")
    (data / "a/5.png").symlink_to(elsewhere / "3.png")
    (data / "c").symlink_to(elsewhere, target_is_directory=True)
    found = listed(data)
    assert found == {
        "a": ["a/1.png", "a/5.png", "a/linked/3.png", "a/linked/deep/4.png"],
        "b": ["b/1.png", "b/again/2.png", "b/own/2.png"],
        "c": ["c/3.png", "c/deep/4.png"],
    }
    theirs = torchvision.datasets.ImageFolder(str(data))
    assert {os.path.relpath(path, data) for path, _ in theirs.samples} == {n for names in found.values() for n in names}
    assert left_out(data) == {}


def test_links_in_circles_end(make, capsys):
    data = make("a/1.png", "b/1.png")
    (data / "a/self").symlink_to(".")
    (data / "b/up").symlink_to(data)
    (data / "root").symlink_to(data)
    assert listed(data) == {"a": ["a/1.png"], "b": ["b/1.png"]}
    assert f"3 {folders.AGAIN} (a/self, b/up, root)" in told(data, capsys)[0]


def test_many_folders_that_link_to_each_other_end(make):
    """In a tree of all paths without a repetition there would be some 10! of them."""
    data = make(*(f"{i}/{i}.png" for i in range(10)))
    for i in range(10):
        for j in range(10):
            (data / f"{i}/to-{j}").symlink_to(data / str(j))
    found = listed(data)
    assert len(found) == 10
    for label, names in found.items():
        assert {Path(name).name for name in names} == {f"{i}.png" for i in range(10)}, label
        assert len(names) < 1000


# ---- names ----

NAMES = [
    b"caf\xe9", "日本 語".encode(), b"[bold red]x[b]", b"<script>&\"'", b"$a$ $b", b"_under", b"new\nline",
    b"back\\slash",
    b"caf\\xe9", "\u202eright-to-left\u2028".encode(), b"x" * 250, b"{braces} %s",
]  # fmt: skip


def test_names_can_be_shown_and_told_apart():
    names = [shown(os.fsdecode(name)) for name in NAMES]
    assert len(set(names)) == len(NAMES)
    for name in names:
        assert name.encode().decode() == name and len(name.splitlines()) == 1
    assert names[:2] == ["caf\\xe9", "日本 語"] and "new\\nline" in names and "back\\\\slash" in names


@pytest.fixture(scope="module")
def named_folder(digits, tmp_path_factory) -> Path:
    """12 images in each of the classes NAMES, in a folder with a name that is neither text nor free of markup."""
    from PIL import Image

    root = tmp_path_factory.mktemp("names") / os.fsdecode(b"d\xe9pot [red] <i>")
    pixels, labels = digits
    for label, name in enumerate(NAMES):
        folder = root / os.fsdecode(name)
        folder.mkdir(parents=True)
        for number, image in enumerate(pixels[labels == label % 10][:12]):
            file = folder / os.fsdecode([b"%d.png", b"%d \xff[x].png", b"%d\n.png"][number % 3] % number)
            Image.fromarray(image).resize((16, 16)).save(file)
    (root / os.fsdecode(NAMES[0]) / "0.png").write_bytes(b"broken")
    return root


@pytest.fixture(scope="module")
def named_run(named_folder):
    """A run on it in a folder beside it, and what the command printed."""
    out = named_folder.parent / os.fsdecode(b"r\xfcn [red] <b>")
    return out, command("train", f"--data={os.fsdecode(named_folder)}", f"--out={out}", *TINY)


def test_names_reach_the_end_of_training_and_the_report(named_run, named_folder):
    out, done = named_run
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "trained encoder" in done.stdout
    assert "144 training images in 12 classes" in done.stdout
    page = (out / "report.html").read_bytes().decode()  # UTF-8
    assert "caf\\xe9" in page and "&lt;script&gt;" in page and "<script>&" not in page and "$a$ $b" in page
    assert "[bold red]x[b]" in page and "_under" in page
    done = command("report", out)
    assert done.returncode == 0, done.stderr


EVALUATIONS = """
import json, sys
from ifnd_fast.cli import evaluate
run, file, *tasks = sys.argv[1:]
for task in json.loads(tasks[0]):
    sys.argv = ["ifnd-fast-eval", task[0], run, *task[1:], "--json-file", file + task[0], "--workers", "0"]
    evaluate()
    print("done with", task[0])
"""


def test_names_reach_the_end_of_every_evaluation(named_run, tmp_path):
    """On a console that has no sign but ASCII."""
    out, _ = named_run
    tasks = [
        ["knn"], ["clusters"], ["false-negatives", "--plot", str(tmp_path / "plot.svg")], ["linear", "--fast"],
        ["svm", "--shots", "1", "--costs", "1"], ["semi", "--epochs", "1", "--shares", "0.5"],
        ["transfer", "--data", str(out.parent / os.fsdecode(b"d\xe9pot [red] <i>")), "--epochs", "20"],
    ]  # fmt: skip
    file = tmp_path / os.fsdecode(b"f\xefgures ")
    done = subprocess.run(
        [sys.executable, "-c", EVALUATIONS, out, file, json.dumps(tasks)], capture_output=True, text=True, timeout=280,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = {}
    for name, *_ in tasks:
        assert f"done with {name}" in done.stdout
        figures[name] = json.loads(file.with_name(file.name + name).read_bytes().decode())
    assert "caf\\xe9" in figures["svm"]["classes"] and len(figures["svm"]["classes"]) == len(NAMES)
    assert figures["knn"]["knn_top1"] == json.loads((out / "result.json").read_text())["knn_top1"]
    ids = next((out / "evaluate").glob("semi-*/labels-0.5/ids.txt")).read_bytes().decode().splitlines()
    assert len(ids) == figures["semi"]["labels"]["0.5"]["train_images"]
