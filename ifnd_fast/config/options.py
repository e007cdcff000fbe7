"""What a run is made of: dataclasses that are the command line's options, with what each may be."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ifnd_fast.config.ranges import (
    FINITE,
    MOMENTUM,
    RANK_TIMEOUT,
    SEED,
    TEMPERATURE,
    MayChange,
    above,
    at_least,
    between,
    check,
    check_levels,
)
from ifnd_fast.runtime.errors import UsageError

BUILT_IN = ("demo", "cifar10", "cifar100")
"""Data sets that --data names, whatever folders of these names there are."""
FROM_PYTHON = "python:"
"""How --data and --arch begin in a run whose images or network a program gave; what their class is called follows."""


@dataclass
class DataConfig:
    data: str = "demo"
    """"demo" (5,000 MNIST digits that are installed with the package), "cifar10", "cifar100" (downloaded on
    first use), or a folder: two or more sub-folders of images, at any depth below them, one per class; or train/ and
    val/ (or valid/, validation/, test/, in any case) of such folders; or images without any classes. train/ is a part
    if a test part is beside it or no other folder with images; else it is a class. Hidden files and folders are left
    out, linked ones followed, and what was left out is said. Or a file of arrays (.npz, .npy); "wds:" and a folder of
    tar shards, or their names ("wds:/shards/train-{000..127}.tar"); "hf:" and a name on Hugging Face's hub or a folder
    of its `datasets`; "torchvision:" and the name of a class in torchvision.datasets. Labels only ever measure (and
    feed --false-negatives oracle)."""
    data_root: MayChange[Path] = Path("data")
    """folder for downloaded data sets"""
    hold_out: Annotated[float, between(0, 1, exclude=1)] = 0.0  # at 1 nothing would be left to train on
    """share of the training images, of each class alike, that is kept from training and stands in for the test images:
    to choose options by, with the test images untouched"""
    image_size: Annotated[int, at_least(1)] = 28
    """side of a training view, pixels"""
    crop_min: Annotated[float, between(0, 1, exclude=0)] = 0.2
    """smallest random crop, as a share of the image's area"""
    color_jitter: Annotated[float, between(0, 1)] = 0.0
    """strength of brightness, contrast and saturation jitter (hue: a quarter of it), 0 to 1; applied to 80 %"""
    grayscale: Annotated[float, between(0, 1)] = 0.0
    """probability of a grey view"""
    blur: Annotated[float, between(0, 1)] = 0.0
    """probability of Gaussian blur, sigma 0.1 to 2 pixels"""
    flip: bool = False
    """flip half of the views left to right"""
    rotation: Annotated[float, at_least(0)] = 0.0
    """largest random rotation, degrees either way"""
    augment: Literal["loader", "device"] = "loader"
    """where random views are made: of one image after the other by the loading processes, or of a whole batch on the
    device that trains, with random parameters for each image, the same whatever the ranks and workers. The latter is
    for many images a second on few cores. Its views are resampled once, bilinearly; those of image files are cut from
    the middle square, loaded at 1.5 times --image-size. Jitter then needs pip install ifnd-fast[augment]"""
    pixel_mean: Annotated[tuple[float, float, float], FINITE] = (0.485, 0.456, 0.406)
    """mean of the red, green and blue values (0 to 1), taken off"""
    pixel_std: Annotated[tuple[float, float, float], above(0)] = (0.229, 0.224, 0.225)
    """their standard deviation, divided by"""
    workers: Annotated[MayChange[int], at_least(0)] = 2
    """processes per rank that load and augment images; 0: in the training process"""
    cache: MayChange[str] = ""
    """folder for a memory map of the decoded images, made at first use and then read by all processes and later runs in
    place of the files, with the same results: for images whose decoding takes longer than training. /dev/shm/NAME is in
    memory alone. Changed images get another map; old ones are yours to delete"""
    cache_limit: Annotated[MayChange[float], above(0)] = 8.0
    """largest memory map of --cache, GB; there are up to two for the training images and one for the test images"""
    strict: bool = False
    """stop at an unreadable image, or too few images for --levels, where otherwise a warning says what is left out or
    scaled down"""


@dataclass
class ModelConfig:
    arch: str = "resnet-small"
    """"resnet-small" (one basic block a stage), torchvision's "resnet18", "resnet34", "resnet50", ..., or "timm:" and
    the name of any of timm's models, such as timm:vit_small_patch16_224, for which --stem and --width say nothing (pip
    install ifnd-fast[timm])"""
    stem: Literal["imagenet", "cifar", "small"] = "small"
    """first layers: 7x7 stride 2 and max-pool; 3x3 stride 1; 3x3 stride 2"""
    width: Annotated[int, at_least(1)] = 16
    """channels of the first stage (64 is torchvision's ResNet)"""
    dim: Annotated[int, at_least(1)] = 64
    """dimensions of the contrastive features"""
    hidden: Annotated[int, at_least(0)] = 0
    """units of the projection head's hidden layer; 0: as many as the backbone has features"""
    weights: str = ""
    """start the backbone from these weights: a run's folder, its backbone.pt, or a file of torch.save or safetensors
    (torchvision's, timm's, MoCo's, PCL's, DINO's, lightly's, solo-learn's, VISSL's, mmpretrain's, ...). All of the
    backbone must be in it; heads in it are left out. A resumed run needs the file no more"""
    weights_encoder: str = ""
    """which encoder, where --weights holds several: its name in there, such as backbone_momentum"""


@dataclass
class OptimConfig:
    epochs: Annotated[int, at_least(1)] = 20
    """passes over the images"""
    batch_size: Annotated[int, at_least(2)] = 128  # batch norm needs two
    """images per step, over all ranks"""
    lr: Annotated[float, above(0)] = 0.06
    """learning rate at the start (after warm-up)"""
    weight_decay: Annotated[float, at_least(0)] = 1e-4
    """L2 penalty on all parameters (AdamW: decay); LARS and AdamW leave biases and norms out"""
    sgd_momentum: Annotated[float, MOMENTUM] = 0.9
    """momentum of SGD and LARS"""
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    """SGD; LARS, for large batches, with a trust coefficient of 0.001 and biases and norms not adapted; or AdamW, for
    transformers. Each needs a --lr and --weight-decay of its own: SimCLR's LARS has 0.3 for every 256 images and 1e-6,
    MoCo v3's AdamW 1.5e-4 for every 256 images and 0.1"""
    accumulate: Annotated[int, at_least(1)] = 1
    """parts that a rank's batch is computed in, one after the other, for one step: less memory, the same gradient but
    for batch norm, whose statistics are a part's. For --negatives queue"""
    warmup_epochs: Annotated[float, at_least(0)] = 0.0
    """epochs of linear warm-up before the cosine decay to 0"""


@dataclass
class ContrastConfig:
    negatives: Literal["queue", "in-batch"] = "queue"
    """MoCo's queue of keys from a momentum encoder, or SimCLR's other images of the batch (no queue, no
    momentum encoder)"""
    queue_size: Annotated[int, at_least(1)] = 2048
    """keys in the queue"""
    temperature: Annotated[float, TEMPERATURE] = 0.2
    """of the contrastive softmax, and of the clusters' confidence, 1e-6 to 1e6"""
    momentum: Annotated[float, MOMENTUM] = 0.99
    """of the key encoder's moving average, per step"""
    bn_groups: Annotated[int, at_least(1)] = 4
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
    levels: Annotated[tuple[int, ...], at_least(2)] = (10, 20, 40)  # of one cluster all images are
    """clusters at each level, coarse to fine; scaled down where the finest would have more than one for every 4 images
    that are readable and different"""
    recluster_every: Annotated[float, above(0)] = 0.1
    """epochs between clusterings; below 1: this share of the training"""
    acceptance_end: Annotated[float, between(0, 1, exclude=0)] = 1.0
    """share of the training after which as many labels are accepted as ever are (linearly more until then)"""
    acceptance_max: Annotated[float, between(0, 1, exclude=0)] = 1.0
    """share of each level's labels, the most confident ones, that are accepted in the end (1: every label, as in the
    paper; fewer are right more often)"""
    features: Literal["fresh", "bank"] = "fresh"
    """cluster features of an evaluation pass over the images, or the keys that the last epoch computed anyway"""
    cluster_space: Literal["head", "backbone"] = "head"
    """cluster what the projection head gives (the features that the loss compares), or the backbone's features, which
    keep more of what the images show; these need --features fresh"""
    whiten: Annotated[float, between(0, 1)] = 0.0
    """above 0, up to 1: whiten the features by this power before they are clustered (1: PCA whitening)"""
    kmeans_iterations: Annotated[int, at_least(1)] = 20
    """most Lloyd iterations per level"""
    kmeans_restarts: Annotated[int, at_least(1)] = 1
    """k-means runs per level, of which the best counts"""
    warm_iterations: Annotated[int, at_least(0)] = 0
    """above 0: every clustering but the first starts from the one before, and has at most this many Lloyd iterations"""
    cluster_async: bool = False
    """cluster beside the next epoch, which trains with the labels before: they come an epoch late, and nothing waits"""
    kmeans_engine: Literal["auto", "fused", "faiss"] = "auto"
    """who runs k-means"""
    spherical: bool = False
    """normalise centroids after each k-means iteration, not only at the end"""


@dataclass
class RunConfig:
    out: MayChange[Path] = Path("runs/demo")
    """folder for the run: config, metrics, checkpoints, backbone.pt, report.html"""
    resume: MayChange[bool] = False
    """go on with the run in --out from its last checkpoint"""
    seed: Annotated[int, SEED] = 0
    """of initial weights, order, augmentation and clustering"""
    device: MayChange[str] = "auto"
    """"auto" (CUDA when there, else CPU), "cpu", "cuda", "cuda:1", ..."""
    amp: Literal["auto", "fp16", "bf16", "off"] = "auto"
    """mixed precision; auto: bf16 on GPUs since Ampere, fp16 with loss scaling on older ones, and on CPUs bf16 where it
    is faster for the run's encoder, which takes some seconds to measure when the run begins (runs that are to be
    compared are better given one by name)"""
    channels_last: bool = True
    """store images and weights channels-last"""
    compile: bool = False
    """torch.compile the encoders"""
    knn_every: Annotated[MayChange[int], at_least(0)] = 5
    """epochs between kNN measurements, when labels are known; 0: only at the end"""
    checkpoint_every: Annotated[MayChange[float], above(0)] = 1.0
    """epochs between checkpoints; below 1: several in an epoch"""
    keep_checkpoints: Annotated[MayChange[int], at_least(1)] = 2
    """checkpoints kept, the latest ones"""
    rank_timeout: Annotated[MayChange[float], RANK_TIMEOUT] = 30.0
    """minutes after which a rank that does not answer ends the run, with several ranks"""
    tensorboard: MayChange[bool] = False
    """write TensorBoard event files to OUT/tensorboard too (pip install ifnd-fast[tensorboard])"""
    wandb: MayChange[str] = ""
    """log to this project of Weights & Biases too (pip install ifnd-fast[wandb]); WANDB_MODE=offline in the environment
    keeps it in OUT/wandb"""
    mlflow: MayChange[str] = ""
    """log to this experiment of MLflow too (pip install ifnd-fast[mlflow]), on the server that the environment's
    MLFLOW_TRACKING_URI names"""


@dataclass
class Config:
    preset: Annotated[str, tyro.conf.Suppress] = "demo"
    identity: Annotated[MayChange[dict[str, str]], tyro.conf.Suppress] = field(default_factory=dict)
    """of the data, by part (see `data.identity`); empty before they are looked at and in earlier versions' runs"""
    amp_on_cpu: Annotated[Literal["", "bf16", "off"], tyro.conf.Suppress] = ""
    """what --amp auto was measured to be as the run began on a CPU; empty: it was not, as in earlier versions' runs"""
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


def validate(config: Config) -> None:
    """Raises UsageError for a value out of range, naming the option, the value and the range."""
    check(config)
    check_levels(config.cluster.levels)
    if config.model.weights_encoder and not config.model.weights:
        raise UsageError("--weights-encoder chooses from a file: give --weights too")
    if config.optim.accumulate > 1 and config.contrast.negatives == "in-batch":
        raise UsageError(
            "--accumulate: in parts of a batch an image would have the images of its part alone as negatives, which is "
            "another loss: take --negatives queue, or a smaller --batch-size"
        )
    if config.cluster.cluster_space == "backbone" and config.cluster.features == "bank":
        raise UsageError("--features bank holds the head's keys: --cluster-space backbone needs --features fresh")


def with_full_paths(config: Config) -> Config:
    """The same config with no path that depends on the folder it is read in."""
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, out=full_path(config.run.out)),
        data=dataclasses.replace(
            config.data,
            data=full_data(config.data.data),
            data_root=full_path(config.data.data_root),
            cache=config.data.cache and str(full_path(Path(config.data.cache))),
        ),
        model=dataclasses.replace(
            config.model, weights=config.model.weights and str(full_path(Path(config.model.weights)))
        ),
    )


def full_path(path: Path) -> Path:
    """The path from the root on; links in it stay, but .. is followed as the system does."""
    return path.resolve() if ".." in path.parts else path.absolute()


def full_data(data: str) -> str:
    """With the full path of a folder or file in it; the name of a data set, and what Python gave, as it is."""
    kind, colon, rest = data.partition(":")
    if data in BUILT_IN or not data or f"{kind}{colon}" in (FROM_PYTHON, "torchvision:"):
        return data
    if colon and kind in ("hf", "wds"):
        path = Path(rest).expanduser()
        return f"{kind}:{full_path(path)}" if kind == "wds" or path.exists() else data
    return str(full_path(Path(data)))
