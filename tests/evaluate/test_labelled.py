"""Labelled images: splits that number classes alike, shares and lists of labels."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from ifnd_fast.config import DataConfig
from ifnd_fast.data.images import ListImages
from ifnd_fast.data.sources import open_images
from ifnd_fast.evaluate.labelled import balanced_share, image_ids, open_labelled, read_ids
from ifnd_fast.runtime.errors import UsageError


def opened(folder):
    return open_labelled(DataConfig(data=str(folder)))


def test_a_class_without_test_images_does_not_shift_the_others(class_folders, tmp_path):
    shutil.copytree(class_folders, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val" / "n00000001")
    _, test = opened(tmp_path / "data")
    assert np.unique(test.labels).tolist() == [0, 2, 3, 4, 5] and len(test.class_names) == 6
    assert all(f"n{label:08d}" in test.name(index) for index, label in enumerate(test.labels))


def test_a_test_class_that_training_lacks_is_named(class_folders, tmp_path):
    shutil.copytree(class_folders, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "train" / "n00000003")
    with pytest.raises(UsageError, match="training lacks 1 classes of the test part: n00000003"):
        opened(tmp_path / "data")


def test_every_tenth_image_is_held_out(digit_folder):
    train, test = opened(digit_folder)
    assert len(train) == 108 and len(test) == 12
    names = {images.name(index) for images in (train, test) for index in range(len(images))}
    assert len(names) == 120 and test.name(0).endswith("digit-0/009.png") and test.image(0).size == (16, 16)


def test_unlabelled_few_and_one_class_are_refused(flat_folder, digit_folder, tmp_path):
    with pytest.raises(UsageError, match="needs labels"):
        opened(flat_folder)
    shutil.copytree(digit_folder / "digit-0", tmp_path / "one" / "digit-0")
    with pytest.raises(UsageError, match="of one class"):
        opened(tmp_path / "one")
    for label in (0, 1):
        (tmp_path / "few" / str(label)).mkdir(parents=True)
        shutil.copy(digit_folder / f"digit-{label}" / "000.png", tmp_path / "few" / str(label))
    with pytest.raises(UsageError, match="2 images are too few"):
        opened(tmp_path / "few")


def test_shares_are_balanced_nested_and_always_the_same():
    labels = np.repeat([0, 1, 2], [1000, 500, 7])
    tenth, hundredth = balanced_share(labels, 0.1), balanced_share(labels, 0.01)
    assert np.bincount(labels[tenth]).tolist() == [50, 50, 7] and np.bincount(labels[hundredth]).tolist() == [5, 5, 5]
    assert set(hundredth) < set(tenth) and np.array_equal(tenth, balanced_share(labels, 0.1))
    assert hundredth[:5].tolist() == [60, 433, 497, 883, 953]  # fixed: figures of other days are of the same images
    assert np.bincount(labels[balanced_share(labels, 1e-9)]).tolist() == [1, 1, 1]
    assert len(balanced_share(labels, 1.0)) == 502 + 500 + 7


def test_lists_name_images_as_simclr_does(class_folders, tmp_path):
    train, _ = opened(class_folders)
    file = tmp_path / "1percent.txt"
    file.write_text("n00000002_7.png\nn00000000_3.png\n\n")
    rows = read_ids(file, train)
    assert [train.files[row].name for row in rows] == ["n00000000_3.png", "n00000002_7.png"]
    file.write_text("n00000002_7.png\nn9_1.JPEG\nn9_2.JPEG\n")
    with pytest.raises(UsageError, match=r"2 of 3 names .* like n00000000_0.png: n9_1.JPEG, n9_2.JPEG"):
        read_ids(file, train)
    file.write_text("\n")
    with pytest.raises(UsageError, match="names no images"):
        read_ids(file, train)
    with pytest.raises(UsageError, match="absent"):
        read_ids(tmp_path / "absent", train)


def test_files_of_one_name_are_told_apart_by_their_folder(digit_folder):
    ids = image_ids(open_images(str(digit_folder)))
    assert ids[0] == "digit-0/000.png" and len(set(ids)) == 120


def test_lists_of_paths_and_classes(class_folders, tmp_path):
    file = tmp_path / "list.csv"
    file.write_text("n00000001/n00000001_0.png 1\nn00000005/n00000005_3.png 5\n")
    images = ListImages(file, class_folders / "train")
    assert images.labels.tolist() == [1, 5] and images.image(1).size == (16, 16) and images.class_names is None


@pytest.fixture
def pictures(class_folders, tmp_path):
    """A folder with a few images of awkward names."""
    picture = next(class_folders.rglob("*.png")).read_bytes()
    for name in ("a.png", "b c.png", "sub/d  e.png", "#f.png", "é.png", os.fsdecode(b"\xe9.png"), "1 2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    return tmp_path


LISTS = [
    (b"\xef\xbb\xbfa.png 1\n", ["a.png"], [1]),
    ("a.png 1\né.png 2\n".encode("utf-16"), ["a.png", "é.png"], [1, 2]),
    (b"a.png 1\r\nb c.png 2\r\n", ["a.png", "b c.png"], [1, 2]),
    (b"a.png 1\rb c.png 2", ["a.png", "b c.png"], [1, 2]),
    (b"\n  \na.png\t1\n\n\t\nb c.png \t 2  \n", ["a.png", "b c.png"], [1, 2]),
    (b"sub/d  e.png 0\n1 2 3\n", ["sub/d  e.png", "1 2"], [0, 3]),
    (b"# made by hand\n#comment 7\n#f.png 4\n# \na.png 1\n", ["#f.png", "a.png"], [4, 1]),
    (b"\xe9.png 1\n\xc3\xa9.png 2\n", [os.fsdecode(b"\xe9.png"), "é.png"], [1, 2]),
    (b"a.png 007\na.png 7\na.png +7\n", ["a.png"], [7]),
    (b"a.png 1000000\n", ["a.png"], [1_000_000]),
]


@pytest.mark.parametrize("text, names, labels", LISTS)
def test_lists_as_editors_and_spreadsheets_write_them(text, names, labels, pictures):
    (pictures / "list.txt").write_bytes(text)
    images = ListImages(pictures / "list.txt", pictures)
    assert [file.relative_to(pictures) for file in images.files] == [Path(name) for name in names]
    assert images.labels.tolist() == labels and images.labels.dtype == np.int64 and images.image(0).size == (16, 16)
    assert images.listing().names == names and (images.listing().sizes > 0).all()


def test_lists_with_whole_paths(pictures, tmp_path_factory):
    file = tmp_path_factory.mktemp("list") / "list.txt"
    file.write_text(f"{pictures}/b c.png 3\n")
    assert ListImages(file, file.parent).image(0).size == (16, 16)


def test_what_a_list_repeats_or_lacks_is_said(pictures, capsys):
    (pictures / "list.txt").write_text("a.png 1\na.png 1\ngone.png 3\nb c.png 2\n1 2 0\nlost.png 3")
    images = ListImages(pictures / "list.txt", pictures)
    assert images.labels.tolist() == [1, 2, 0]
    said = capsys.readouterr().err
    assert f"list.txt, line 3: {pictures}/gone.png is missing, and 1 others of the 5 images" in said
    assert "1 lines name an image that was named before" in said


def test_a_list_of_names_as_another_system_writes_it(class_folders, tmp_path):
    train, _ = opened(class_folders)
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbf# ten\r\nn00000002_7.png\r\n\r\n n00000000_3.png \r\n")
    assert [train.files[row].name for row in read_ids(tmp_path / "ids.txt", train)] == [
        "n00000000_3.png", "n00000002_7.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, words",
    [
        ("a.png 0\nb.png\n", r"line 2: wanted .*'b.png'"),
        ("a.png -1\n", "line 1"),
        ("", "names no images"),
        ("a.png 0\n", "a.png is missing: --image-root"),
        ("\n\na.png 0\nb.png 1\nc.png 2\n", r"line 3: .*a.png is missing: --image-root.*\(3 of 3 images are"),
        ("a.png 9223372036854775808\n", "line 1: the class must be .* to 1,000,000, got 9223372036854775808"),
        ("a.png " + 5000 * "9", r"from 0 to 1,000,000, got 99999999999999999999\.\.\."),
        ("a.png 1000001\n", "from 0 to 1,000,000, got 1000001"),
        ("# c\na.png -1\n", "line 2: the class must be a number from 0 to 1,000,000, got -1"),
        ("a.png -99999999999999999999\n", "line 1: the class must be a number from 0"),
        ("a.png cat\n", "line 1: wanted .*'a.png cat'"),
        ("a.png 1.0\n", "line 1: wanted"),
        ("a.png 1e3\n", "line 1: wanted"),
        ("a.png ٣\n", "line 1: wanted"),
        ("a.png,1\n", "line 1: wanted .*between them there must be a space or a tab"),
        ("7\n", "line 1: wanted .*'7'"),
        ("a.png 0\nb.png 1\na.png 2\n", "line 3: a.png is of class 2, but of class 0 in line 1"),
        ("# only\n#comments 3\n", "names no images"),
        ("a\0.png 1\n", "zero bytes"),
        ("x" * 5000 + ".png 1\n", "is missing: --image-root"),
    ],
)
def test_bad_lists_are_refused(text, words, tmp_path):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UsageError, match=words):
        ListImages(tmp_path / "list.txt", tmp_path)
