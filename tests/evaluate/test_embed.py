"""Every image's features and clusters as a file: of what, resumed, by several ranks, and in both formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from ifnd_fast.config import DataConfig
from ifnd_fast.data import features
from ifnd_fast.data.sources import open_images
from ifnd_fast.evaluate import embedding_file, feature_blocks
from ifnd_fast.evaluate.backbone import load_backbone
from ifnd_fast.evaluate.cluster_images import LevelOptions
from ifnd_fast.evaluate.embed import embed
from ifnd_fast.evaluate.subject import Options
from ifnd_fast.ops import assign_clusters
from ifnd_fast.runtime.compute import Compute
from ifnd_fast.runtime.errors import CommandError, UsageError
from tests.forked import command, run_ranks

LEVELS = LevelOptions(levels=(3, 8))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """240 training images are 5 blocks, 120 test images 3."""
    monkeypatch.setattr(feature_blocks, "BATCH", 25)
    monkeypatch.setattr(feature_blocks, "BATCHES", 2)


@pytest.fixture
def options(untrained_run, class_folders) -> Options:
    return Options(untrained_run, data=str(class_folders), device="cpu")


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def test_the_file_holds_what_an_evaluation_sees(options, class_folders, untrained_run, tmp_path):
    out, options.json_file = tmp_path / "all.npz", tmp_path / "figures.json"
    embed(options, LEVELS, out)
    found = load(out)
    images = {part: open_images(str(class_folders), part) for part in ("train", "test")}
    network, view = load_backbone(untrained_run).network, DataConfig(image_size=16, workers=0)
    at = Compute(torch.device("cpu"))
    vectors = torch.cat([features.extract(network, images[part], view, at)[0] for part in images])
    torch.testing.assert_close(torch.from_numpy(found["vectors"]), vectors)
    assert found["parts"].tolist() == ["train"] * 240 + ["test"] * 120
    assert found["names"].tolist() == [*images["train"].listing().names, *images["test"].listing().names]
    assert found["names"][0] == "n00000000/n00000000_0.png" and found["class_names"].tolist()[1] == "n00000001"
    assert found["labels"].tolist() == [*images["train"].labels, *images["test"].labels]
    assert found["levels"].tolist() == [3, 8] and found["clusters"].shape == found["confidence"].shape == (360, 2)
    units = normalize(vectors)
    for level in range(2):  # the labels are those of the clusters' centres, and so is the confidence
        labels = torch.from_numpy(found["clusters"][:, level]).long()
        assert len(labels.unique()) == found["levels"][level]
        centres = torch.stack([units[labels == label].mean(0) for label in labels.unique()])
        near, confidence = assign_clusters(units, normalize(centres), temperature=0.2)
        same = near == labels
        assert same.float().mean() > 0.9  # k-means may not have converged
        assert np.allclose(found["confidence"][same, level], confidence[same], atol=0.02)
    figures = json.loads(options.json_file.read_text())
    assert figures["images"] == 360 and figures["levels"] == [3, 8] and figures["file"] == str(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.npz", "figures.json"]


def test_what_was_stopped_goes_on_to_the_same_file(options, tmp_path, monkeypatch, capsys):
    embed(options, LEVELS, tmp_path / "whole.npz")
    out, written, write = tmp_path / "stopped.npz", [], feature_blocks.FeatureBlocks._write

    def stop_at_the_fourth(path, block):
        if len(written) == 3:
            raise CommandError("stopped")
        written.append(path.name)
        write(path, block)

    monkeypatch.setattr(feature_blocks.FeatureBlocks, "_write", staticmethod(stop_at_the_fourth))
    with pytest.raises(CommandError, match="stopped"):
        embed(options, LEVELS, out)
    assert not out.exists() and len(list((tmp_path / "stopped.npz.blocks").glob("train-*.npz"))) == 3
    options.image_size = 20
    with pytest.raises(UsageError, match="begun otherwise:\n.*16.*20\n.*another --out, or delete"):
        embed(options, LEVELS, out)
    options.image_size = None
    written.clear()
    monkeypatch.setattr(feature_blocks.FeatureBlocks, "_write", staticmethod(lambda *a: (written.append(a), write(*a))))
    embed(options, LEVELS, out)
    assert len(written) == 5 and "going on: 3 of 5 blocks of train images" in capsys.readouterr().out
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    with pytest.raises(UsageError, match="is there already"):
        embed(options, LEVELS, out)


RANKS = """
from ifnd_fast.evaluate import feature_blocks
feature_blocks.BATCH, feature_blocks.BATCHES = 25, 2
from ifnd_fast.cli import embed
embed()
"""


def test_ranks_change_nothing(untrained_run, class_folders, tmp_path):
    script, files = tmp_path / "embed.py", []
    script.write_text(RANKS)
    for ranks in (1, 2, 4):
        out = tmp_path / f"{ranks}.npz"
        done = run_ranks(ranks, script, untrained_run, "--data", class_folders, "--out", out, "--levels", 3, 8)
        assert done.returncode == 0, done.stderr[-3000:]
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]


def test_parquet_by_arrow_and_pandas(options, tmp_path):
    pandas, parquet = pytest.importorskip("pandas"), pytest.importorskip("pyarrow.parquet")
    embed(options, LEVELS, tmp_path / "all.npz", part="test")
    embed(options, LEVELS, tmp_path / "all.parquet", part="test")
    arrays, table = load(tmp_path / "all.npz"), parquet.read_table(tmp_path / "all.parquet")
    assert table.column_names == [
        "name", "part", "vector", "label", "class", "cluster_3", "confidence_3", "cluster_8", "confidence_8",
    ]  # fmt: skip
    frame = pandas.read_parquet(tmp_path / "all.parquet")
    assert np.array_equal(np.stack(frame["vector"]), arrays["vectors"]) and set(frame["part"]) == {"test"}
    assert frame["name"].tolist() == arrays["names"].tolist() and frame["class"][119] == "n00000005"
    assert np.array_equal(frame[["cluster_3", "cluster_8"]], arrays["clusters"])
    assert np.array_equal(frame[["confidence_3", "confidence_8"]], arrays["confidence"])


def test_unlabelled_images_one_of_them_broken(untrained_run, flat_folder, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for file in sorted(flat_folder.iterdir())[:30]:
        (data / file.name).write_bytes(file.read_bytes() if file.name != "007.png" else b"broken")
    options, no_clusters = Options(untrained_run, data=str(data), device="cpu"), LevelOptions(levels=())
    embed(options, no_clusters, tmp_path / "out.npz")
    found = load(tmp_path / "out.npz")
    assert len(found["names"]) == 29 and "007.png" not in found["names"] and set(found["labels"]) == {-1}
    assert found["clusters"].shape == (29, 0) and "unreadable image skipped" in capsys.readouterr().err
    options.strict = True
    with pytest.raises(CommandError, match="--strict.*007.png"):
        embed(options, no_clusters, tmp_path / "strict.npz")


def test_wrong_options_are_told_before_any_work(options, tmp_path, monkeypatch):
    for out, words in (("a.csv", r"ends in .npz or .parquet"), (".", "is a folder")):
        with pytest.raises(UsageError, match=words):
            embed(options, LEVELS, tmp_path / out)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'ifnd-fast\[parquet\]'"):
        embedding_file.check_kind(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="--features encoder"):
        embed(Options(options.checkpoint / "backbone.pt", device="cpu"), LEVELS, tmp_path / "b.npz", features="encoder")
    done = command("embed", options.checkpoint, "--out", tmp_path / "c.txt")
    assert done.returncode == 2 and done.stderr.startswith("error: --out"), done.stderr
