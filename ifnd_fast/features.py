"""Features of whole image sets by an evaluation pass, and what is measured on them while training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from ifnd_fast.clustering.shards import Shards
from ifnd_fast.config import DataConfig
from ifnd_fast.data import Images, centre_loader, to_input
from ifnd_fast.knn import knn_accuracy
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.console import track


@torch.inference_mode()
def extract(
    encoder: nn.Module,
    images: Images,
    config: DataConfig,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    description: str = "features",
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 of every image's centre view, in eval mode, and which were readable, (N,) bool.

    Under torch.distributed each rank computes a contiguous share of the images, and all get all of them.
    """
    features, readable = extract_share(encoder, images, config, device, autocast, description, batch_size)
    shards = Shards(len(features), device)
    return shards.gather(features), shards.gather(readable)


@torch.inference_mode()
def extract_share(
    encoder: nn.Module,
    images: Images,
    config: DataConfig,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    description: str = "features",
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """`extract` of this rank's `distributed.share` of the images alone."""
    own = distributed.share(len(images))
    was_training = encoder.training
    encoder.eval()
    batches = []
    readable = torch.zeros(len(own), dtype=torch.bool, device=device)
    loader = centre_loader(images, config, batch_size, own)
    for views, indices, ok in track(loader, description, len(loader)):
        with autocast():
            batches.append(encoder(to_input(views, config, device)).float())
        readable[indices.to(device) - own.start] = ok.to(device)
    encoder.train(was_training)
    return torch.cat(batches), readable


def raw_pixels(images: Images, config: DataConfig) -> Tensor:
    """The pixels of every centre view as its features, (N, 3 S S): what an encoder should beat."""
    return extract(nn.Flatten(), images, config, torch.device("cpu"), torch.no_grad, "pixels")[0]


class KnnProbe:
    """Weighted kNN accuracy of features of the training images, measured on the test images.

    Without test images every tenth training image is classified by the other nine tenths.
    """

    def __init__(self, images: Images, test_images: Images | None):
        assert images.labels is not None
        self.images, self.test_images, self.labels = images, test_images, images.labels
        if test_images is not None:
            assert test_images.labels is not None
            self.test_labels = test_images.labels

    def accuracy(
        self, features_of: Callable[[Images], Tensor], k: int = 20, temperature: float = 0.07
    ) -> float:
        """Top-1 in percent, with `features_of(images)` -> (N, D)."""
        features, labels = features_of(self.images), torch.from_numpy(self.labels)
        if self.test_images is not None:
            tests, test_labels = features_of(self.test_images), torch.from_numpy(self.test_labels)
        else:
            held_out = torch.from_numpy(np.arange(len(labels)) % 10 == 9)
            tests, test_labels = features[held_out], labels[held_out]
            features, labels = features[~held_out], labels[~held_out]
        device = features.device
        labels, test_labels = labels.to(device), test_labels.to(device)
        return knn_accuracy(features, labels, tests, test_labels, k=k, temperature=temperature)
