"""COCO detection and instance segmentation: Mask R-CNN fine-tuned from a backbone, as in MoCo's paper."""

from __future__ import annotations

import datetime
import math
import time
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops._utils import split_normalization_params

from ifnd_fast.config import changes, decisive, full_path
from ifnd_fast.data import identity
from ifnd_fast.data.images import refuse_none
from ifnd_fast.data.loading import EpochBatches
from ifnd_fast.data.processes import make_loader, running
from ifnd_fast.data.unreadable import Unreadable
from ifnd_fast.evaluate.backbone import Backbone
from ifnd_fast.evaluate.detection import coco
from ifnd_fast.evaluate.detection.mask_rcnn import mask_rcnn
from ifnd_fast.evaluate.detection.metrics import average_precision, to_results
from ifnd_fast.evaluate.detection.options import DetectionOptions, learning_rate, resolve
from ifnd_fast.runtime import checkpoint as checkpoints
from ifnd_fast.runtime import distributed, run_folder
from ifnd_fast.runtime.compute import Compute
from ifnd_fast.runtime.console import progress, say, stage, track
from ifnd_fast.runtime.errors import CommandError, NonFiniteError, UsageError
from ifnd_fast.runtime.session import Session, refuse_differences


class FineTuning:
    """A fine-tuning in memory.

    Args:
        backbone: what it starts from.
        options: what to train on, and how.
        compute: the device to train on, and in which precision.

    Raises:
        UsageError: options and data don't go together, or the data are missing or malformed.
    """

    def __init__(self, backbone: Backbone, options: DetectionOptions, compute: Compute):
        self.options = options = resolve(options, compute.device)
        self.compute, self.device = compute, compute.device
        start = options.checkpoint
        self.out = options.out or (start if start.is_dir() else start.parent) / "detection"
        with distributed.raise_on_all_ranks(True):  # one may have no such folder
            train = coco.find("train", options.data, options.train_images, options.train_annotations)
            val = coco.find("val", options.data, options.val_images, options.val_annotations)
            self.train, self.val = (coco.CocoImages(*where, options.max_size) for where in (train, val))
            self._check_categories()
        self.unreadable = Unreadable(self.train, options.strict), Unreadable(self.val, options.strict)
        self.parts = {"train": self.train.listing(), "val": self.val.listing()}
        self.identity = identity.agree(self.parts, self.data)
        self.examples = coco.TrainingExamples(self.train, options.seed)
        self.batches = self._batches()
        torch.manual_seed(options.seed)
        self.model: nn.Module = mask_rcnn(
            backbone.network, len(self.train.category_ids), frozen=options.batch_norm == "frozen",
            min_size=options.min_size, max_size=options.max_size,
            pixel_mean=backbone.config.data.pixel_mean, pixel_std=backbone.config.data.pixel_std,
        )  # fmt: skip
        if options.batch_norm == "sync" and distributed.world_size() > 1:
            if self.device.type == "cpu":
                raise UsageError("--batch-norm sync: torch has it for GPUs only; take frozen on CPUs")
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.model.to(self.device)
        norm, other = split_normalization_params(self.model)
        groups = [{"params": other}, {"params": norm, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(
            [group for group in groups if group["params"]], options.lr or 0.0,
            momentum=options.sgd_momentum, weight_decay=options.weight_decay,
        )  # fmt: skip
        self.scaler = compute.scaler()
        self.step, self.seconds = 0, 0.0
        self.reported_at, self.recent = 0, 0.0  # the step of the last line, and seconds of the iterations since
        self.sums: dict[str, float] = {}  # of each loss, and the steps, since the last line
        self.session = Session(self.out, options.resume)

    @property
    def data(self) -> str:
        """What to call the data in messages."""
        return f"--data {self.train.folder} and {self.val.folder}"

    def _check_categories(self) -> None:
        """Raises UsageError: the two annotation files don't name the same things by the same numbers."""
        names = [{number: one["name"] for number, one in part.coco.cats.items()} for part in (self.train, self.val)]
        for number, name in names[1].items():
            if names[0].get(number) != name:
                other = f"{names[0].get(number)!r} in {self.train.path}"
                raise UsageError(f"category {number} is {name!r} in {self.val.path}, but {other}")

    def _batches(self) -> EpochBatches:
        batch, n, ranks = self.options.batch_size, len(self.examples), distributed.world_size()
        if batch > n:
            raise UsageError(f"--batch-size {batch} is larger than the {n} training images with objects: lower it")
        if batch % ranks:
            raise UsageError(f"--batch-size {batch} must divide by the {ranks} ranks")
        return EpochBatches(n, batch, self.options.seed, distributed.rank(), ranks)

    def open(self) -> AbstractContextManager[None]:
        """OUT, begun or gone on with, while it trains; see `Session.open` for what it raises."""
        return self.session.open(self, lambda: identity.keep(self.out, self.parts))

    # ---- the loop ----

    def fit(self) -> dict[str, Any]:
        """Train to the end from wherever the run is, and measure; the result's figures (of rank 0)."""
        model: nn.Module = self.model
        if distributed.world_size() > 1:
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        left_out = len(self.train) - len(self.examples)
        say(
            f"{len(self.examples)} images to train on ({left_out} without an object left out), {len(self.val)} to "
            f"measure on, {len(self.train.category_ids)} categories; {self.options.iterations} iterations of "
            f"{self.options.batch_size}, lr {self.options.lr:g}, batch norm "
            f"{'trained' if self.options.batch_norm == 'sync' else 'frozen'}"
        )
        with self.session.stop.deferred():
            self._train(model)
        return self._finish(self.measure())

    def _train(self, model: nn.Module) -> None:
        assert self.options.iterations is not None
        epoch, step = divmod(self.step, len(self.batches))
        self.batches.start(epoch, step, end=1 + self.options.iterations // len(self.batches))
        loader = make_loader(self.examples, self.options.workers, batch_sampler=self.batches, collate_fn=list)
        self.model.train()
        images, total = self.options.batch_size, self.options.iterations
        with running(loader) as batches, progress("iterations", total, self.step, images=images) as advance:
            started = time.perf_counter()
            while self.step < self.options.iterations:
                losses, self.session.stopping = self._train_step(model, next(batches))
                took = time.perf_counter() - started
                self.seconds, self.recent = self.seconds + took, self.recent + took
                started = time.perf_counter()
                advance(1, f"loss {losses['loss']:.3f}")
                self._after_step(losses)

    def _train_step(self, model: nn.Module, batch: list[Any]) -> tuple[dict[str, float], bool]:
        """One update; the losses, means over the ranks, and whether some rank was asked to stop."""
        images, targets = self._to_device(batch)
        # Each step draws from a state of its own, on every rank another: nothing of it need be kept for a resume.
        draw = np.random.SeedSequence([self.options.seed, self.step, distributed.rank()])
        torch.manual_seed(int(draw.generate_state(1, np.uint64)[0] >> 1))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.options)
        with self.compute.autocast():
            losses = model(images, targets)
        loss = sum(losses.values())
        own_losses = torch.stack([*losses.values(), loss]).detach().double()
        asked = own_losses.new_tensor([self.session.asked()])
        *values, asked_ranks = distributed.sum_over_ranks(torch.cat([own_losses, asked])).tolist()
        names = [*losses, "loss"]
        means = {name: value / distributed.world_size() for name, value in zip(names, values, strict=True)}
        self._refuse_non_finite(means)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return means, asked_ranks > 0

    def _to_device(self, batch: list[Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        for *_, unreadable in batch:
            for index, reason in unreadable:
                self.unreadable[0].add(index, reason)
        images = [image.to(self.device, non_blocking=True).float() / 255 for image, *_ in batch]
        targets = [
            {name: value.to(self.device, non_blocking=True) for name, value in target.items()} for _, target, _ in batch
        ]
        return images, targets

    def _refuse_non_finite(self, losses: dict[str, float]) -> None:
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(
                f"{', '.join(bad)} not finite at iteration {self.step + 1}; {checkpoints.where(self.out)}; "
                "a lower --lr, a longer --warmup or --amp off may help"
            )

    def _after_step(self, losses: dict[str, float]) -> None:
        """The losses' line, and a checkpoint where one is due or the run was asked to stop."""
        last = self.step == self.options.iterations
        for name, value in {**losses, "steps": 1}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if self.step % self.options.log_every == 0 or last:
            self._report()
        if last or self.session.stopping or self.step % self.options.checkpoint_every == 0:
            self.save()
        self.session.stop_if_asked()

    def _report(self) -> None:
        """A line for the person and one of metrics.jsonl: mean losses since the last one."""
        assert self.options.iterations is not None
        steps = self.sums.pop("steps")
        means = {name: value / steps for name, value in self.sums.items()}
        self.sums = {}
        rate, self.recent = self.recent / max(1, self.step - self.reported_at), 0.0
        self.reported_at = self.step
        left = datetime.timedelta(seconds=round(rate * (self.options.iterations - self.step)))
        lr, speed = self.optimizer.param_groups[0]["lr"], self.options.batch_size / rate
        parts = ", ".join(f"{name[5:]} {value:.3f}" for name, value in means.items() if name.startswith("loss_"))
        say(
            f"iteration {self.step}/{self.options.iterations}  loss {means['loss']:.3f} ({parts})  lr {lr:.2g}  "
            f"{speed:.1f} images/s  {left} left"
        )
        if distributed.rank() == 0:
            line = {"step": self.step, **means, "lr": lr, "images_per_second": speed}
            run_folder.append_metrics(self.out, line)

    # ---- what is measured and kept ----

    @torch.inference_mode()
    def measure(self) -> dict[str, float | None]:
        """Average precision on the val images, each rank's share of them on that rank; empty but on rank 0."""
        self.model.eval()
        share = distributed.share(len(self.val))
        loader = make_loader(coco.MeasuredImages(self.val), self.options.workers, batch_size=None, sampler=share)
        results, unreadable = [], {}
        with distributed.raise_on_all_ranks(True), running(loader) as loaded:
            for index, image in track(loaded, "measuring", len(share), images=1):
                if isinstance(image, str):
                    unreadable[index] = image
                    continue
                with self.compute.autocast():
                    (output,) = self.model([image.to(self.device).float() / 255])
                results += to_results(self.val.image_ids[index], output, self.train.category_ids)
        gathered = [result for part in distributed.all_gather_objects(results) for result in part]
        reasons = {index: why for part in distributed.all_gather_objects(unreadable) for index, why in part.items()}
        refuse_none(self.val, reasons)
        for index in sorted(reasons):
            self.unreadable[1].add(index, reasons[index])
        if distributed.rank() != 0:
            return {}
        run_folder.write_json(self.out / "detections.json", gathered, indent=None)
        counted = [image_id for index, image_id in enumerate(self.val.image_ids) if index not in reasons]
        with stage("average precision"):
            return average_precision(self.val.coco, gathered, counted)

    def _finish(self, figures: dict[str, float | None]) -> dict[str, Any]:
        """Write the model and the result; the figures, with what they are of."""
        if distributed.rank() != 0:
            return {}
        weights = {name: value.cpu() for name, value in self.model.state_dict().items()}
        checkpoints.write_atomically(self.out / "model.pt", lambda file: torch.save(weights, file))
        paths = {"checkpoint": self.options.checkpoint, "data": self.val.path}
        settings = {**{name: str(full_path(path)) for name, path in paths.items()}, **decisive(self.options)}
        unreadable = [one for part in self.unreadable for one in part.listed()]
        result = {**settings, **figures, "seconds": self.seconds, "unreadable": unreadable}
        run_folder.write_json(self.out / "result.json", result)
        return result

    # ---- checkpoints ----

    def save(self) -> None:
        """Write a checkpoint, from rank 0."""
        state = {
            "settings": decisive(self.options), "identity": self.identity,
            "step": self.step, "seconds": self.seconds, "sums": self.sums,
            "unreadable": self.unreadable[0].state(), "categories": self.train.category_ids,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }  # fmt: skip
        self.session.save(state)

    def position(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UsageError, CommandError: the state is of other options or categories, or of another model."""
        try:
            differences = changes(state["settings"], decisive(self.options))
            if state["categories"] != self.train.category_ids:
                differences.append(f"categories of {self.train.path}: the run has others")
            identity.check(self.out, state.get("identity"), self.parts, self.data)
            refuse_differences(f"--resume: {self.out}", differences)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step = self.reported_at = state["step"]
            self.seconds, self.sums = state["seconds"], dict(state["sums"])
            self.unreadable[0].load_state(state.get("unreadable", {}))
        except (KeyError, ValueError, RuntimeError) as error:
            raise CommandError(f"the checkpoint in {self.out} does not fit this run: {error}") from error
