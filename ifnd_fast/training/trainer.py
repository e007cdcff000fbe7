"""The training loop: pairs of views, one contrastive step, and every few epochs new pseudo labels."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ifnd_fast.config import Config, OptimConfig, from_dict, to_dict
from ifnd_fast.config import differences as differences_between
from ifnd_fast.contrast.encoder import build
from ifnd_fast.contrast.models import InBatch, MoCo
from ifnd_fast.contrast.queue import NegativeQueue
from ifnd_fast.data import features
from ifnd_fast.data.batch_views import BatchViews
from ifnd_fast.data.images import Images
from ifnd_fast.data.loading import EpochBatches, pair_loader
from ifnd_fast.data.processes import running
from ifnd_fast.data.sources import open_for_run
from ifnd_fast.data.unreadable import Unreadable
from ifnd_fast.data.views import to_input
from ifnd_fast.metrics.false_negatives import detection_statistics
from ifnd_fast.metrics.knn import KnnProbe
from ifnd_fast.ops.info_nce import info_nce
from ifnd_fast.runtime import checkpoint, distributed, run_folder
from ifnd_fast.runtime.compute import pick_amp, pick_contrast_dtype, pick_device
from ifnd_fast.runtime.console import progress, say
from ifnd_fast.runtime.errors import CommandError, NonFiniteError, Stopped, UsageError
from ifnd_fast.runtime.stop import StopSignals
from ifnd_fast.training.labeller import Labeller
from ifnd_fast.training.measuring import report_epoch

# In order of computation: of what turns bad in one step, the first is named.
WATCHED = ("the queries (the encoder's features) are", "the keys are", "the loss is")


def learning_rate(step: int, steps_per_epoch: int, config: OptimConfig) -> float:
    """Linear warm-up, then half a cosine from lr to 0 over the rest of the training."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class Trainer:
    """A run in memory: everything that a checkpoint holds, and the methods that move it on.

    Args:
        config: of the run.

    Raises:
        UsageError: options and data don't go together (a batch larger than the data, say).
    """

    def __init__(self, config: Config):
        self.config, self.out = config, config.run.out
        self.device = pick_device(config.run.device)
        self.amp = pick_amp(config.run.amp, self.device)
        self.contrast_dtype = pick_contrast_dtype(self.amp, self.device)
        self.images, self.probe = self._open_images()
        self.unreadable = Unreadable(self.images, config.data.strict)
        self.labeller = Labeller(config, self.images, self.device, self.contrast_dtype)
        self.draw = BatchViews(config.data) if config.data.augment == "device" else None
        self.batches = EpochBatches(
            len(self.images), config.optim.batch_size, config.run.seed, distributed.rank(), distributed.world_size()
        )
        torch.manual_seed(config.run.seed)
        self.encoder = build(config.model)()
        self.model, self.queue = self._build_model()
        self.optimizer = torch.optim.SGD(
            self.encoder.parameters(),
            config.optim.lr,
            momentum=config.optim.sgd_momentum,
            weight_decay=config.optim.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        self.updates = 0  # of the weights, in this process; the scaler skips those that would not be finite
        self.optimizer.register_step_post_hook(self._count_update)
        self.epoch = self.step_in_epoch = self.step = 0
        self.totals = {"loss": 0.0, "seconds": 0.0, "skipped": 0.0}  # of this epoch
        self.seconds = 0.0  # of all epochs so far, also before a resume
        self.result: dict[str, float] = {}
        self.stop = StopSignals()
        self.stopping = False  # every rank knows that one was asked to stop

    def _open_images(self) -> tuple[Images, KnnProbe | None]:
        data, batch = self.config.data, self.config.optim.batch_size
        images, tests = open_for_run(data)
        if images is None or batch > len(images):
            n = 0 if images is None else len(images)
            raise UsageError(f"--batch-size {batch} is larger than the data set ({n} images): lower it")
        if batch % distributed.world_size():
            raise UsageError(f"--batch-size {batch} must divide by the {distributed.world_size()} ranks")
        measurable = images.labels is not None and (tests is None or tests.labels is not None)
        return images, KnnProbe(images, tests) if measurable else None

    def _build_model(self) -> tuple[MoCo | InBatch, NegativeQueue | None]:
        contrast = self.config.contrast
        self.layout = torch.channels_last if self.config.run.channels_last else torch.contiguous_format
        if contrast.sync_bn:
            if self.device.type == "cpu":
                raise UsageError("--sync-bn: torch has it for GPUs only")
            self.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(self.encoder)
        if contrast.negatives == "queue":
            groups = 1 if contrast.sync_bn else max(1, contrast.bn_groups // distributed.world_size())
            model: MoCo | InBatch = MoCo(self.encoder, contrast.momentum, groups)
            levels = len(self.labeller.levels)
            queue: NegativeQueue | None = NegativeQueue(
                contrast.queue_size, self.config.model.dim, levels, self.contrast_dtype
            )
        else:
            model, queue = InBatch(self.encoder), None
        if self.config.run.compile:
            for encoder in {model.query_encoder, model.feature_encoder}:
                encoder.compile()
        model.to(self.device).to(memory_format=self.layout)
        return model, None if queue is None else queue.to(self.device)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    # ---- the loop ----

    def fit(self) -> dict[str, float]:
        """Train to the end from wherever the run is; the result's figures."""
        self._measure_before_training()
        for _ in self.epochs():
            pass
        return self._finish()

    def epochs(self) -> Iterator[None]:
        """Train the rest of the run, an epoch at a time."""
        model: nn.Module = self.model
        if distributed.world_size() > 1:
            # every step has the same graph; the bits are the same with and without
            model = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
        # One iteration for all epochs: the first batches of the next are loaded during the end of this one.
        self.batches.start(self.epoch, self.step_in_epoch, self.config.optim.epochs)
        loader = pair_loader(self.images, self.config.data, self.config.run.seed, self.batches)
        with running(loader) as batches:
            while self.epoch < self.config.optim.epochs:
                with self.stop.deferred():  # else one rank would stop between the epochs, and the others not
                    self._renew_labels()
                    self._end_epoch(self._train_epoch(batches, model))
                yield

    def _renew_labels(self) -> None:
        if self.step_in_epoch == 0:
            encoder = self.model.feature_encoder
            renewed = self.labeller.start_epoch(self.epoch, encoder, self.autocast, self.unreadable)
            if renewed and self.queue is not None:
                self.queue.relabel(self.labeller.accepted)

    def _train_epoch(self, batches: Iterator[list[Any]], model: nn.Module) -> Tensor:
        """The epoch's remaining steps; the indices of the last one's images."""
        n_steps = len(self.batches)
        self.model.train()
        loss_sum = torch.tensor(self.totals["loss"], dtype=torch.float64, device=self.device)
        first = torch.full((len(WATCHED) + 1,), torch.iinfo(torch.int64).max, device=self.device)  # step of each
        started = time.perf_counter()
        with progress(f"epoch {self.epoch + 1}/{self.config.optim.epochs}", n_steps, self.step_in_epoch) as advance:
            for *loaded, indices, wanted, reasons in islice(batches, n_steps - self.step_in_epoch):
                self.unreadable.note(indices, wanted, reasons)
                loss, happened, indices = self._train_step(model, loaded, indices)
                self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
                loss_sum += loss
                first = torch.where(happened, first.clamp(max=self.step), first)
                look = self.device.type == "cpu" or self.step % 20 == 0  # at a GPU's loss only now and then:
                advance(1, f"loss {loss.item():.3f}" if look else "")  # that waits for it
                last = self.step_in_epoch == n_steps
                if look or last:
                    self._look_at(first.tolist())
                if last or self.stopping or self._checkpoint_due():
                    self.totals["loss"] = float(loss_sum)
                    self.totals["seconds"] += time.perf_counter() - started
                    if not last:
                        self.save()
                        self._stop_if_asked()
                    started = time.perf_counter()
        return indices

    def _views(self, loaded: list[Tensor]) -> tuple[Tensor, ...]:
        """The two views as the encoders take them, (B, 3, S, S), of what `pair_loader` gives."""
        if self.draw is not None:
            images, numbers = loaded
            images = images.to(self.device, non_blocking=True)
            loaded = [self.draw(images, numbers[:, view]) for view in range(2)]
        return tuple(
            to_input(view, self.config.data, self.device).contiguous(memory_format=self.layout) for view in loaded
        )

    def _train_step(self, model: nn.Module, loaded: list[Tensor], indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One update of the encoders and the queue; the loss, which of WATCHED are not finite and whether a rank was
        asked to stop, and the indices of every rank's images."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, len(self.batches), self.config.optim)
        indices = indices.to(self.device, non_blocking=True)
        views = self._views(loaded)
        with self.autocast():
            query, key = (out.to(self.contrast_dtype) for out in model(*views, shuffle_seed=self.step))
        loss = self._loss(query, key, indices)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        updates = self.updates
        self.scaler.step(self.optimizer)
        self.totals["skipped"] += updates == self.updates
        self.scaler.update()
        self.model.update_key_encoder()
        keys, indices = distributed.all_gather_rows(key.detach(), indices)
        if self.queue is not None:
            self.queue.enqueue(keys, self.labeller.accepted[indices], indices)
        self.labeller.observe(keys, indices)
        # a sum is not finite where one of its terms is not
        watched = torch.stack([part.detach().sum(dtype=torch.float32) for part in (query, key, loss)])
        asked = torch.full((1,), self.stop.number is not None, device=self.device)
        sums = distributed.sum_over_ranks(torch.cat([watched[-1:], ~watched.isfinite(), asked]))
        return sums[0] / distributed.world_size(), sums[1:] > 0, indices

    def _count_update(self, *_: object) -> None:
        self.updates += 1

    def _loss(self, query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
        """IFND's loss against the queue, or against all views of the batch's other images (NT-Xent)."""
        strategy, labels = self.config.contrast.false_negatives, self.labeller.accepted
        if self.queue is not None:
            positive, (negatives, negative_labels, negative_ids) = key, self.queue.negatives()
        else:
            query, positive = torch.cat([query, key]), torch.cat([key, query])
            indices = torch.cat([indices, indices])
            negatives, negative_ids = distributed.all_gather_with_grad(query), distributed.all_gather(indices)
            negative_labels = labels[negative_ids]
        return info_nce(
            query,
            positive,
            negatives,
            temperature=self.config.contrast.temperature,
            query_labels=labels[indices],
            negative_labels=negative_labels,
            query_ids=indices,
            negative_ids=negative_ids,
            false_negatives="eliminate" if strategy == "oracle" else strategy,
            level_combination=self.config.contrast.level_combination,
        )

    def _look_at(self, first: list[int]) -> None:
        """Act on the first steps at which each of WATCHED was not finite, and some rank was asked to stop."""
        *bad, stop = first
        self.stopping = stop <= self.step
        if min(bad) <= self.step:
            raise NonFiniteError(
                f"{WATCHED[bad.index(min(bad))]} not finite at step {min(bad)}; {checkpoint.where(self.out)}; "
                "a lower --lr, --warmup-epochs or --amp off may help"
            )

    def _stop_if_asked(self) -> None:
        if self.stopping:
            raise Stopped(self.stop.number or signal.SIGTERM)  # of another rank

    # ---- what is measured and kept ----

    def _measure_before_training(self) -> None:
        if self.probe is None or "knn_top1_untrained" in self.result:
            return
        if self.config.data.image_size <= 64 and len(self.images) <= 100_000:  # else their kNN takes too long
            self.result["knn_top1_raw_pixels"] = self.probe.accuracy(
                lambda images: features.raw_pixels(images, self.config.data)
            )
        self.result["knn_top1_untrained"] = self._knn_top1(self.probe)

    def _knn_top1(self, probe: KnnProbe) -> float:
        """kNN accuracy of the query encoder's backbone, percent."""
        return probe.accuracy(
            lambda images: features.extract(
                self.encoder.backbone, images, self.config.data, self.device, self.autocast, "kNN features"
            )[0]
        )

    def _end_epoch(self, last_indices: Tensor) -> None:
        """The epoch's metrics and checkpoint."""
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        for buffer in self.model.buffers():  # batch norm's: each rank measures with those of its own images otherwise
            distributed.broadcast(buffer)
        metrics = self._metrics(last_indices)
        every, last = self.config.run.knn_every, self.epoch == self.config.optim.epochs
        if self.probe is not None and (last or (every and self.epoch % every == 0)):
            metrics["knn_top1"] = self._knn_top1(self.probe)
            if last:
                self.result["knn_top1"] = metrics["knn_top1"]
        report_epoch(self.config, metrics)
        if self.queue is not None and not distributed.same_everywhere(*self.queue.negatives()):
            raise CommandError(f"the ranks' queues differ after epoch {self.epoch}: a memory or network fault")
        self.seconds += self.totals["seconds"] + sum(self.labeller.seconds.values())
        for totals in (self.totals, self.labeller.seconds):
            totals.update(dict.fromkeys(totals, 0.0))
        if last or self.stopping or self._checkpoint_due():
            self.save()
        if not last:
            self._stop_if_asked()

    def _metrics(self, last_indices: Tensor) -> dict[str, Any]:
        """The epoch's line of metrics.jsonl; in-batch detection is counted against the last step's images."""
        labels, accepted = self.images.labels, self.labeller.accepted
        if self.queue is not None:
            _, queue_labels, queue_indices = self.queue.negatives()
        else:
            queue_labels, queue_indices = accepted[last_indices], last_indices
        detected = detection_statistics(accepted, queue_labels, queue_indices, labels)
        n_steps = len(self.batches)
        return {
            "epoch": self.epoch,
            "step": self.step,
            "loss": self.totals["loss"] / n_steps,
            "lr": self.optimizer.param_groups[0]["lr"],
            "acceptance_rate": self.labeller.acceptance_rate,
            **detected,
            "images_per_second": n_steps * self.config.optim.batch_size / self.totals["seconds"],
            "seconds": self.totals["seconds"],
            **self.labeller.seconds,
            **({"skipped_steps": int(self.totals["skipped"])} if self.scaler.is_enabled() else {}),
            **self.labeller.quality,
        }

    def _finish(self) -> dict[str, float]:
        """Write the backbone and the result."""
        self.result["seconds"] = self.seconds
        if distributed.rank() == 0:
            backbone = {name: value.cpu() for name, value in self.encoder.backbone.state_dict().items()}
            checkpoint.write_atomically(self.out / "backbone.pt", lambda file: torch.save(backbone, file))
            run_folder.write_json(self.out / "result.json", {**self.result, "unreadable": self.unreadable.listed()})
        return self.result

    # ---- checkpoints ----

    def _checkpoint_due(self) -> bool:
        every = max(1, round(self.config.run.checkpoint_every * len(self.batches)))
        return self.step % every == 0

    def save(self) -> None:
        """Write a checkpoint, from rank 0."""
        state = self.state_dict()
        if distributed.rank() == 0:
            checkpoint.save(self.out, state, self.config.run.keep_checkpoints)
        distributed.barrier()

    def resume(self) -> None:
        """Go on from the run's newest readable checkpoint; from the beginning where none was written yet.

        Raises:
            CommandError: none can be read, or it is of another model or data set.
            UsageError: it was written with other options than the run's config.yaml has.
        """
        if not checkpoint.list_checkpoints(self.out):
            say(f"{self.out} has no checkpoint yet: beginning anew")
            if distributed.rank() == 0:
                run_folder.truncate_metrics(self.out, "epoch", 0)
            return
        state = checkpoint.load_latest(self.out)
        if differences := differences_between(from_dict(state["config"]), self.config):
            raise UsageError("the checkpoint was written with other options:\n  " + "\n  ".join(differences))
        self.load_state_dict(state)
        if distributed.rank() == 0:
            run_folder.truncate_metrics(self.out, "epoch", self.epoch)
        say(f"going on with {self.out} after epoch {self.epoch}, step {self.step}")

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on; the order and the views of images follow from the steps."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "config": to_dict(self.config),
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "step": self.step,
            "totals": self.totals,
            "seconds": self.seconds,
            "result": self.result,
            "unreadable": self.unreadable.state(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "negatives": None if self.queue is None else self.queue.state_dict(),
            **self.labeller.state_dict(),
            "rng": rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CommandError: the state is of another model or data set."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.queue is not None:
                self.queue.load_state_dict(state["negatives"])
            self.labeller.load_state_dict(state)
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CommandError(f"the checkpoint does not fit this run: {error}") from error
        self.epoch, self.step_in_epoch, self.step = state["epoch"], state["step_in_epoch"], state["step"]
        self.totals, self.seconds, self.result = dict(state["totals"]), state["seconds"], dict(state["result"])
        self.unreadable.load_state(state["unreadable"])
