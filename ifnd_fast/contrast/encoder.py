"""The encoder: a backbone, a ResNet by default, and an MLP head."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from ifnd_fast.config import FROM_PYTHON, ModelConfig
from ifnd_fast.contrast.timm_models import is_timm, pretrained_for, timm_model
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


def build_backbone(config: ModelConfig, image_size: int | None = None) -> tuple[nn.Module, int]:
    """The backbone of --arch, (B, 3, S, S) -> (B, n_features), and how many features it gives.

    Args:
        image_size: side S that it is for, where that matters (timm's vision transformers); None: the model's own.

    Raises:
        UsageError: there is none of that name, or not for that size.
    """
    if config.arch.startswith(FROM_PYTHON):
        raise UsageError(f"--arch {config.arch}: a program gave this network: give it again, to ifnd_fast.pretrain")
    if not is_timm(config.arch):
        return resnet(config)
    network = timm_model(config.arch, image_size)
    return network, n_features_of(network, image_size or pretrained_for(network)[0])


@torch.no_grad()
def n_features_of(backbone: nn.Module, image_size: int) -> int:
    """Of any module that is on the CPU, by one image in eval mode.

    Raises:
        UsageError: it gives no features (B, n_features) of images (B, 3, S, S).
    """
    was_training = backbone.training
    name = type(backbone).__name__
    try:
        features = backbone.eval()(torch.zeros(1, 3, image_size, image_size, dtype=torch.float32, device="cpu"))
    except Exception as error:  # whatever a module makes of a size that it is not for
        raise UsageError(f"the backbone {name} fails on an image of --image-size {image_size}: {error}") from error
    finally:
        backbone.train(was_training)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 1:
        got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise UsageError(f"the backbone {name} must give features (B, n_features) of images (B, 3, H, W), got {got}")
    return features.shape[1]


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
            known = f"{['resnet-small', *names]}, or timm: and one of timm's models"
            raise UsageError(f"--arch must be one of {known}, got {config.arch!r}")
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


def build(config: ModelConfig, image_size: int | None = None) -> Callable[[], Encoder]:
    """A function that makes encoders as the config says (weights from torch's global generator)."""

    def make() -> Encoder:
        backbone, n_features = build_backbone(config, image_size)
        return Encoder(backbone, n_features, config.dim, config.hidden or None)

    return make
