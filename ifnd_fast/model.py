"""Encoders, and the two ways to get positives and negatives from them: MoCo and in-batch (SimCLR)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from ifnd_fast.config import ModelConfig
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.errors import UsageError


class Encoder(nn.Module):
    """A backbone and a projection head; the output is L2-normalised.

    Args:
        backbone: (B, 3, H, W) -> (B, n_features), for example `resnet(config)`.
        n_features: of the backbone.
        dim: of the contrastive features.
        hidden: units of the head's hidden layer (MoCo v2: n_features).
    """

    backbone: nn.Module

    def __init__(self, backbone: nn.Module, n_features: int, dim: int = 128, hidden: int | None = None):
        super().__init__()
        hidden = hidden or n_features
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(n_features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, dim) float32, unit rows."""
        return F.normalize(self.head(self.backbone(images)).float(), dim=1)


def resnet(config: ModelConfig) -> tuple[nn.Module, int]:
    """torchvision's ResNet without its classifier (fc is the identity), and how many features it gives.

    Raises:
        UsageError: torchvision has no ResNet of that name.
    """
    if config.arch == "resnet-small":
        network = ResNet(BasicBlock, [1, 1, 1, 1])
    else:
        names = torchvision.models.list_models(include=["resnet*", "resnext*", "wide_resnet*"])
        if config.arch not in names:
            raise UsageError(f"--arch must be one of {['resnet-small', *names]}, got {config.arch!r}")
        network = torchvision.models.get_model(config.arch, weights=None)
    if config.width != 64:
        _set_width(network, config.width)
    if config.stem != "imagenet":
        stride = 1 if config.stem == "cifar" else 2
        network.conv1 = nn.Conv2d(3, config.width, kernel_size=3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    n_features = network.layer4[-1].bn2.num_features
    if hasattr(network.layer4[-1], "bn3"):
        n_features = network.layer4[-1].bn3.num_features
    network.fc = nn.Identity()
    return network, n_features


def _set_width(network: ResNet, width: int) -> None:
    """Rebuild the stages with `width`, 2 width, ... channels, as torchvision builds them with 64, 128, ..."""
    stages = [network.layer1, network.layer2, network.layer3, network.layer4]
    block, depths = type(network.layer1[0]), [len(stage) for stage in stages]
    network.inplanes = width
    network.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    for number, depth in enumerate(depths):
        stage = network._make_layer(block, width * 2**number, depth, stride=1 if number == 0 else 2)
        setattr(network, f"layer{number + 1}", stage)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class MoCo(nn.Module):
    """Momentum contrast (He et al., 2020): a query encoder, and a key encoder that is its moving average.

    Keys are computed with shuffled batch norm, so that query and positive don't share batch statistics: among
    the ranks when torch.distributed runs, and in `bn_groups` groups of the batch on each.

    Args:
        encoder: images (B, ...) -> unit features (B, dim); copied for the keys.
        momentum: of the moving average per step, key = momentum * key + (1 - momentum) * query.
        bn_groups: groups of a rank's batch with batch-norm statistics of their own.

    Raises:
        ValueError: momentum outside [0, 1], or bn_groups < 1.
    """

    def __init__(self, encoder: nn.Module, momentum: float = 0.999, bn_groups: int = 1):
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, got {momentum}")
        if bn_groups < 1:
            raise ValueError(f"bn_groups must be 1 or more, got {bn_groups}")
        self.momentum, self.bn_groups = momentum, bn_groups
        self.query_encoder = encoder
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)

    def forward(self, view: Tensor, other_view: Tensor, shuffle_seed: int = 0) -> tuple[Tensor, Tensor]:
        """Queries (B, dim) of one view, with gradient, and keys (B, dim) of the other, without.

        `shuffle_seed` (the step, say) fixes the shuffle; it must be the same on all ranks.
        """
        return self.query_encoder(view), self.keys(other_view, shuffle_seed)

    @torch.no_grad()
    def keys(self, images: Tensor, shuffle_seed: int = 0) -> Tensor:
        """Keys (B, dim) of images (B, ...), computed in shuffled groups."""
        if self.bn_groups == 1 and distributed.world_size() == 1:
            return self.key_encoder(images)
        everyones = distributed.all_gather(images)
        generator = torch.Generator().manual_seed(shuffle_seed)
        order = torch.randperm(len(everyones), generator=generator).to(images.device, non_blocking=True)
        mine = distributed.own_share(everyones[order])
        keys = torch.cat([self.key_encoder(group) for group in _groups(mine, self.bn_groups)])
        shuffled_keys = distributed.all_gather(keys)
        keys = torch.empty_like(shuffled_keys)
        keys[order] = shuffled_keys
        return distributed.own_share(keys)

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """One step of the moving average, over parameters; batch-norm buffers follow the keys' own batches."""
        torch._foreach_lerp_(
            list(self.key_encoder.parameters()), list(self.query_encoder.parameters()), 1 - self.momentum
        )

    @property
    def feature_encoder(self) -> nn.Module:
        """The encoder whose features are clustered: the momentum encoder."""
        return self.key_encoder


def _groups(batch: Tensor, n_groups: int) -> tuple[Tensor, ...]:
    """Contiguous groups of nearly equal size, of at least two rows (batch norm needs them)."""
    return torch.tensor_split(batch, max(1, min(n_groups, len(batch) // 2)))


class InBatch(nn.Module):
    """SimCLR's memory-free contrast (Chen et al., 2020): negatives are the other images of the batch.

    Args:
        encoder: images (B, ...) -> unit features (B, dim).
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.query_encoder = encoder

    def forward(self, view: Tensor, other_view: Tensor, shuffle_seed: int = 0) -> tuple[Tensor, Tensor]:
        """Features (B, dim) of both views, both with gradient; `shuffle_seed` is unused."""
        features = self.query_encoder(torch.cat([view, other_view]))
        return features[: len(view)], features[len(view) :]

    def update_key_encoder(self) -> None:
        """Nothing to do: there is one encoder."""

    @property
    def feature_encoder(self) -> nn.Module:
        """The encoder whose features are clustered: the only one."""
        return self.query_encoder


def build(config: ModelConfig) -> Callable[[], Encoder]:
    """A function that makes encoders as the config says (weights from torch's global generator)."""

    def make() -> Encoder:
        backbone, n_features = resnet(config)
        return Encoder(backbone, n_features, config.dim, config.hidden or None)

    return make
