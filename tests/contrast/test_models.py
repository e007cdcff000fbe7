"""Encoders, MoCo's momentum and shuffled batch norm, in-batch features."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from ifnd_fast import InBatch, MoCo
from ifnd_fast.config import ModelConfig
from ifnd_fast.contrast.encoder import Encoder, build, resnet
from ifnd_fast.runtime.errors import UsageError

SMALL = ModelConfig(width=8, dim=16)


@pytest.mark.parametrize("arch, n_features", [("resnet-small", 512), ("resnet18", 512), ("resnet50", 2048)])
def test_backbone_state_loads_into_torchvision(arch, n_features):
    backbone, n = resnet(ModelConfig(arch=arch, stem="imagenet", width=64))
    assert n == n_features
    if arch == "resnet-small":
        return
    missing, unexpected = torchvision.models.get_model(arch).load_state_dict(backbone.state_dict(), strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected


@pytest.mark.parametrize(
    "stem, width, size, n_features", [("small", 16, 28, 128), ("cifar", 64, 32, 512), ("imagenet", 32, 64, 256)]
)
def test_stems_and_widths(stem, width, size, n_features):
    backbone, n = resnet(ModelConfig(stem=stem, width=width))
    assert n == n_features and backbone(torch.randn(2, 3, size, size)).shape == (2, n_features)


def test_unknown_arch_is_refused_with_the_choices():
    with pytest.raises(UsageError, match="resnet50"):
        resnet(ModelConfig(arch="vgg"))


def test_encoder_gives_unit_float32_rows_also_under_autocast():
    encoder = build(SMALL)()
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder(torch.randn(4, 3, 16, 16))
    assert z.dtype == torch.float32 and z.shape == (4, 16)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))


def test_momentum_is_the_moving_average_of_parameters():
    model = MoCo(build(SMALL)(), momentum=0.9)
    before = copy.deepcopy(list(model.key_encoder.parameters()))
    with torch.no_grad():
        for parameter in model.query_encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.update_key_encoder()
    for old, new, query in zip(before, model.key_encoder.parameters(), model.query_encoder.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * query)
        assert not new.requires_grad


def test_keys_come_back_in_order_and_each_group_normalises_alone():
    """The key encoder is one batch norm: a key is its image less the mean of its own shuffled group."""

    class Normalise(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    model = MoCo(Normalise(), bn_groups=4)
    x = torch.arange(32.0)[:, None] ** 2
    keys = model.keys(x, shuffle_seed=3)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    for group in order.chunk(4):
        torch.testing.assert_close(keys[group], x[group] - x[group].mean(0))
    assert torch.equal(keys, model.keys(x, shuffle_seed=3))
    assert not torch.equal(keys, model.keys(x, shuffle_seed=4))
    torch.testing.assert_close(MoCo(Normalise(), bn_groups=1).keys(x), x - x.mean(0))


def test_small_batches_keep_two_images_in_a_group():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x

    model = MoCo(Spy(), bn_groups=8)
    model.keys(torch.randn(5, 2))
    assert sorted(seen) == [2, 3]


def test_only_queries_have_gradient_in_moco_and_both_in_batch():
    x = torch.randn(8, 3, 16, 16)
    query, key = MoCo(build(SMALL)(), bn_groups=2)(x, x)
    assert query.requires_grad and not key.requires_grad
    z1, z2 = InBatch(build(SMALL)())(x, x)
    assert z1.requires_grad and z2.requires_grad
    torch.testing.assert_close(z1, z2)


@pytest.mark.parametrize("kwargs", [{"momentum": -0.1}, {"momentum": 1.1}, {"bn_groups": 0}])
def test_bad_settings_are_refused(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=name):
        MoCo(nn.Linear(2, 2), **kwargs)


def test_any_backbone_will_do():
    encoder = Encoder(nn.Flatten(), 12, dim=5)
    torch.testing.assert_close(encoder(torch.randn(3, 3, 2, 2)).norm(dim=1), torch.ones(3))
    assert F.cosine_similarity(encoder(torch.ones(1, 12)), encoder(torch.ones(1, 12))).item() > 0.999
