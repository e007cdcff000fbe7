"""The training loop: pairs of views, one contrastive step, and every few epochs new pseudo labels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ifnd_fast.config import Config, differences, from_dict, to_dict
from ifnd_fast.data.batch_views import InputViews
from ifnd_fast.data.images import Images
from ifnd_fast.data.loading import EpochBatches, pair_loader
from ifnd_fast.data.processes import running
from ifnd_fast.data.unreadable import Unreadable
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.checkpoint import random_state, set_random_state
from ifnd_fast.runtime.compute import Compute, pick_compute
from ifnd_fast.runtime.console import progress
from ifnd_fast.runtime.errors import CommandError
from ifnd_fast.runtime.session import Session, refuse_differences
from ifnd_fast.runtime.spans import span
from ifnd_fast.training import precheck, saved_run
from ifnd_fast.training.feature_watch import FeatureWatch
from ifnd_fast.training.initial_weights import initial_weights
from ifnd_fast.training.labeller import Labeller
from ifnd_fast.training.loggers import Loggers
from ifnd_fast.training.measuring import Measuring, report_epoch
from ifnd_fast.training.objective import across_ranks, build_objective, exchanging, memory_format
from ifnd_fast.training.optimization import Optimization
from ifnd_fast.training.precision import settle
from ifnd_fast.training.run_images import RunImages
from ifnd_fast.training.schedule import learning_rate
from ifnd_fast.training.watch import Watch


class Trainer:
    """A run in memory: everything that a checkpoint holds, and the methods that move it on.

    Args:
        config: of the run.
        compute: None: as the config says.
        backbone: any network, (B, 3, S, S) -> (B, n_features), in place of that of --arch; as it is, on the CPU.
        images: to train on and to measure with (None: every tenth of those), in place of those of --data.

    Raises:
        UsageError: options and data don't go together (a batch larger than the data, say).
    """

    def __init__(
        self,
        config: Config,
        compute: Compute | None = None,
        backbone: nn.Module | None = None,
        images: tuple[Images, Images | None] | None = None,
    ):
        self.config, self.out = config, config.run.out
        self.session = Session(self.out, config.run.resume, config.run.keep_checkpoints)
        start = initial_weights(config, backbone)  # a file that lacks is missed before images are looked for
        self.data = RunImages(config, images)
        self.images = self.data.train
        self.compute = settle(config, compute or pick_compute(config.run.device, config.run.amp), backbone)
        self.device = self.compute.device
        self.unreadable = Unreadable(self.images, config.data.strict)
        self.labeller = Labeller(config, self.images, self.compute)
        self.measuring = Measuring(config, self.images, self.data.tests, self.unreadable, self.compute)
        self.batches = EpochBatches(
            len(self.images), config.optim.batch_size, config.run.seed, distributed.rank(), distributed.world_size()
        )
        torch.manual_seed(config.run.seed)
        self.objective = build_objective(config, len(self.labeller.levels), self.compute, start, backbone)
        self.model, self.encoder = self.objective.model, self.objective.encoder
        self.views = InputViews(config.data, self.device, memory_format(config))
        self.optimization = Optimization(config.optim, self.encoder, self.compute)
        self.epoch = self.step_in_epoch = self.step = 0
        self.totals = {"loss": 0.0, "seconds": 0.0, "skipped": 0.0}  # of this epoch
        self.seconds = 0.0  # of all epochs so far, also before a resume
        self.watch, self.feature_watch = Watch(self.session, self.device), FeatureWatch(config)
        self.loggers = Loggers(config)

    # ---- the loop ----

    def open(self) -> AbstractContextManager[None]:
        """The run's folder, begun or gone on with, while the run trains; see `Session.open` for what it raises."""
        return self.session.open(self, lambda: saved_run.begin(self.config, self.data.listings()))

    def fit(self) -> dict[str, Any]:
        """Train to the end from wherever the run is; the result's figures."""
        precheck.tell_plan(self.config, len(self.images), self.epoch)
        with self.loggers:
            self.measuring.before_training(self.encoder)
            for _ in self.epochs():
                pass
            return self._finish()

    def epochs(self) -> Iterator[None]:
        """Train the rest of the run, an epoch at a time."""
        model = across_ranks(self.model, self.config.optim.accumulate)
        # One iteration for all epochs: the first batches of the next are loaded during the end of this one.
        self.batches.start(self.epoch, self.step_in_epoch, self.config.optim.epochs)
        loader = pair_loader(self.images, self.config.data, self.config.run.seed, self.batches)
        with running(loader) as batches:
            while self.epoch < self.config.optim.epochs:
                with self.session.stop.deferred():  # else one rank would stop between the epochs, and the others not
                    if self.step_in_epoch == 0:
                        self._renew_labels()
                    with span("epoch"):
                        last_indices = self._train_epoch(batches, model)
                    self._end_epoch(last_indices)
                yield

    def _renew_labels(self) -> None:
        if self.labeller.start_epoch(self.epoch, self.model.feature_encoder, self.unreadable):
            self.objective.relabel(self.labeller.labels.accepted)

    def _train_epoch(self, batches: Iterator[list[Any]], model: nn.Module) -> Tensor:
        """The epoch's remaining steps; the indices of the last one's images."""
        n_steps, epochs = len(self.batches), self.config.optim.epochs
        self.model.train()
        loss_sum = torch.tensor(self.totals["loss"], dtype=torch.float64, device=self.device)
        started = time.perf_counter()
        title, further = f"epoch {self.epoch + 1}/{epochs}", n_steps * (epochs - self.epoch - 1)
        images = self.config.optim.batch_size
        with progress(title, n_steps, self.step_in_epoch, images=images, further=further) as advance:
            while self.step_in_epoch < n_steps:
                with span("load"):
                    *loaded, indices, wanted, reasons = next(batches)
                    self.unreadable.note(indices, wanted, reasons)
                with span("step"):
                    loss, indices = self._train_step(model, loaded, indices)
                self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
                loss_sum += loss
                look = self.device.type == "cpu" or self.step % 20 == 0  # at a GPU's loss only now and then:
                advance(1, f"loss {loss.item():.3f}" if look else "")  # that waits for it
                last = self.step_in_epoch == n_steps
                if look or last:
                    with span("watch"):
                        self.watch.act(self.step)
                if last or self.session.stopping or self._checkpoint_due():
                    self.totals["loss"] = float(loss_sum)
                    self.totals["seconds"] += time.perf_counter() - started
                    if not last:
                        self.save()
                        self.session.stop_if_asked()
                    started = time.perf_counter()
        return indices

    def _train_step(self, model: nn.Module, loaded: list[Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
        """One update of the encoders and the negatives; the loss and the indices of the images, of every rank."""
        with span("views"):
            indices = indices.to(self.device, non_blocking=True)
            views = self.views(loaded)
        query, key, loss = self._backward(model, views, indices)
        self.totals["skipped"] += self.optimization.step(learning_rate(self.step, len(self.batches), self.config.optim))
        with span("moving average"):
            self.model.update_key_encoder()
        with span("queue"):
            keys, indices = distributed.all_gather_rows(key, indices)
            self.objective.after_step(keys, indices, self.labeller.labels.accepted)
            self.labeller.observe(keys, indices)
        with span("watch"):
            self.feature_watch.note(query, key)
            return self.watch.note(self.step + 1, query, key, loss), indices

    def _backward(self, model: nn.Module, views: tuple[Tensor, ...], indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step's gradient, in --accumulate parts; queries and keys (B, dim) and the loss of all of them."""
        parts = [*zip(*(rows.tensor_split(self.config.optim.accumulate) for rows in (*views, indices)), strict=True)]
        found = []
        for number, (view, other_view, own) in enumerate(parts, 1):
            with exchanging(model, gradients=number == len(parts)):
                with self.compute.autocast():
                    outputs = model(view, other_view, shuffle_seed=self.step)
                query, key = (out.to(self.compute.contrast_dtype) for out in outputs)
                with span("loss"):
                    loss = self.objective.loss(query, key, own, self.labeller.labels.accepted)
                    loss = loss * (len(own) / len(indices))
                self.optimization.backward(loss)
            found.append((query.detach(), key.detach(), loss.detach()))
        queries, keys, losses = zip(*found, strict=True)
        return torch.cat(queries), torch.cat(keys), torch.stack(losses).sum()

    def _end_epoch(self, last_indices: Tensor) -> None:
        """The epoch's metrics and checkpoint."""
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        for buffer in self.model.buffers():  # batch norm's: each rank measures with those of its own images otherwise
            distributed.broadcast(buffer)
        metrics = self._metrics(last_indices) | self.measuring.after_epoch(self.epoch, self.encoder)
        report_epoch(self.config, metrics)
        self.loggers.log(metrics)
        self.objective.check_ranks(self.epoch)
        self.seconds += self.totals["seconds"] + sum(self.labeller.seconds.values())
        for totals in (self.totals, self.labeller.seconds):
            totals.update(dict.fromkeys(totals, 0.0))
        last = self.epoch == self.config.optim.epochs
        if last or self.session.stopping or self._checkpoint_due():
            self.save()
        if not last:
            self.session.stop_if_asked()

    def _metrics(self, last_indices: Tensor) -> dict[str, Any]:
        """The epoch's line of metrics.jsonl; in-batch detection is counted against the last step's images."""
        labels, n_steps = self.labeller.labels, len(self.batches)
        negatives = self.objective.negatives(last_indices, labels.accepted)
        return {
            "epoch": self.epoch,
            "step": self.step,
            "loss": self.totals["loss"] / n_steps,
            "lr": self.optimization.lr,
            "acceptance_rate": labels.acceptance_rate,
            **self.measuring.detection(labels.accepted, *negatives),
            "images_per_second": n_steps * self.config.optim.batch_size / self.totals["seconds"],
            "seconds": self.totals["seconds"],
            **self.labeller.seconds,
            **({"skipped_steps": int(self.totals["skipped"])} if self.optimization.scaler.is_enabled() else {}),
            **labels.quality,
            **self.feature_watch.figures(self.epoch),
        }

    def _finish(self) -> dict[str, Any]:
        """Write the backbone and the result."""
        result = {**self.measuring.result, "seconds": self.seconds}
        if distributed.rank() == 0:
            saved_run.write_result(self.out, self.encoder.backbone, {**result, "unreadable": self.unreadable.listed()})
        return result

    # ---- checkpoints ----

    def _checkpoint_due(self) -> bool:
        return self.step % max(1, round(self.config.run.checkpoint_every * len(self.batches))) == 0

    def save(self) -> None:
        """Write a checkpoint, from rank 0; all ranks have to call it."""
        with span("checkpoint"):
            self.session.save(self.state_dict())

    def position(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on; the order and the views of images follow from the steps."""
        return {
            "config": to_dict(self.config),
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "step": self.step,
            "totals": self.totals,
            "seconds": self.seconds,
            "result": self.measuring.result,
            "unreadable": self.unreadable.state(),
            "model": self.model.state_dict(),
            **self.optimization.state_dict(),
            "negatives": self.objective.state_dict(),
            **self.labeller.state_dict(),
            "recent_pairs": self.feature_watch.state(),
            "rng": random_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UsageError, CommandError: the state is of a run with other options, model or data."""
        refuse_differences("the checkpoint", differences(from_dict(state["config"]), self.config))
        try:
            self.model.load_state_dict(state["model"])
            self.optimization.load_state_dict(state)
            self.objective.load_state_dict(state["negatives"])
            self.labeller.load_state_dict(state)
            self.feature_watch.load_state(state.get("recent_pairs", []), self.device)  # not in earlier versions'
            set_random_state(state["rng"], self.device)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CommandError(f"the checkpoint does not fit this run: {error}") from error
        self.epoch, self.step_in_epoch, self.step = state["epoch"], state["step_in_epoch"], state["step"]
        self.totals, self.seconds = dict(state["totals"]), state["seconds"]
        self.measuring.result = dict(state["result"])
        self.unreadable.load_state(state["unreadable"])
