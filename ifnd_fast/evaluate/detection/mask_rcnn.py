"""Mask R-CNN (He et al., 2017) with a feature pyramid on a pre-trained ResNet."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d


def mask_rcnn(
    network: nn.Module,
    n_classes: int,
    *,
    frozen: bool,
    min_size: Sequence[int] = (800,),
    max_size: int = 1333,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
) -> MaskRCNN:
    """torchvision's Mask R-CNN, all of it trained, the backbone from the weights that it has.

    Args:
        network: a torchvision ResNet; its layers become the model's (`backbone.body`).
        n_classes: without the background.
        frozen: batch norm keeps the statistics and weights that it has. Otherwise it is trained, and the pyramid's
            new layers have it too (He et al., 2020, section 4.2, "Normalization").
        min_size: shorter side of an image, pixels: one of these at random in training, the last one in evaluation.
        max_size: longest longer side, pixels.
        pixel_mean: of the red, green and blue values (0 to 1) that the backbone was trained with.
        pixel_std: their standard deviation.
    """
    if frozen:
        freeze_batch_norm(network)
    norm_layer = None if frozen else nn.BatchNorm2d
    backbone = _resnet_fpn_extractor(network, trainable_layers=5, norm_layer=norm_layer)
    return MaskRCNN(
        backbone, n_classes + 1, min_size=tuple(min_size), max_size=max_size,
        image_mean=list(pixel_mean), image_std=list(pixel_std),
    )  # fmt: skip


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d within by torchvision's FrozenBatchNorm2d of the same statistics and weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child)
