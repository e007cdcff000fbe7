"""A classifier on a backbone, trained on labelled views; a killed training goes on to the same weights."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ifnd_fast.config import MOMENTUM, SEED, DataConfig, MayChange, at_least, between, changes, check, decisive
from ifnd_fast.data import identity
from ifnd_fast.data.images import Images
from ifnd_fast.data.loading import EpochBatches, ViewDataset, view_loader
from ifnd_fast.data.processes import running
from ifnd_fast.data.unreadable import Unreadable
from ifnd_fast.data.views import random_view, to_input
from ifnd_fast.evaluate.subject import Subject
from ifnd_fast.runtime import checkpoint as checkpoints
from ifnd_fast.runtime.console import progress, say, warn
from ifnd_fast.runtime.errors import CommandError, NonFiniteError
from ifnd_fast.runtime.paths import refuse_file
from ifnd_fast.runtime.session import Session, refuse_differences

SECONDS_BETWEEN_CHECKPOINTS = 600.0  # within an epoch; one is also written at its end


@dataclass
class TrainingOptions:
    """Options of the tasks that train a classifier."""

    epochs: Annotated[int, at_least(1)] = 100
    """passes over the labelled training images"""
    batch_size: Annotated[int, at_least(2)] = 256
    """images per step; all of them where there are fewer"""
    drops: Annotated[tuple[float, ...], between(0, 1, words="shares of the epochs, from 0 to 1")] = (0.6, 0.8)
    """shares of the epochs after which the learning rates drop"""
    drop_factor: Annotated[float, at_least(0)] = 0.1
    """what they are multiplied with then"""
    sgd_momentum: Annotated[float, MOMENTUM] = 0.9
    """momentum of SGD"""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """L2 penalty on what is trained"""
    crop_min: Annotated[float | None, between(0, 1, exclude=0)] = None
    """smallest random crop, as a share of the image's area; default: 0.08, or what the run trained with for views
    below 64 pixels"""
    flip: bool | None = None
    """flip half of the views left to right; default: as the run trained (bare weights: yes)"""
    seed: Annotated[int, SEED] = 0
    """of the classifier's first weights, the order and the views"""
    out: MayChange[Path | None] = None
    """folder for checkpoints and result.json; default: evaluate/TASK-DATA beside the weights, of one of
    a run's checkpoints TASK-DATA-step-STEP"""
    resume: MayChange[bool] = False
    """go on with what is in --out, with the same options"""

    def check(self) -> None:
        """Raises UsageError: an option is out of range."""
        if self.out is not None:
            refuse_file("--out", self.out)
        check(self)

    def folder(self, subject: Subject, task: str) -> Path:
        checkpoint = subject.options.checkpoint
        parent = checkpoint if checkpoint.is_dir() else checkpoint.parent
        of_step = f"-step-{subject.state.step}" if subject.state else ""
        return self.out or parent / "evaluate" / f"{task}-{Path(subject.data.data).name[:80]}{of_step}"

    def views(self, data: DataConfig) -> DataConfig:
        """The data options with these crops and flips, and nothing else that is random."""
        crop_min = self.crop_min or (0.08 if data.image_size >= 64 else data.crop_min)
        flip = data.flip if self.flip is None else self.flip
        return dataclasses.replace(
            data, crop_min=crop_min, flip=flip, color_jitter=0.0, grayscale=0.0, blur=0.0, rotation=0.0
        )


class Classifier(nn.Module):
    """A linear layer on a backbone; a frozen backbone stays as it is, also its batch norm.

    Args:
        backbone: (B, 3, H, W) -> (B, n_features).
    """

    def __init__(self, backbone: nn.Module, n_features: int, n_classes: int, frozen: bool):
        super().__init__()
        self.backbone, self.frozen = backbone.requires_grad_(not frozen), frozen
        self.head = nn.Linear(n_features, n_classes)
        nn.init.normal_(self.head.weight, std=0.01)  # MoCo's
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, n_classes) float32."""
        out = self.backbone(images).float()
        with torch.autocast(images.device.type, enabled=False):
            return self.head(out)


class ClassifierTraining:
    """A training in memory: SGD on cross-entropy, and all that its checkpoints hold.

    Args:
        subject: whose network is the backbone; fine-tuning changes a copy.
        train: labelled images.
        lr: learning rate of the head.
        backbone_lr: of the backbone; None: it is frozen.
        out: folder for the checkpoints.
    """

    def __init__(self, subject: Subject, train: Images, n_classes: int, options: TrainingOptions, lr: float,
                 backbone_lr: float | None, out: Path):  # fmt: skip
        assert train.labels is not None
        self.subject, self.images, self.options, self.out = subject, train, options, out
        self.labels = torch.from_numpy(train.labels)
        self.parts = {"train": train.listing()}
        self.data = options.views(subject.data)
        self.batches = EpochBatches(len(train), min(options.batch_size, len(train)), options.seed)
        self.session = Session(out, options.resume)
        self.unreadable = Unreadable(train, subject.data.strict)
        torch.manual_seed(options.seed)
        frozen = backbone_lr is None
        self.settings = self._settings(n_classes, lr, backbone_lr)
        backbone = subject.network if frozen else copy.deepcopy(subject.network)
        self.model = Classifier(backbone, subject.n_features, n_classes, frozen).to(subject.compute.device)
        groups: list[dict[str, Any]] = [{"params": list(self.model.head.parameters()), "lr": lr}]
        if not frozen:
            groups.append({"params": list(self.model.backbone.parameters()), "lr": backbone_lr})
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.SGD(groups, momentum=options.sgd_momentum, weight_decay=options.weight_decay)
        self.scaler = subject.compute.scaler(enabled=not frozen)  # the head alone is trained in float32
        self.epoch = self.step_in_epoch = self.step = 0
        self.loss_sum = 0.0  # of this epoch
        self.warned = False

    def _settings(self, n_classes: int, lr: float, backbone_lr: float | None) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from."""
        values = decisive(self.options, TrainingOptions)
        values |= {"lr of the last layer": lr, "lr of the backbone": backbone_lr}
        values |= {name: getattr(self.data, name) for name in ("image_size", "crop_min", "flip")}
        digest = hashlib.blake2b(np.ascontiguousarray(self.labels).tobytes())
        for weight in self.subject.network.state_dict().values():
            digest.update(weight.cpu().contiguous().numpy().tobytes())
        return {
            **values, "classes": n_classes, "images": len(self.images), "weights and labels": digest.hexdigest()[:16],
        }  # fmt: skip

    def fit(self) -> None:
        """Train to the end from wherever --resume finds it.

        Raises:
            UsageError: --out holds another training, or one to resume.
            Stopped: a signal came; a checkpoint is written.
            CommandError, NonFiniteError: a checkpoint can't be read or written; the loss is not finite.
        """
        with self.session.open(self, lambda: identity.keep(self.out, self.parts)):
            dataset = ViewDataset(self.images, random_view(self.data), self.options.seed)
            loader = view_loader(dataset, self.data, self.batches)
            while self.epoch < self.options.epochs:
                with self.session.stop.deferred():
                    self._train_epoch(loader)
                self.session.stop_if_asked()
        self.subject.remember(self.unreadable)

    def position(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def _train_epoch(self, loader: Any) -> None:
        n_steps, saved = len(self.batches), time.monotonic()
        self.batches.start(self.epoch, self.step_in_epoch)
        self.model.train()
        loss_sum = torch.tensor(self.loss_sum, dtype=torch.float64, device=self.subject.compute.device)
        title = f"epoch {self.epoch + 1}/{self.options.epochs}"
        done, images = self.step_in_epoch, self.batches.batch_size
        further = n_steps * (self.options.epochs - self.epoch - 1)
        with running(loader) as batches, progress(title, n_steps, done, images=images, further=further) as advance:
            for views, indices, wanted, reasons in batches:
                self.unreadable.note(indices, wanted, reasons)
                loss = self._train_step(views, self.labels[indices])
                loss_sum += loss
                self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
                advance(1, f"loss {loss.item():.3f}" if loss.device.type == "cpu" else "")
                self.session.stopping = self.session.asked()
                due = self.session.stopping or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS
                if due and self.step_in_epoch < n_steps:
                    self.loss_sum = self._finite(float(loss_sum))
                    self.save()
                    saved = time.monotonic()
                    self.session.stop_if_asked()
        mean = self._finite(float(loss_sum)) / n_steps
        say(f"{title}  loss {mean:.4f}  lr {self.optimizer.param_groups[0]['lr']:g}")
        self.epoch, self.step_in_epoch, self.loss_sum = self.epoch + 1, 0, 0.0
        self._warn_of_divergence(mean)
        self.save()

    def _train_step(self, views: Tensor, labels: Tensor) -> Tensor:
        """One update; the loss before it."""
        dropped = sum(self.epoch >= round(drop * self.options.epochs) for drop in self.options.drops)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.options.drop_factor**dropped
        device = self.subject.compute.device
        images = to_input(views, self.data, device).contiguous(memory_format=self.subject.layout)
        with self.subject.compute.autocast():
            logits = self.model(images)
        loss = F.cross_entropy(logits, labels.to(device, non_blocking=True))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _warn_of_divergence(self, loss: float) -> None:
        """At the first epoch whose mean loss is clearly above that of guessing, as first weights' hardly is, and where
        the training ends so."""
        chance, last = math.log(self.model.head.out_features), self.epoch == self.options.epochs
        if loss > 1.1 * chance and (last or not self.warned):
            self.warned = True
            end = "the figures may tell of its training more than of the features" if last else "it may have diverged"
            warn(
                f"the loss of epoch {self.epoch}, {loss:.4g}, is above log({self.model.head.out_features} classes) = "
                f"{chance:.3f}, which guessing has: {end}; a lower learning rate of the last layer than "
                f"{self.rates[0]:g} may help"
            )

    def _finite(self, loss_sum: float) -> float:
        if not math.isfinite(loss_sum):
            raise NonFiniteError(
                f"the loss is not finite in epoch {self.epoch + 1}; {checkpoints.where(self.out)}; "
                f"a lower --lr than {self.rates[0]:g} may help"
            )
        return loss_sum

    @property
    def train_rows(self) -> np.ndarray:
        """Numbers of the images that could be read: others stood in for the rest."""
        return np.setdiff1d(np.arange(len(self.images)), list(self.unreadable.reasons))

    def test(self, images: Images) -> dict[str, float]:
        """Top-1 and top-5 on centre views, percent, and of how many images: unreadable ones are left out."""
        assert images.labels is not None
        logits, rows = self.subject.readable_features(images, "test images", self.model)
        accuracies = top_accuracies(torch.from_numpy(logits), torch.from_numpy(images.labels[rows]))
        return {**accuracies, "test_images": len(rows)}

    # ---- checkpoints ----

    def save(self) -> None:
        self.session.save(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """All that the rest depends on; the order and the views of images follow from the steps."""
        model = self.model.head if self.model.frozen else self.model
        return {
            "settings": self.settings, "identity": identity.identity_of(self.parts),
            "epoch": self.epoch, "step_in_epoch": self.step_in_epoch, "step": self.step,
            "loss_sum": self.loss_sum, "unreadable": self.unreadable.state(), "model": model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UsageError: the state is of a training with other options, weights or data."""
        saved = state.get("settings")
        if not isinstance(saved, dict):
            raise CommandError(f"--resume: {self.out} holds no classifier's training")
        identity.check(self.out, state.get("identity"), self.parts, f"--data {self.subject.data.data}")
        refuse_differences(f"--resume: {self.out}", changes(saved, self.settings, prefix=""))
        (self.model.head if self.model.frozen else self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step_in_epoch, self.step = state["epoch"], state["step_in_epoch"], state["step"]
        self.loss_sum = state["loss_sum"]
        self.unreadable.load_state(state["unreadable"])


def top_accuracies(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and, with more than 5 classes, top-5 accuracy in percent of logits (N, C) and labels (N,), N >= 1."""
    counts = [1, 5] if logits.shape[1] > 5 else [1]
    best = logits.topk(counts[-1], dim=1).indices
    hits = best == labels[:, None]
    return {f"top{k}": 100.0 * hits[:, :k].any(dim=1).double().mean().item() for k in counts}
