"""Features of whole image sets by an evaluation pass."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ifnd_fast.config import DataConfig
from ifnd_fast.data.images import Images, refuse_none
from ifnd_fast.data.loading import centre_loader
from ifnd_fast.data.processes import running
from ifnd_fast.data.unreadable import Unreadable
from ifnd_fast.data.views import to_input
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.compute import Compute
from ifnd_fast.runtime.console import track


@torch.inference_mode()
def extract(
    encoder: nn.Module,
    images: Images,
    config: DataConfig,
    compute: Compute,
    description: str = "features",
    batch_size: int = 256,
    unreadable: Unreadable | None = None,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 of every image's centre view, in eval mode, and which were readable, (N,) bool.

    Under torch.distributed each rank computes a contiguous share of the images, and all get all of them.

    Args:
        unreadable: gets the images that are, with the reasons.

    Raises:
        CommandError: none can be read; or `unreadable` is strict and one can't.
        LoadingError: a process that loads them failed.
    """
    features, readable = extract_share(encoder, images, config, compute, description, batch_size, unreadable)
    return distributed.gather_rows(features), distributed.gather_rows(readable)


@torch.inference_mode()
def extract_share(
    encoder: nn.Module,
    images: Images,
    config: DataConfig,
    compute: Compute,
    description: str = "features",
    batch_size: int = 256,
    unreadable: Unreadable | None = None,
) -> tuple[Tensor, Tensor]:
    """`extract` of this rank's `distributed.share` of the images alone; `unreadable` gets those of all ranks."""
    own, device = distributed.share(len(images)), compute.device
    batches = []
    readable = torch.zeros(len(own), dtype=torch.bool, device=device)
    found: dict[int, str] = {}
    for batch in extract_batches(encoder, images, config, compute, description, batch_size, own):
        batches.append(batch.features)
        ok = torch.tensor([not why for why in batch.reasons], dtype=torch.bool, device=device)
        readable[batch.indices.to(device) - own.start] = ok
        found |= {index: why for index, why in zip(batch.indices.tolist(), batch.reasons, strict=True) if why}
    gathered = {index: why for part in distributed.all_gather_objects(found) for index, why in part.items()}
    refuse_none(images, gathered)
    if unreadable is not None:
        for index in sorted(gathered):
            unreadable.add(index, gathered[index])
    return torch.cat(batches), readable


class FeatureBatch(NamedTuple):
    """Features of B images."""

    features: Tensor
    """(B, D) float32, of any numbers where an image is unreadable"""
    indices: Tensor
    """(B,) int64, of the images"""
    reasons: list[str]
    """why each is unreadable; "" where it is not"""


def extract_batches(
    encoder: nn.Module,
    images: Images,
    config: DataConfig,
    compute: Compute,
    description: str,
    batch_size: int,
    indices: Sequence[int],
) -> Generator[FeatureBatch, None, None]:
    """Features of these images' centre views, in eval mode, a batch after the other.

    Raises:
        LoadingError: a process that loads them failed.
    """
    was_training = encoder.training
    encoder.eval()
    loader = centre_loader(images, config, batch_size, indices)
    try:
        with running(loader) as loaded:
            for views, numbers, _, reasons in track(loaded, description, len(loader), batch_size):
                with torch.inference_mode(), compute.autocast():
                    features = encoder(to_input(views, config, compute.device)).float()
                yield FeatureBatch(features, numbers, list(reasons))
    finally:
        encoder.train(was_training)
