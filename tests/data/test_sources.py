"""Where images come from: built-in sets, folders, and what is held out of them."""

from __future__ import annotations

import numpy as np
import pytest

from ifnd_fast.config import DataConfig
from ifnd_fast.data.sources import open_for_run, open_images
from ifnd_fast.runtime.errors import UsageError


def test_demo_data_is_4000_and_1000_digits_without_overlap():
    train, test = open_images("demo"), open_images("demo", "test")
    assert (len(train), len(test)) == (4000, 1000)
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10
    seen = {train.pixels[i].tobytes() for i in range(len(train))}
    assert sum(test.pixels[i].tobytes() in seen for i in range(len(test))) == 0


def test_folder_of_classes(digit_folder):
    images = open_images(str(digit_folder))
    assert len(images) == 120
    assert images.class_names == [f"digit-{label}" for label in range(5)]
    assert np.bincount(images.labels).tolist() == [24] * 5
    assert images.image(0).mode == "RGB" and images.image(0).size == (16, 16)
    assert open_images(str(digit_folder), "test") is None


def test_flat_folder_has_no_labels(flat_folder):
    images = open_images(str(flat_folder))
    assert len(images) == 120 and images.labels is None and images.class_names is None


def test_train_and_val_folders(digit_folder, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(digit_folder)
    assert len(open_images(str(tmp_path))) == len(open_images(str(tmp_path), "test")) == 120


def test_held_out_images_are_a_share_of_each_class_always_the_same(digit_folder):
    config = DataConfig(data=str(digit_folder), hold_out=0.25)
    train, held = open_for_run(config)
    assert np.bincount(train.labels).tolist() == [18] * 5 and np.bincount(held.labels).tolist() == [6] * 5
    names = [{images.name(i) for i in range(len(images))} for images in (train, held)]
    assert len(names[0] | names[1]) == 120 and not names[0] & names[1]
    assert all(f"digit-{held.labels[i]}" in held.name(i) for i in range(len(held)))
    assert np.array_equal(open_for_run(config)[1].indices, held.indices)
    assert np.asarray(held.image(0)).shape == (16, 16, 3)


def test_held_out_images_without_labels(flat_folder):
    train, held = open_for_run(DataConfig(data=str(flat_folder), hold_out=0.1))
    assert (len(train), len(held), held.labels) == (108, 12, None)


def test_holding_out_nothing_or_all_is_refused(digit_folder):
    with pytest.raises(UsageError, match="--hold-out"):
        open_for_run(DataConfig(data=str(digit_folder), hold_out=1.0))
    assert open_for_run(DataConfig(data=str(digit_folder)))[1] is None


def test_classes_are_the_same_in_train_and_val_though_folders_are_missing(digit_folder, tmp_path):
    for split, labels in (("train", (0, 1, 3, 4)), ("val", (1, 2, 4))):
        (tmp_path / split).mkdir()
        for label in labels:
            (tmp_path / split / f"digit-{label}").symlink_to(digit_folder / f"digit-{label}")
    train, val = open_for_run(DataConfig(data=str(tmp_path)))
    assert train.class_names == ["digit-0", "digit-1", "digit-3", "digit-4"]
    assert val.class_names == [*train.class_names, "digit-2"]
    for images in (train, val):
        assert all(images.class_names[images.labels[i]] in images.name(i) for i in range(len(images)))


@pytest.mark.parametrize("make", [lambda root: root / "absent", lambda root: root])
def test_missing_and_empty_folders_are_refused_by_name(make, tmp_path):
    with pytest.raises(UsageError, match=str(tmp_path)):
        open_images(str(make(tmp_path)))
