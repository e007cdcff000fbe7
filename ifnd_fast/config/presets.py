"""The recipes that a run starts from, by name."""

from __future__ import annotations

from pathlib import Path

from ifnd_fast.config.options import (
    ClusterConfig,
    Config,
    ContrastConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)


def _demo() -> Config:
    """Crops, rotation, temperature and acceptance were chosen on training digits that were held out for it."""
    return Config(
        # channels-last makes convolutions of 16 channels slower on a CPU
        run=RunConfig(channels_last=False, knn_every=4),
        data=DataConfig(
            crop_min=0.85, rotation=15.0, pixel_mean=(0.13, 0.13, 0.13), pixel_std=(0.31, 0.31, 0.31),
        ),
        optim=OptimConfig(epochs=40),
        contrast=ContrastConfig(temperature=0.1),
        cluster=ClusterConfig(acceptance_end=0.25),
    )  # fmt: skip


def _cifar(name: str, levels: tuple[int, ...]) -> Config:
    return Config(
        preset=name,
        run=RunConfig(out=Path("runs") / name, knn_every=20),
        data=DataConfig(
            data=name, image_size=32, color_jitter=0.4, grayscale=0.2, flip=True, workers=8,
        ),
        model=ModelConfig(arch="resnet50", stem="cifar", width=64, dim=128),
        optim=OptimConfig(epochs=1000, batch_size=1024, lr=0.5, warmup_epochs=10),
        contrast=ContrastConfig(negatives="in-batch"),
        cluster=ClusterConfig(levels=levels, recluster_every=20),
    )  # fmt: skip


def _imagenet() -> Config:
    return Config(
        preset="imagenet",
        run=RunConfig(out=Path("runs/imagenet"), knn_every=10, checkpoint_every=0.25),
        data=DataConfig(
            data="imagenet", image_size=224, color_jitter=0.4, grayscale=0.2, blur=0.5, flip=True, workers=12,
        ),
        model=ModelConfig(arch="resnet50", stem="imagenet", width=64, dim=128),
        optim=OptimConfig(epochs=200, batch_size=256, lr=0.03),
        contrast=ContrastConfig(queue_size=65536, momentum=0.999, bn_groups=8),
        cluster=ClusterConfig(levels=(25000, 50000, 100000), recluster_every=1),
    )  # fmt: skip


PRESETS: dict[str, tuple[str, Config]] = {
    "demo": ("5,000 MNIST digits, a small ResNet, about 2 minutes on 2 CPU cores", _demo()),
    "cifar10": ("CIFAR-10, ResNet-50, in-batch negatives", _cifar("cifar10", (10, 30, 100))),
    "cifar100": ("CIFAR-100, ResNet-50, in-batch negatives", _cifar("cifar100", (100, 300, 1000))),
    "imagenet": ("a folder of images, ResNet-50, MoCo v2's queue and values", _imagenet()),
}
