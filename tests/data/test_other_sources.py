"""Images of arrays, tar shards and other packages' data sets: the same images, labels and identity from each, and bad
ones as in folders."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil

import numpy as np
import pytest
import torchvision
from PIL import Image

from ifnd_fast.cli import parse_train
from ifnd_fast.config import DataConfig, full_data
from ifnd_fast.data import identity
from ifnd_fast.data.arrays import as_pixels
from ifnd_fast.data.found import listings
from ifnd_fast.data.hugging_face import HuggingFaceImages
from ifnd_fast.data.images import attempt
from ifnd_fast.data.shards import find_shards
from ifnd_fast.data.sources import open_for_run, open_images
from ifnd_fast.data.torchvision_sets import TorchvisionImages
from ifnd_fast.runtime.errors import CommandError, UsageError
from ifnd_fast.training.trainer import Trainer
from tests.conftest import TINY

N, TESTS, BROKEN = 96, 24, 7  # images to train on and to measure with, and one of the former that can't be read


@pytest.fixture(scope="module")
def digits16(digits) -> tuple[np.ndarray, np.ndarray]:
    """(120, 16, 16) and their labels."""
    pixels, labels = digits
    return pixels[: N + TESTS].repeat(2, axis=1).repeat(2, axis=2), labels[: N + TESTS]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def save_npz(root, pixels, labels) -> str:
    np.savez(
        root / "digits.npz", x_train=pixels[:N, None], y_train=labels[:N, None], x_test=pixels[N:], y_test=labels[N:]
    )
    return str(root / "digits.npz")


def save_shards(root, pixels, labels) -> str:
    """As webdataset writes them: 40 samples a shard, each with its class and a remark."""
    webdataset = pytest.importorskip("webdataset")
    for part, numbers in (("train", range(N)), ("val", range(N, N + TESTS))):
        with webdataset.ShardWriter(str(root / f"digits-{part}-%03d.tar"), maxcount=40, verbose=0) as writer:
            for n in numbers:
                content = b"no picture" if n == BROKEN else png(pixels[n])
                writer.write({"__key__": f"a.b/{n:04d}", "cls": int(labels[n]), "json": {"n": n}, "png": content})
    return f"wds:{root}"


def save_datasets(root, pixels, labels) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({
        "label": datasets.ClassLabel(names=[f"digit {n}" for n in range(10)]), "image": datasets.Image(),
    })  # fmt: skip
    contents = [b"no picture" if n == BROKEN else png(image) for n, image in enumerate(pixels)]
    rows = [{"image": {"bytes": content, "path": None}, "label": int(label)}
            for content, label in zip(contents, labels, strict=True)]  # fmt: skip
    parts = {"train": rows[:N], "validation": rows[N:]}
    made = {part: datasets.Dataset.from_list(own, features=features) for part, own in parts.items()}
    datasets.DatasetDict(made).save_to_disk(str(root / "saved"))
    return f"hf:{root}/saved"


SAVED = {"npz": save_npz, "wds": save_shards, "hf": save_datasets}


@pytest.fixture(scope="module")
def saved(digits16, tmp_path_factory) -> dict[str, str]:
    """--data by the kind of source."""
    return {kind: save(tmp_path_factory.mktemp(kind), *digits16) for kind, save in SAVED.items()}


@pytest.mark.parametrize("kind", SAVED)
def test_images_labels_and_parts_are_those_that_were_saved(kind, saved, digits16):
    pixels, labels = digits16
    train, test = open_for_run(DataConfig(data=saved[kind]))
    assert (len(train), len(test)) == (N, TESTS)
    assert np.array_equal(train.labels, labels[:N]) and np.array_equal(test.labels, labels[N:])
    assert train.class_names == ([f"digit {n}" for n in range(10)] if kind == "hf" else None)
    for images, first in ((train, 0), (test, N)):
        for n in range(len(images)):
            image, reason = attempt(images, n, np.asarray)
            if (images is train and n == BROKEN) and kind != "npz":
                assert reason == "no picture in a format that can be read here" and str(BROKEN) in images.name(n)
            else:
                assert image.shape == (16, 16, 3) and np.array_equal(image[..., 1], pixels[first + n]), (kind, n)
    again = pickle.loads(pickle.dumps(train))  # as a loading process gets it that is not forked
    assert np.array_equal(np.asarray(again.image(3)), np.asarray(train.image(3)))


@pytest.mark.parametrize("kind", SAVED)
def test_identity_goes_along_when_the_data_move_and_shows_what_changed(kind, saved, digits16, tmp_path):
    pixels, labels = digits16
    known = identity.identity_of(listings(*open_for_run(DataConfig(data=saved[kind]))))
    SAVED[kind](tmp_path, pixels, labels)
    moved = saved[kind].partition(":")[0] + ":" + str(tmp_path / "saved" if kind == "hf" else tmp_path)
    moved = str(tmp_path / "digits.npz") if kind == "npz" else moved
    assert identity.identity_of(listings(*open_for_run(DataConfig(data=moved)))) == known
    shutil.rmtree(tmp_path / "saved", ignore_errors=True)
    SAVED[kind](tmp_path, pixels, (labels + 1) % 10)
    changed = identity.identity_of(listings(*open_for_run(DataConfig(data=moved))))
    assert changed.keys() == known.keys() and all(changed[part] != known[part] for part in known)


@pytest.mark.parametrize("kind", ["wds", "hf"])
def test_a_run_trains_leaves_out_what_is_broken_and_goes_on(kind, saved, tmp_path, capsys):
    out = tmp_path / "run"
    config = parse_train(["--out", str(out), "--data", saved[kind], *TINY, "--epochs", "2", "--workers", "1"])
    trainer = Trainer(config)
    with trainer.open():
        next(trainer.epochs())
    trainer = Trainer(parse_train(["--resume", "--out", str(out)]))
    with trainer.open():
        trainer.fit()
    result = json.loads((out / "result.json").read_text())
    assert result["knn_top1"] > 10 and [one["reason"][:10] for one in result["unreadable"]] == ["no picture"]
    assert "96 training images in 10 classes" in capsys.readouterr().out
    with pytest.raises(UsageError, match="does not hold the images that"):
        Trainer(parse_train(["--resume", "--out", str(out), "--data", saved["npz"]]))


# ---- arrays ----


def test_numpy_arrays_of_all_layouts(digits16, tmp_path):
    pixels = digits16[0][:10]
    np.save(tmp_path / "grey.npy", pixels)
    images = open_images(str(tmp_path / "grey.npy"))
    assert isinstance(images.pixels, np.memmap) and images.labels is None and len(images) == 10
    assert open_images(str(tmp_path / "grey.npy"), "test") is None
    colours = np.stack([pixels, pixels // 2, pixels // 4], axis=1)
    for array in (colours, np.moveaxis(colours, 1, -1), colours.astype(np.int64), colours / 255, colours.astype(float),
                  colours.astype(np.uint16) * 257):  # fmt: skip
        got = as_pixels(array, "it")
        assert got.dtype == np.uint8 and np.array_equal(got, np.moveaxis(colours, 1, -1)), array.dtype
    np.savez(tmp_path / "plain.npz", images=pixels, labels=np.arange(10))
    images = open_images(str(tmp_path / "plain.npz"))
    assert images.labels.tolist() == list(range(10)) and open_images(str(tmp_path / "plain.npz"), "test") is None


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"images": np.zeros((4, 9))}, r"images must be \(N, H, W\), .*, got \(4, 9\)"),
        ({"images": np.zeros((4, 5, 5, 2))}, r"got \(4, 5, 5, 2\)"),
        ({"images": np.full((4, 5, 5), 300.0)}, "values from 300 to 300 of float64: save images as uint8"),
        ({"images": np.full((4, 5, 5), -1)}, "values from -1 to -1 of int64"),
        ({"images": np.array([[[0.0]], [[np.nan]]])}, "image 1 holds values that are not finite"),
        ({"images": np.array([["a"]], dtype=object)}, "can't be read: Object arrays"),
        ({"images": np.full((2, 3, 3), "a")}, "images must be numbers"),
        ({"images": np.zeros((2, 3, 3)), "labels": np.zeros(3, int)}, "labels must be 2 integers from 0, got int64 of"),
        ({"images": np.zeros((2, 3, 3)), "labels": np.array([0, -1])}, "labels must be 2 integers from 0"),
        ({"a": np.zeros((2, 3, 3)), "b": np.zeros((2, 3, 3))}, r"which of its arrays \(a, b\) are the train images"),
    ],
)
def test_arrays_that_are_no_images_are_refused(arrays, words, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match=words):
        open_images(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_a_broken_file_of_arrays_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(UsageError, match=f"{name} can't be read"):
        open_images(str(tmp_path / name))


# ---- shards ----


def test_which_shards_are_meant(saved, tmp_path):
    root = saved["wds"].removeprefix("wds:")
    names = [f"digits-train-{n:03d}.tar" for n in range(3)]
    for pattern in (root, f"{root}/digits-train-{{000..002}}.tar", f"{root}/*train*.tar"):
        assert [shard.name for shard in find_shards(pattern, "train")[0]] == names
    assert [shard.name for shard in find_shards(root, "test")[0]] == ["digits-val-000.tar"]
    assert find_shards(f"{root}/*.tar", "test") is None
    assert len(open_images(f"{root}/{names[0]}")) == 40
    with pytest.raises(UsageError, match="no .tar files there"):
        open_images(f"wds:{tmp_path}")
    with pytest.raises(UsageError, match="no images below it .*give them as wds:FOLDER"):
        open_images(root)
    with pytest.raises(UsageError, match=r"2 of 4 shards are missing: digits-train-003.tar, digits-train-004.tar$"):
        find_shards(f"{root}/digits-train-{{001..004}}.tar", "train")
    assert full_data("wds:a/{0..3}.tar").startswith("wds:/") and full_data("hf:ylecun/mnist") == "hf:ylecun/mnist"


def test_samples_without_an_image_or_a_class(tmp_path, capsys):
    webdataset = pytest.importorskip("webdataset")
    picture = png(np.zeros((4, 4), dtype=np.uint8))
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        writer.write({"__key__": "a", "txt": "no image"})
        writer.write({"__key__": "b", "seg.png": picture, "png": picture, "cls": 3})
        writer.write({"__key__": "c", "png": picture})
    images = open_images(str(tmp_path / "x.tar"))
    assert images.names == ["b.png", "c.png"] and images.labels is None
    assert "1 samples without an image" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda content: content[: len(content) // 2 + 700], "cut off|can't be read"),
        (lambda content: gzip.compress(content), "can't be read: .*not compressed"),
        (lambda content: b"", "can't be read|no images in 1 shards"),
    ],
)
def test_a_broken_shard_is_named(damage, words, saved, tmp_path):
    content = (open(f"{saved['wds'].removeprefix('wds:')}/digits-train-001.tar", "rb")).read()
    (tmp_path / "bad.tar").write_bytes(damage(content))
    with pytest.raises(UsageError, match=words):
        open_images(f"wds:{tmp_path}")


# ---- Hugging Face ----


def test_a_folder_of_classes_by_datasets_is_files_of_their_own(digit_folder):
    """`load_dataset` of a folder of images: rows hold paths alone."""
    datasets = pytest.importorskip("datasets")
    files = sorted(digit_folder.rglob("*.png"))[:30]
    rows = {"img": [str(file) for file in files], "labels": [int(file.parent.name[-1]) for file in files]}
    images = HuggingFaceImages(datasets.Dataset.from_dict(rows).cast_column("img", datasets.Image()))
    assert images.labels.tolist() == rows["labels"] and images.class_names is None
    assert images.listing().sizes.tolist() == [file.stat().st_size for file in files]
    assert np.array_equal(np.asarray(images.image(29)), np.asarray(Image.open(files[29]).convert("RGB")))
    chosen = HuggingFaceImages(images.dataset.select([5, 2]).cast_column("img", datasets.Image()))
    assert chosen.listing().sizes.tolist() == [files[n].stat().st_size for n in (5, 2)]


def test_what_datasets_can_not_load(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(UsageError, match="no column of images, but text"):
        open_images(f"hf:{tmp_path}/text")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(CommandError, match="can't be loaded"):
        open_images(f"hf:{tmp_path}")


# ---- torchvision ----


def test_torchvisions_data_sets(digit_folder, tmp_path):
    images = open_images("torchvision:FakeData", data_root=tmp_path)
    assert len(images) == 1000 and images.labels is None and images.image(3).size == (224, 224)
    assert open_images("torchvision:FakeData", "test", tmp_path) is None
    folder = TorchvisionImages(torchvision.datasets.ImageFolder(str(digit_folder)))
    plain = open_images(str(digit_folder))
    assert np.array_equal(folder.labels, plain.labels) and folder.class_names == plain.class_names
    assert folder.listing().names == plain.listing().names
    assert np.array_equal(np.asarray(folder.image(50)), np.asarray(plain.image(50)))


def test_torchvisions_cifar_as_it_lies_on_the_disk(digits16, tmp_path, monkeypatch):
    """Its own format, written here; what torchvision would download is not looked for."""
    kind = torchvision.datasets.CIFAR10
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels = np.zeros((20, 3072), dtype=np.uint8)
    pixels[:, 0] = np.arange(20)
    for name, _ in (*kind.train_list, *kind.test_list):
        content = {"data": pixels, "labels": [n % 10 for n in range(20)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({"label_names": [f"c{n}" for n in range(10)]}))
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    train, test = open_for_run(DataConfig(data="torchvision:CIFAR10", data_root=tmp_path))
    assert (len(train), len(test)) == (100, 20) and train.class_names == [f"c{n}" for n in range(10)]
    assert np.asarray(test.image(7))[0, 0].tolist() == [7, 0, 0] and test.labels[7] == 7
    assert train.listing().content and train.listing().sizes.tolist() == [3072] * 100


@pytest.mark.parametrize("name", ["CIFAR99", "VisionDataset", "folder"])
def test_what_torchvision_does_not_have(name, tmp_path):
    with pytest.raises(UsageError, match=f"--data torchvision:{name}"):
        open_images(f"torchvision:{name}", data_root=tmp_path)
