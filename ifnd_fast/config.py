"""What a run is made of: dataclasses that are the command line's options, and the presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from ifnd_fast.errors import CommandError, UsageError


@dataclass
class DataConfig:
    data: str = "demo"
    """"demo" (5,000 MNIST digits that are installed with the package), "cifar10", "cifar100" (downloaded on
    first use), or a folder: one sub-folder of images per class, train/ and val/ of such folders, or images
    without any classes. Labels only ever measure (and feed --false-negatives oracle)."""
    data_root: Path = Path("data")
    """folder for downloaded data sets"""
    hold_out: float = 0.0
    """share of the training images, of each class alike, that is kept from training and stands in for the test images:
    to choose options by, with the test images untouched"""
    image_size: int = 28
    """side of a training view, pixels"""
    crop_min: float = 0.2
    """smallest random crop, as a share of the image's area"""
    color_jitter: float = 0.0
    """strength of brightness, contrast and saturation jitter (hue: a quarter of it), 0 to 1; applied to 80 %"""
    grayscale: float = 0.0
    """probability of a grey view"""
    blur: float = 0.0
    """probability of Gaussian blur, sigma 0.1 to 2 pixels"""
    flip: bool = False
    """flip half of the views left to right"""
    rotation: float = 0.0
    """largest random rotation, degrees either way"""
    augment: Literal["loader", "device"] = "loader"
    """where random views are made: of one image after the other by the loading processes, or of a whole batch on the
    device that trains, with random parameters for each image, the same whatever the ranks and workers. The latter is
    for many images a second on few cores. Its views are resampled once, bilinearly; those of image files are cut from
    the middle square, loaded at 1.5 times --image-size. Jitter then needs pip install ifnd-fast[augment]"""
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """mean of the red, green and blue values (0 to 1), taken off"""
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """their standard deviation, divided by"""
    workers: int = 2
    """processes per rank that load and augment images; 0: in the training process"""
    strict: bool = False
    """stop at an unreadable image or too few images for a level's clusters, instead of a warning"""


@dataclass
class ModelConfig:
    arch: str = "resnet-small"
    """"resnet-small" (one basic block a stage), or torchvision's "resnet18", "resnet34", "resnet50", ..."""
    stem: Literal["imagenet", "cifar", "small"] = "small"
    """first layers: 7x7 stride 2 and max-pool; 3x3 stride 1; 3x3 stride 2"""
    width: int = 16
    """channels of the first stage (64 is torchvision's ResNet)"""
    dim: int = 64
    """dimensions of the contrastive features"""
    hidden: int = 0
    """units of the projection head's hidden layer; 0: as many as the backbone has features"""


@dataclass
class OptimConfig:
    epochs: int = 20
    """passes over the images"""
    batch_size: int = 128
    """images per step, over all ranks"""
    lr: float = 0.06
    """learning rate at the start (after warm-up)"""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters"""
    sgd_momentum: float = 0.9
    """momentum of SGD"""
    warmup_epochs: float = 0.0
    """epochs of linear warm-up before the cosine decay to 0"""


@dataclass
class ContrastConfig:
    negatives: Literal["queue", "in-batch"] = "queue"
    """MoCo's queue of keys from a momentum encoder, or SimCLR's other images of the batch (no queue, no
    momentum encoder)"""
    queue_size: int = 2048
    """keys in the queue"""
    temperature: float = 0.2
    """of the contrastive softmax, and of the clusters' confidence"""
    momentum: float = 0.99
    """of the key encoder's moving average, per step"""
    bn_groups: int = 4
    """groups that a batch of keys is shuffled into for batch norm (shuffle-BN), over all ranks; 1: off on one
    rank, several ranks shuffle among each other"""
    sync_bn: bool = False
    """batch norm over the whole batch of all ranks in place of shuffled groups; GPUs only"""
    false_negatives: Literal["eliminate", "attract", "keep", "oracle"] = "eliminate"
    """take detected false negatives out of the loss (IFND), attract them, keep them (plain MoCo or SimCLR, no
    clustering), or take out by true labels (for experiments)"""
    level_combination: Literal["mean", "any", "all"] = "mean"
    """mean of the levels' losses; or one loss, whose false negatives share a label at any level, or at all of them"""


@dataclass
class ClusterConfig:
    levels: tuple[int, ...] = (10, 20, 40)
    """clusters at each level, coarse to fine"""
    recluster_every: float = 0.1
    """epochs between clusterings; below 1: this share of the training"""
    acceptance_end: float = 1.0
    """share of the training after which every label is accepted (it rises linearly from none)"""
    features: Literal["fresh", "bank"] = "fresh"
    """cluster features of an evaluation pass over the images, or the keys that the last epoch computed anyway"""
    cluster_space: Literal["head", "backbone"] = "head"
    """cluster what the projection head gives (the features that the loss compares), or the backbone's features, which
    keep more of what the images show; these need --features fresh"""
    whiten: float = 0.0
    """above 0, up to 1: whiten the features by this power before they are clustered (1: PCA whitening)"""
    kmeans_iterations: int = 20
    """most Lloyd iterations per level"""
    kmeans_restarts: int = 1
    """k-means runs per level, of which the best counts"""
    warm_iterations: int = 0
    """above 0: every clustering but the first starts from the one before, and has at most this many Lloyd iterations"""
    cluster_async: bool = False
    """cluster beside the next epoch, which trains with the labels before: they come an epoch late, and nothing waits"""
    kmeans_engine: Literal["auto", "fused", "faiss"] = "auto"
    """who runs k-means"""
    spherical: bool = False
    """normalise centroids after each k-means iteration, not only at the end"""


@dataclass
class RunConfig:
    out: Path = Path("runs/demo")
    """folder for the run: config, metrics, checkpoints, backbone.pt, report.html"""
    resume: bool = False
    """go on with the run in --out from its last checkpoint"""
    seed: int = 0
    """of initial weights, order, augmentation and clustering"""
    device: str = "auto"
    """"auto" (CUDA when there, else CPU), "cpu", "cuda", "cuda:1", ..."""
    amp: Literal["auto", "fp16", "bf16", "off"] = "auto"
    """mixed precision; auto: bf16 on GPUs since Ampere and CPUs that have it, fp16 with loss scaling on older GPUs"""
    channels_last: bool = True
    """store images and weights channels-last"""
    compile: bool = False
    """torch.compile the encoders"""
    knn_every: int = 5
    """epochs between kNN measurements, when labels are known; 0: only at the end"""
    checkpoint_every: float = 1.0
    """epochs between checkpoints; below 1: several in an epoch"""
    keep_checkpoints: int = 2
    """checkpoints kept, the latest ones"""
    rank_timeout: float = 30.0
    """minutes after which a rank that does not answer ends the run, with several ranks"""
    tensorboard: bool = False
    """write TensorBoard event files to OUT/tensorboard too (pip install ifnd-fast[tensorboard])"""


@dataclass
class Config:
    preset: Annotated[str, tyro.conf.Suppress] = "demo"
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def recluster_epochs(self) -> int:
        """Epochs between clusterings, at least 1."""
        every = self.cluster.recluster_every
        return max(1, round(every if every >= 1 else every * self.optim.epochs))


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

# What may differ when a run is resumed: nothing that changes what it computes.
MAY_CHANGE = {"resume", "out", "device", "workers", "data_root", "knn_every", "checkpoint_every",
              "keep_checkpoints", "rank_timeout", "tensorboard"}  # fmt: skip


def validate(config: Config) -> None:
    """Raises UsageError for a value out of range, naming the option, the value and the range."""
    one_or_more = [
        ("epochs", config.optim.epochs), ("batch-size", config.optim.batch_size),
        ("queue-size", config.contrast.queue_size), ("bn-groups", config.contrast.bn_groups),
        ("image-size", config.data.image_size), ("width", config.model.width), ("dim", config.model.dim),
        ("kmeans-iterations", config.cluster.kmeans_iterations),
        ("kmeans-restarts", config.cluster.kmeans_restarts),
        ("keep-checkpoints", config.run.keep_checkpoints),
    ]  # fmt: skip
    for name, count in one_or_more:
        if count < 1:
            raise UsageError(f"--{name} must be 1 or more, got {count}")
    for name, count in (("workers", config.data.workers), ("hidden", config.model.hidden),
                        ("knn-every", config.run.knn_every)):  # fmt: skip
        if count < 0:
            raise UsageError(f"--{name} must be 0 or more, got {count}")
    above_zero = [
        ("temperature", config.contrast.temperature), ("recluster-every", config.cluster.recluster_every),
        ("checkpoint-every", config.run.checkpoint_every), ("lr", config.optim.lr),
        ("rank-timeout", config.run.rank_timeout),
        *(("pixel-std", value) for value in config.data.pixel_std),
    ]  # fmt: skip
    for name, value in above_zero:
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"--{name} must be a finite number above 0, got {value}")
    shares = [
        ("crop-min", config.data.crop_min), ("acceptance-end", config.cluster.acceptance_end),
        ("momentum", config.contrast.momentum), ("grayscale", config.data.grayscale),
        ("blur", config.data.blur), ("color-jitter", config.data.color_jitter),
    ]  # fmt: skip
    for name, value in shares:
        low_open = name in ("crop-min", "acceptance-end")
        if not (0 < value <= 1 if low_open else 0 <= value <= 1):
            raise UsageError(f"--{name} must be from 0{' (excluded)' if low_open else ''} to 1, got {value}")
    if not 0 <= config.data.hold_out < 1:
        raise UsageError(f"--hold-out must be from 0 to below 1, got {config.data.hold_out}")
    if not 0 <= config.cluster.whiten <= 1:
        raise UsageError(f"--whiten must be from 0 (off) to 1, got {config.cluster.whiten}")
    if config.cluster.cluster_space == "backbone" and config.cluster.features == "bank":
        raise UsageError("--features bank holds the head's keys: --cluster-space backbone needs --features fresh")
    for name, value in (("weight-decay", config.optim.weight_decay), ("rotation", config.data.rotation),
                        ("sgd-momentum", config.optim.sgd_momentum),
                        ("warmup-epochs", config.optim.warmup_epochs)):  # fmt: skip
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"--{name} must be a finite number of 0 or more, got {value}")
    levels = config.cluster.levels
    if not levels or len(levels) > 16 or min(levels) < 1:
        raise UsageError(f"--levels must be 1 to 16 numbers of clusters, each 1 or more, got {levels}")
    if config.optim.batch_size < 2:
        raise UsageError("--batch-size must be 2 or more (batch norm needs it), got 1")


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists, strings and numbers, as config.yaml and checkpoints hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return list(value)
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`.

    Raises:
        CommandError: a section or option that this version doesn't know, or a value of the wrong kind.
    """

    def build(kind: type, values: Any) -> Any:
        default = kind()
        if not isinstance(values, dict):
            raise CommandError(f"the config's {kind.__name__} must be a mapping, got {type(values).__name__}")
        unknown = set(values) - {f.name for f in dataclasses.fields(kind)}
        if unknown:
            raise CommandError(f"the config has options that this version doesn't know: {sorted(unknown)}")
        return kind(**{name: convert(getattr(default, name), value) for name, value in values.items()})

    def convert(default: Any, value: Any) -> Any:
        if dataclasses.is_dataclass(default):
            return build(type(default), value)
        return tuple(value) if isinstance(default, tuple) else type(default)(value)

    return build(Config, values)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def load(path: Path) -> Config:
    """Raises CommandError: the file is missing, or is not a run's config."""
    try:
        return from_dict(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise CommandError(f"{path} is not the config of a run: {error}") from error


def differences(saved: Config, wanted: Config) -> list[str]:
    """The options in which two runs would compute different things, a line each."""
    lines = []
    for section, values in to_dict(saved).items():
        other = to_dict(wanted)[section]
        if not isinstance(values, dict):
            if values != other:
                lines.append(f"preset: the run has {values}, asked for {other}")
            continue
        lines += [
            f"--{name.replace('_', '-')}: the run has {value}, asked for {other[name]}"
            for name, value in values.items()
            if value != other[name] and name not in MAY_CHANGE
        ]
    return lines
