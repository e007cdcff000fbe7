"""A cache gives what decoding gives, to every process, and another one where images or views are others."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ifnd_fast.config import DataConfig
from ifnd_fast.data import cache
from ifnd_fast.data.cache import cached, prepared
from ifnd_fast.data.images import Images, Subset
from ifnd_fast.data.loading import CentreDataset, EpochBatches, PairDataset, centre_loader, pair_loader
from ifnd_fast.data.processes import running
from ifnd_fast.data.sources import open_images
from ifnd_fast.runtime.errors import CommandError
from tests.forked import start


@pytest.fixture
def folder(flat_folder, tmp_path) -> Path:
    """Twelve pictures, one of another shape, one longer than it is wide, one with text in place of a picture."""
    root = tmp_path / "pictures"
    root.mkdir()
    for file in sorted(flat_folder.iterdir())[:10]:
        shutil.copy(file, root)
    noise = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "wide.png")
    Image.fromarray(noise[:1].repeat(3, axis=0)).save(root / "flat.png")
    (root / "broken.png").write_text("no picture")
    return root


def config_of(tmp_path: Path, **options) -> DataConfig:
    return DataConfig(image_size=16, **{"workers": 0, "cache": str(tmp_path / "cache"), **options})


def opened(folder: Path, config: DataConfig) -> Images:
    images = open_images(str(folder))
    assert images is not None
    return cached(images, config)


def loaded(images: Images, config: DataConfig) -> list[list]:
    """An epoch of pairs, and all centre views."""
    order = EpochBatches(len(images), 5, seed=0)
    with running(pair_loader(images, config, 3, order)) as pairs:
        found = list(pairs)
    with running(centre_loader(images, config, 4, range(len(images)))) as centres:
        return found + list(centres)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", ["loader", "device"])
def test_same_bits_with_and_without(augment, workers, folder, tmp_path):
    config = config_of(tmp_path, augment=augment, workers=workers)
    plain = loaded(open_images(str(folder)), dataclasses.replace(config, cache=""))
    made = loaded(opened(folder, config), config)
    for file in folder.iterdir():  # from here on nothing is decoded
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        file.write_bytes(b"\0" * file.stat().st_size)
        os.utime(file, ns=times)
    again = loaded(opened(folder, config), config)
    for batches in (made, again):
        assert len(batches) == len(plain)
        for batch, wanted in zip(batches, plain, strict=True):
            for item, other in zip(batch, wanted, strict=True):
                assert torch.equal(item, other) if isinstance(item, torch.Tensor) else item == other
    assert any("picture" in reason for *_, reasons in again for reason in reasons), "the unreadable one is not told of"


def test_changed_images_are_noticed(folder, tmp_path):
    config = config_of(tmp_path)
    first = CentreDataset(opened(folder, config), config)[0][0]
    file = open_images(str(folder)).files[0]
    pixels = 255 - np.asarray(Image.open(file))
    size, times = file.stat().st_size, file.stat()
    Image.fromarray(pixels).save(file)
    file.write_bytes(file.read_bytes()[:size].ljust(size, b"\0"))  # of the same name and size
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000))
    assert not torch.equal(CentreDataset(opened(folder, config), config)[0][0], first)
    images = opened(folder, config)
    assert torch.equal(
        CentreDataset(cached(Subset(images.images, np.array([3, 1])), config), config)[1][0],
        CentreDataset(images, config)[1][0],
    )


def test_a_damaged_cache_is_made_anew(folder, tmp_path):
    config = config_of(tmp_path)
    wanted = CentreDataset(opened(folder, config), config)[2][0]
    pixels, index = (next(Path(config.cache).glob(f"centre-*.{ending}")) for ending in ("pixels", "npz"))
    for damaged in (pixels, index):
        damaged.write_bytes(damaged.read_bytes()[:-7])
        assert torch.equal(CentreDataset(opened(folder, config), config)[2][0], wanted)


def test_a_process_that_is_not_forked_maps_the_file(folder, tmp_path):
    config = config_of(tmp_path)
    dataset = CentreDataset(opened(folder, config), config)
    packed = pickle.dumps(dataset.images)
    assert len(packed) < 5_000 and torch.equal(pickle.loads(packed).image(4), dataset[4][0])


def test_images_in_memory_need_none(tmp_path):
    config = config_of(tmp_path)
    digits = open_images("demo")
    assert cached(digits, config) is digits
    half = Subset(digits, np.arange(10))
    assert cached(half, config) is half and not Path(config.cache).exists()


@pytest.mark.parametrize("augment, said", [("device", "2.25e-05"), ("loader", "1.17e-05")])
def test_more_than_the_limit_is_refused_and_leaves_nothing(augment, said, folder, tmp_path):
    config = config_of(tmp_path, augment=augment, cache_limit=1e-6)
    with pytest.raises(CommandError, match=f"take about {said} GB decoded, --cache-limit is 1e-06: raise it"):
        PairDataset(opened(folder, config), config, 0)
    assert not [file for file in Path(config.cache).iterdir() if file.name != ".lock"]


def test_none_that_can_be_read(folder, tmp_path):
    for file in folder.iterdir():
        file.write_text("no picture")
    config = config_of(tmp_path)
    with pytest.raises(CommandError, match="none of 13 images can be read: .*000.png: no picture"):
        CentreDataset(opened(folder, config), config)


def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    config = config_of(tmp_path, cache=str(tmp_path / "file" / "cache"))
    with pytest.raises(CommandError, match="--cache .*can't be written"):
        CentreDataset(opened(folder, config), config)


def test_one_process_makes_it_and_others_wait(folder, tmp_path, monkeypatch):
    config = config_of(tmp_path)
    code = (
        "from tests.data.test_cache import *\n"
        f"config = DataConfig(image_size=16, workers=0, cache={config.cache!r})\n"
        f"dataset = CentreDataset(opened(Path({str(folder)!r}), config), config)\n"
        "print(dataset[1][0].float().mean().item())"
    )
    processes = [start(code) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert outputs[0][-1] == outputs[1][-1]
    assert sum("cache of 13 images" in line for output in outputs for line in output) == 1
    monkeypatch.setattr(cache, "_write", lambda *_: pytest.fail("made again"))
    images = opened(folder, config)
    assert (
        prepared(images, "centre-16", lambda _: torch.zeros(0), 16)[0]
        is prepared(images, "centre-16", lambda _: torch.zeros(0), 16)[0]
    )
