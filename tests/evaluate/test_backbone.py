"""Backbones to evaluate: of runs and from elsewhere."""

from __future__ import annotations

import pickle

import pytest
import torch
import torchvision

from ifnd_fast import config as configs
from ifnd_fast.config import PRESETS, Config, ModelConfig
from ifnd_fast.contrast.encoder import resnet
from ifnd_fast.evaluate.backbone import load_backbone
from ifnd_fast.runtime.errors import CommandError, UsageError


def weights_of(arch: str, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return resnet(ModelConfig(arch=arch, **({"width": 8, "stem": "imagenet"} | options)))[0].state_dict()


@pytest.fixture
def run(tmp_path):
    """A run's folder, as far as evaluations look at it."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = Config(model=ModelConfig(width=8))
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    torch.save(weights_of("resnet-small", stem="small"), folder / "backbone.pt")
    return folder


def test_a_run_is_loaded_with_its_config(run):
    for checkpoint in (run, run / "backbone.pt"):
        config, network, n_features = load_backbone(checkpoint)
        assert config.model == ModelConfig(width=8) and n_features == 64 and not network.training
        assert network(torch.rand(2, 3, 28, 28)).shape == (2, 64)


@pytest.mark.parametrize(
    "arch, width, stem",
    [
        ("resnet18", 64, "imagenet"),
        ("resnet50", 8, "cifar"),
        ("resnext50_32x4d", 16, "imagenet"),
        ("wide_resnet50_2", 8, "imagenet"),
        ("resnet-small", 8, "cifar"),
    ],
)
def test_the_architecture_is_told_by_names_and_shapes(arch, width, stem, tmp_path, capsys):
    weights = weights_of(arch, width=width, stem=stem)
    torch.save(weights, tmp_path / "weights.pt")
    config, network, n_features = load_backbone(tmp_path / "weights.pt")
    assert (config.model.arch, config.model.width, config.model.stem) == (arch, width, stem)
    assert config.data == PRESETS["imagenet"][1].data
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert network.eval()(torch.rand(1, 3, 32, 32)).shape == (1, n_features)
    assert ("stride 1" in capsys.readouterr().err) == (stem == "cifar")


def test_torchvisions_own_file_gives_torchvisions_features(tmp_path):
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    network.fc = torch.nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    found = load_backbone(tmp_path / "resnet18.pth").network(images)
    torch.testing.assert_close(found, network.eval()(images))


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"epoch": 3, "state_dict": w}, lambda w: {"model": w}])
@pytest.mark.parametrize("prefix", ["", "module.", "encoder_q.", "module.encoder_q.", "backbone.", "_orig_mod."])
def test_wrappers_prefixes_heads_and_old_files(wrap, prefix, tmp_path):
    weights = weights_of("resnet18")
    named = {prefix + name: value for name, value in weights.items() if "num_batches_tracked" not in name}
    named |= {f"{prefix}fc.0.weight": torch.ones(3), "module.queue": torch.ones(2), "prototypes.weight": torch.ones(1)}
    if "encoder_q" in prefix:
        named |= {name.replace("encoder_q", "encoder_k"): value + 1 for name, value in named.items()}
    torch.save(wrap(named), tmp_path / "w.pth.tar", _use_new_zipfile_serialization=False)
    network = load_backbone(tmp_path / "w.pth.tar").network
    assert torch.equal(network.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def without(name):
    return {key: value for key, value in weights_of("resnet18").items() if key != name}


@pytest.mark.parametrize(
    "content, words",
    [
        ({"a": torch.ones(1), "b": 2}, "no ResNet with torchvision's names.*a, b"),
        ([1, 2], "holds a list"),
        (without("layer3.0.bn2.weight"), "nearest is resnet18: 1 missing: layer3.0.bn2.weight"),
        (without("conv1.weight"), "conv1.weight is missing"),
        (weights_of("resnet18") | {"layer1.0.se.weight": torch.ones(1)}, "1 unexpected: layer1.0.se.weight"),
        (weights_of("resnet18") | {"layer2.0.conv1.weight": torch.ones(7, 1)}, r"layer2.0.conv1.weight \(7, 1\) inst"),
        (weights_of("resnet18") | {"bn1.weight": torch.full((8,), torch.nan)}, "bn1.weight is not finite"),
        (weights_of("resnet18") | {"bn1.weight": "x"}, "bn1.weight is a str"),
        (
            {p + n: v for p in "ab" for n, v in weights_of("resnet18").items()},
            "several encoders: choose one of a, b by",
        ),
    ],
)
def test_foreign_weights_are_refused_by_name(content, words, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(CommandError, match=words) as caught:
        load_backbone(tmp_path / "weights.pt")
    assert "weights.pt" in str(caught.value) and len(str(caught.value)) < 500


def test_arch_decides_and_must_be_known(tmp_path):
    torch.save(weights_of("resnet18"), tmp_path / "w.pt")
    assert load_backbone(tmp_path / "w.pt", "resnet18").config.model.arch == "resnet18"
    with pytest.raises(CommandError, match="does not fit resnet50: .* missing"):
        load_backbone(tmp_path / "w.pt", "resnet50")
    with pytest.raises(UsageError, match="resnet99"):
        load_backbone(tmp_path / "w.pt", "resnet99")


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"hello" * 50])
def test_a_broken_file_is_named(damage, run):
    path = run / "backbone.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CommandError, match="backbone.pt.*truncated"):
        load_backbone(run)


def test_missing_files_are_named(run, tmp_path):
    with pytest.raises(CommandError, match="absent.pt is missing"):
        load_backbone(tmp_path / "absent.pt")
    (run / "backbone.pt").unlink()
    with pytest.raises(CommandError, match="has not ended yet"):
        load_backbone(run)
    with pytest.raises(CommandError, match="config.yaml"):
        load_backbone(tmp_path)


def test_weights_of_another_model_than_the_runs_config(run):
    torch.save(weights_of("resnet18"), run / "backbone.pt")
    with pytest.raises(CommandError, match="does not fit the run's config.yaml: .*unexpected"):
        load_backbone(run)
    with pytest.raises(CommandError, match="--arch resnet18: .* run of resnet-small"):
        load_backbone(run, "resnet18")


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_no_code_is_run(save, tmp_path):
    canary = tmp_path / "ran"
    save({"state_dict": Malice(str(canary))}, tmp_path / "evil.pt")
    with pytest.raises(CommandError, match="evil.pt"):
        load_backbone(tmp_path / "evil.pt")
    assert not canary.exists()
