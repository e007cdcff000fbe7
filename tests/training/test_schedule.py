"""When labels act, and how many clusters images allow."""

from __future__ import annotations

import copy
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifnd_fast.config import PRESETS, Config
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.training.schedule import acting_epochs, fewest_images, fit_levels, never_acts
from tests.training.test_trainer import new


@pytest.mark.parametrize(
    "options",
    [
        ["--epochs", 1],
        ["--epochs", 3, "--recluster-every", 3],
        ["--epochs", 5, "--recluster-every", 2],
        ["--epochs", 4, "--cluster-async"],
        ["--epochs", 2, "--cluster-async"],
        ["--epochs", 3, "--false-negatives", "oracle"],
        ["--epochs", 2, "--false-negatives", "keep"],
    ],
)
def test_the_plan_is_what_a_run_does(options, digit_folder, tmp_path, capsys):
    trainer = new(tmp_path / "run", digit_folder, *options, "--knn-every", 0)
    trainer.measuring.labelled = None
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    acted = [line["epoch"] - 1 for line in lines if sum(line["false_negatives_per_query"]) > 0]
    assert acting_epochs(trainer.config, 120) == acted
    told = capsys.readouterr()
    wanted = trainer.config.contrast.false_negatives != "keep"
    assert ("never acts" in told.err) == (wanted and not acted)
    clusters = trainer.config.contrast.false_negatives == "eliminate"
    assert (f"acts from epoch {(acted or [0])[0] + 1} of" in told.out) == (clusters and bool(acted))


@pytest.mark.parametrize(
    "preset, options, remedy",
    [
        ("demo", {"epochs": 1}, "--epochs 2 or more"),
        ("demo", {"epochs": 5, "recluster_every": 5}, "--recluster-every 4 or less, or --epochs 6 or more"),
        ("cifar10", {"epochs": 20}, "--recluster-every 19 or less, or --epochs 21 or more"),
        ("demo", {"epochs": 3, "recluster_every": 2, "cluster_async": True}, "1 or less, or --epochs 4 or more"),
        ("demo", {"epochs": 2, "recluster_every": 1, "cluster_async": True}, "--epochs 3 or more"),
    ],
)  # fmt: skip
def test_labels_that_never_act_are_told_with_a_remedy(preset, options, remedy):
    config = changed(copy.deepcopy(PRESETS[preset][1]), options)
    reason = never_acts(config, 1000)
    assert reason is not None and "--false-negatives eliminate never acts in this run" in reason and remedy in reason


def changed(config: Config, options: dict) -> Config:
    for name, value in options.items():
        section = next(part for part in (config.optim, config.cluster, config.contrast) if hasattr(part, name))
        setattr(section, name, value)
    return config


@settings(max_examples=200, deadline=None)
@given(
    epochs=st.integers(1, 40), every=st.one_of(st.integers(1, 50), st.floats(0.01, 0.99)),
    late=st.booleans(), end=st.floats(0.01, 1.0), most=st.floats(0.01, 1.0),
)  # fmt: skip
def test_the_remedy_helps(epochs, every, late, end, most):
    options = {"epochs": epochs, "recluster_every": every, "cluster_async": late}
    options |= {"acceptance_end": end, "acceptance_max": most}
    config = changed(Config(), options)
    reason = never_acts(config, 10_000)
    assert (reason is None) == bool(acting_epochs(config, 10_000))
    for option, name in (("--recluster-every", "recluster_every"), ("--epochs", "epochs")):
        for value in re.findall(rf"{option} (\d+) or", reason or ""):
            helped = changed(copy.deepcopy(config), {"recluster_every": config.recluster_epochs, name: int(value)})
            assert never_acts(helped, 10_000) is None, (reason, option, value)


def test_one_accepted_label_has_no_pair():
    config = changed(Config(), {"epochs": 100, "recluster_every": 99, "acceptance_end": 1.0})
    config.optim.epochs, config.cluster.recluster_every = 10, 1
    assert acting_epochs(config, 4) == [3, 4, 5, 6, 7, 8, 9]  # ceil(0.3 4) = 2
    config.cluster.acceptance_max = 0.5
    assert acting_epochs(config, 4) == [6, 7, 8, 9]  # ceil(0.5 0.6 4) = 2
    config.cluster.acceptance_max = 0.2
    assert acting_epochs(config, 4) == [] and "a larger --acceptance-max" in never_acts(config, 4)
    config.cluster.acceptance_max, config.cluster.recluster_every = 1.0, 2
    assert acting_epochs(config, 4) == [4, 5, 6, 7, 8, 9]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 10**5), min_size=1, max_size=5, unique=True), st.integers(1, 10**5))
def test_fitted_levels_are_distinct_and_at_most_a_quarter(levels, n):
    if n < fewest_images(len(levels)):
        with pytest.raises(UsageError, match=f"{n} readable and distinct images are too few for {len(levels)} levels"):
            fit_levels(levels, n)
        return
    fitted = fit_levels(levels, n)
    assert len(set(fitted)) == len(levels) and min(fitted) >= 2 and max(fitted) <= n // 4
    assert sorted(range(len(levels)), key=levels.__getitem__) == sorted(range(len(levels)), key=fitted.__getitem__)
    if max(levels) <= n // 4:
        assert fitted == tuple(levels)
    else:
        assert max(fitted) == n // 4


def test_fitted_levels_by_hand():
    assert fit_levels((100, 240), 120) == (12, 30) and fit_levels((10, 20, 40), 4000) == (10, 20, 40)
    assert fit_levels((10, 20, 40), 16) == (2, 3, 4) and fit_levels((40, 10, 20), 90) == (22, 5, 11)
