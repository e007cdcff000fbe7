"""A run that an earlier version wrote (see earlier_run/README.md) is resumed, and goes on as it would have there."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ifnd_fast.cli import parse_train
from ifnd_fast.config import from_dict, load
from ifnd_fast.runtime import checkpoint
from ifnd_fast.training.trainer import Trainer

EARLIER = Path(__file__).parent / "earlier_run"
MEASURED_TIME = {"images_per_second", "seconds", "feature_seconds", "cluster_seconds", "cluster_level_seconds"}


@pytest.fixture
def images(digits, tmp_path, monkeypatch) -> None:
    """The run's images, in the working directory: its config names them relative to that."""
    monkeypatch.chdir(tmp_path)
    pixels, labels = digits
    pixels = pixels.repeat(2, axis=1).repeat(2, axis=2)  # as they are, without a filter that may change
    for label in range(3):
        folder = tmp_path / "digits" / f"digit-{label}"
        folder.mkdir(parents=True)
        for number, image in enumerate(pixels[labels == label][:16]):
            Image.fromarray(image).save(folder / f"{number:02d}.png")


@pytest.fixture
def run(images, tmp_path) -> Path:
    """The run's folder."""
    out = tmp_path / "run"
    shutil.copytree(EARLIER, out, ignore=shutil.ignore_patterns("ended", "README.md", "*.gz"))
    (out / "checkpoints").mkdir(exist_ok=True)
    for packed in (EARLIER / "checkpoints").glob("*.gz"):
        (out / "checkpoints" / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    return out


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and plain values in a checkpoint, by their keys."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{name}/{key}")
    else:
        yield name, value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_resumed_is_what_the_file_holds(run):
    written = checkpoint.load_latest(run)
    trainer = Trainer(parse_train(["--resume", "--out", "run"]))
    trainer.session.go_on(trainer)
    now = trainer.state_dict()
    assert now.pop("recent_pairs") == []  # came later
    assert list(now) == [key for key in written if key != "format"]  # the keys, in the same order
    for key in now:
        if key not in ("config", "unreadable"):
            ours, theirs = dict(leaves(now[key])), dict(leaves(written[key]))
            assert list(ours) == list(theirs)
            assert [name for name, value in theirs.items() if not same(value, ours[name])] == [], key
    assert any(value.count_nonzero() > 1000 for _, value in leaves(now) if isinstance(value, Tensor))
    assert written["unreadable"] == [] and now["unreadable"] == {}  # the reasons came later
    assert from_dict(written["config"]) == load(EARLIER / "config.yaml")
    assert trainer.position() == {"epoch": 1, "step": 5} and trainer.step_in_epoch == 2


def test_the_resumed_run_ends_as_the_earlier_version_did(run, monkeypatch):
    """k-means starts here as it did then, from one candidate for each centroid.

    On one CPU the bits are the same. Others multiply in another order, so that the weights differ by up to 5e-7,
    where a queue, labels or a momentum that was not resumed makes 1.5e-2 or more."""
    monkeypatch.setattr("ifnd_fast.clustering.seeding.trials_of", lambda n_clusters: 1)
    trainer = Trainer(parse_train(["--resume", "--out", "run"]))
    with trainer.open():
        trainer.fit()
    wanted = torch.load(io.BytesIO(gzip.decompress((EARLIER / "ended/backbone.pt.gz").read_bytes())), weights_only=True)
    got = torch.load(run / "backbone.pt", weights_only=True)
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, atol=2e-5, rtol=2e-5)
    then, now = metrics(EARLIER / "ended/metrics.jsonl"), metrics(run / "metrics.jsonl")
    assert now[0] == metrics(EARLIER / "metrics.jsonl")[0]  # what was there is kept
    later = {"feature_rank", "feature_std", "alignment", "uniformity"}  # came later
    assert [[name for name in line if name not in later] for line in now] == [list(line) for line in then]
    for name, value in leaves(then[1:]):
        if name.split("/")[2] not in MEASURED_TIME:
            assert dict(leaves(now[1:]))[name] == pytest.approx(value, rel=1e-3), name
    assert set(json.loads((run / "result.json").read_text())) >= {"knn_top1", "knn_top1_untrained", "seconds"}
