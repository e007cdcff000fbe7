"""Features are measured without labels in every run, and a warning, once, says that they have collapsed."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import normalize

from ifnd_fast.config import Config
from ifnd_fast.metrics.feature_quality import alignment, effective_rank
from ifnd_fast.training import feature_watch
from ifnd_fast.training.feature_watch import FeatureWatch
from tests.training.test_trainer import metrics, new


def test_a_run_without_labels_has_the_figures_of_its_last_pairs(flat_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_watch, "PAIRS", 40)  # two of an epoch's three steps
    trainer = new(tmp_path / "run", flat_folder, "--epochs", 2, "--tensorboard")
    steps, forward = [], trainer.model.forward

    def watched(*args, **options):
        steps.append(forward(*args, **options))
        return steps[-1]

    trainer.model.forward = watched
    trainer.fit()
    queries, keys = (torch.cat(parts).detach() for parts in zip(*steps[-2:], strict=True))
    last = metrics(tmp_path / "run")[-1]
    assert last["feature_rank"] == effective_rank(queries) and last["alignment"] == alignment(queries, keys)
    assert 1 < last["feature_rank"] < 16 and 0 < last["feature_std"] <= 0.25 and -4 < last["uniformity"] < 0

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("feature_rank")][-1] == pytest.approx(last["feature_rank"])


def test_collapse_is_said_once_with_what_to_do(capsys):
    watch, point = FeatureWatch(Config()), normalize(torch.ones(32, 64))
    healthy = normalize(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
    for epoch, features in enumerate((healthy, point, point), start=1):
        watch.note(features, features)
        found = watch.figures(epoch)
    said = capsys.readouterr().err
    assert said.count("warning: the features have collapsed by epoch 2: all images have nearly the same") == 1
    assert "a lower --lr" in said and len(said.splitlines()) == 1
    assert found["feature_rank"] == pytest.approx(1) and found["alignment"] == 0
    json.dumps(found, allow_nan=False)


def test_pairs_go_through_a_checkpoint():
    watch, again = FeatureWatch(Config()), FeatureWatch(Config())
    for seed in range(20):
        rows = normalize(torch.randn(2, 128, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)
        watch.note(rows[0], rows[1])
    again.load_state(watch.state(), torch.device("cpu"))
    assert len(watch.pairs) == feature_watch.PAIRS // 128 and again.figures(1) == watch.figures(1)
    assert not watch.pairs and watch.state() == []
