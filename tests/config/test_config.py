"""Presets are the recipes of the method's papers; a config survives being written and read."""

from __future__ import annotations

import pytest

from ifnd_fast import config as configs
from ifnd_fast.config import PRESETS, Config, validate
from ifnd_fast.runtime.errors import CommandError, UsageError


def test_imagenet_preset_has_moco_v2_values():
    c = PRESETS["imagenet"][1]
    assert (c.model.arch, c.model.stem, c.model.width, c.model.dim, c.model.hidden) == (
        "resnet50", "imagenet", 64, 128, 0,
    )  # fmt: skip
    assert (c.optim.epochs, c.optim.batch_size, c.optim.lr, c.optim.warmup_epochs) == (200, 256, 0.03, 0)
    assert (c.optim.sgd_momentum, c.optim.weight_decay) == (0.9, 1e-4)
    assert (c.contrast.negatives, c.contrast.queue_size, c.contrast.temperature) == ("queue", 65536, 0.2)
    assert c.contrast.momentum == 0.999
    assert (c.data.image_size, c.data.crop_min, c.data.color_jitter) == (224, 0.2, 0.4)
    assert (c.data.grayscale, c.data.blur, c.data.flip) == (0.2, 0.5, True)
    assert c.cluster.levels == (25000, 50000, 100000)
    assert (c.recluster_epochs, c.cluster.acceptance_end) == (1, 1.0)
    assert c.run.channels_last


@pytest.mark.parametrize("name, levels", [("cifar10", (10, 30, 100)), ("cifar100", (100, 300, 1000))])
def test_cifar_presets(name, levels):
    c = PRESETS[name][1]
    assert (c.data.data, c.model.arch, c.model.stem) == (name, "resnet50", "cifar")
    assert (c.optim.epochs, c.optim.batch_size, c.optim.lr, c.optim.warmup_epochs) == (1000, 1024, 0.5, 10)
    assert (c.contrast.negatives, c.cluster.levels, c.recluster_epochs) == ("in-batch", levels, 20)
    assert c.cluster.acceptance_end == 1.0


def test_demo_preset():
    c = PRESETS["demo"][1]
    assert (c.data.data, c.model.width, c.model.stem) == ("demo", 16, "small")
    assert (c.contrast.queue_size, c.cluster.levels, c.cluster.recluster_every) == (2048, (10, 20, 40), 0.1)
    assert c.recluster_epochs == round(0.1 * c.optim.epochs) and c.cluster.acceptance_end == 0.25


@pytest.mark.parametrize("preset", PRESETS)
def test_a_written_config_reads_back_equal(preset, tmp_path):
    config = PRESETS[preset][1]
    (tmp_path / "config.yaml").write_text(configs.to_yaml(config))
    assert configs.load(tmp_path / "config.yaml") == config
    validate(config)


@pytest.mark.parametrize(
    "section, option, value",
    [
        ("optim", "epochs", 0), ("optim", "batch_size", 1), ("optim", "lr", float("nan")),
        ("contrast", "temperature", 0.0), ("contrast", "momentum", 1.5), ("contrast", "queue_size", 0),
        ("cluster", "levels", ()), ("cluster", "levels", (0,)), ("cluster", "acceptance_end", 0.0),
        ("cluster", "acceptance_max", 1.5), ("cluster", "whiten", 1.5), ("data", "hold_out", 1.0),
        ("cluster", "levels", (1, 10)), ("cluster", "levels", (10, 20, 10)), ("cluster", "levels", tuple(range(2, 20))),
        ("contrast", "temperature", 1e-7), ("contrast", "temperature", 1e7), ("contrast", "temperature", float("nan")),
        ("contrast", "momentum", 1.0), ("contrast", "momentum", -0.1), ("contrast", "momentum", float("nan")),
        ("optim", "sgd_momentum", 1.0), ("optim", "batch_size", 0), ("optim", "lr", 0.0), ("optim", "lr", float("inf")),
        ("optim", "epochs", -3), ("run", "seed", -1), ("run", "rank_timeout", 1e9), ("data", "hold_out", float("nan")),
        ("data", "pixel_mean", (0.5, float("nan"), 0.5)), ("cluster", "warm_iterations", -1),
        ("data", "workers", -1), ("data", "crop_min", 0.0), ("data", "pixel_std", (1.0, 0.0, 1.0)),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_option(section, option, value):
    config = Config()
    setattr(getattr(config, section), option, value)
    with pytest.raises(UsageError, match="--" + option.replace("_", "-")):
        validate(config)


def test_a_bank_of_keys_has_no_backbone_features():
    config = Config()
    config.cluster.features, config.cluster.cluster_space = "bank", "backbone"
    with pytest.raises(UsageError, match="--cluster-space backbone needs --features fresh"):
        validate(config)


@pytest.mark.parametrize("text", ["", "a: [", "run: 3", "optim: {speed: 9}", "optim: {epochs: many}"])
def test_a_broken_config_file_is_named(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(CommandError):
        configs.load(path)


def test_differences_names_what_changes_the_result_only():
    saved, wanted = Config(), Config()
    wanted.optim.lr, wanted.data.workers, wanted.run.resume = 1.0, 7, True
    (line,) = configs.differences(saved, wanted)
    assert "--lr" in line and "0.06" in line and "1.0" in line
