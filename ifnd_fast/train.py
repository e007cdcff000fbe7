"""The training loop: pairs of views, one contrastive step, and every few epochs new pseudo labels."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ifnd_fast import checkpoint, distributed, features, run_folder
from ifnd_fast.config import Config, OptimConfig, to_dict
from ifnd_fast.console import progress, say, warn
from ifnd_fast.data import EpochBatches, Images, open_images, pair_loader, to_input
from ifnd_fast.errors import CommandError, NonFiniteError, UsageError
from ifnd_fast.evaluate.false_negatives import detection_statistics
from ifnd_fast.labels import PseudoLabels, acceptance_rate, scale_levels
from ifnd_fast.model import InBatch, MoCo, build
from ifnd_fast.ops import backends
from ifnd_fast.ops.info_nce import info_nce
from ifnd_fast.queue import NegativeQueue


def learning_rate(step: int, steps_per_epoch: int, config: OptimConfig) -> float:
    """Linear warm-up, then half a cosine from lr to 0 over the rest of the training."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def pick_device(name: str) -> torch.device:
    """Raises UsageError: no such device here."""
    if name == "auto":
        name = f"cuda:{distributed.local_rank()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def pick_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision on this device; None: off."""
    if amp == "auto":
        if device.type == "cuda":
            amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        else:
            amp = "bf16" if backends.cpu_has_bfloat16() else "off"
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[amp]


class Trainer:
    """A run in memory: everything that a checkpoint holds, and the methods that move it on.

    Args:
        config: of the run; its folder exists.

    Raises:
        UsageError: options and data don't go together (batch larger than the data, say).
    """

    def __init__(self, config: Config):
        self.config, self.out = config, config.run.out
        self.device = pick_device(config.run.device)
        self.amp = pick_amp(config.run.amp, self.device)
        self._open_data()
        torch.manual_seed(config.run.seed)
        self.encoder = encoder = build(config.model)()
        contrast = config.contrast
        if contrast.negatives == "queue":
            groups = max(1, contrast.bn_groups // distributed.world_size())
            model: MoCo | InBatch = MoCo(encoder, contrast.momentum, groups)
            queue = NegativeQueue(contrast.queue_size, config.model.dim, len(self.levels))
            self.queue: NegativeQueue | None = queue.to(self.device)
        else:
            model, self.queue = InBatch(encoder), None
        self.layout = torch.channels_last if config.run.channels_last else torch.contiguous_format
        self.model = model.to(self.device).to(memory_format=self.layout)
        if config.run.compile:
            for module in {model.query_encoder, model.feature_encoder}:
                module.compile()
        self.optimizer = torch.optim.SGD(
            model.query_encoder.parameters(),
            config.optim.lr,
            momentum=config.optim.sgd_momentum,
            weight_decay=config.optim.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        self.pseudo_labels = PseudoLabels(
            self.levels,
            temperature=contrast.temperature,
            max_iter=config.cluster.kmeans_iterations,
            n_init=config.cluster.kmeans_restarts,
            engine=config.cluster.kmeans_engine,
            spherical=config.cluster.spherical,
            seed=config.run.seed,
        )
        n = len(self.images)
        self.accepted = torch.full((n, len(self.levels)), -1, dtype=torch.int32, device=self.device)
        self.acceptance_rate = 0.0
        self.bank = torch.zeros(n, config.model.dim, device=self.device) if self._uses_bank else None
        self.batches = EpochBatches(
            n, config.optim.batch_size, config.run.seed, distributed.rank(), distributed.world_size()
        )
        self.epoch = self.step_in_epoch = self.step = 0
        self.unreadable: set[int] = set()
        self.totals = {"loss": 0.0, "seconds": 0.0, "feature_seconds": 0.0, "cluster_seconds": 0.0}
        self.seconds = 0.0  # of all epochs so far, also before a resume
        self.result: dict[str, float] = {}

    def _open_data(self) -> None:
        data, contrast = self.config.data, self.config.contrast
        images = open_images(data.data, "train", data.data_root)
        assert images is not None
        self.images: Images = images
        n, batch = len(images), self.config.optim.batch_size
        if batch > n:
            raise UsageError(f"--batch-size {batch} is larger than the data set ({n} images): lower it")
        if batch % distributed.world_size():
            raise UsageError(f"--batch-size {batch} must divide by the {distributed.world_size()} ranks")
        self.levels = self.config.cluster.levels
        if contrast.false_negatives == "oracle":
            if images.labels is None:
                raise UsageError("--false-negatives oracle needs images in one folder per class")
            self.levels = (int(images.labels.max()) + 1,)
        elif contrast.false_negatives != "keep" and max(self.levels) > n:
            if data.strict:
                raise UsageError(f"--levels {self.levels}: more clusters than the {n} images (--strict)")
            self.levels = scale_levels(self.levels, n)
            warn(f"only {n} images: --levels {self.config.cluster.levels} scaled down to {self.levels}")
        test_images = open_images(data.data, "test", data.data_root)
        measurable = images.labels is not None and (test_images is None or test_images.labels is not None)
        self.probe = features.KnnProbe(images, test_images) if measurable else None

    @property
    def _clusters(self) -> bool:
        return self.config.contrast.false_negatives in ("eliminate", "attract")

    @property
    def _uses_bank(self) -> bool:
        return self._clusters and self.config.cluster.features == "bank"

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    # ---- the loop ----

    def fit(self) -> dict[str, float]:
        """Train to the end from wherever the run is; the result's figures."""
        if self.probe is not None and "knn_top1_untrained" not in self.result:
            pixels = (lambda images: features.raw_pixels(images, self.config.data)) if self._small else None
            if pixels is not None:
                self.result["knn_top1_raw_pixels"] = self.probe.accuracy(pixels)
            self.result["knn_top1_untrained"] = self.knn_top1()
        loader = pair_loader(self.images, self.config.data, self.config.run.seed, self.batches)
        ddp = self._distributed_model()
        while self.epoch < self.config.optim.epochs:
            if self.step_in_epoch == 0:
                self._recluster()
            self._run_epoch(loader, ddp)
        return self._finish()

    @property
    def _small(self) -> bool:
        return 3 * self.config.data.image_size**2 <= 4096 and len(self.images) <= 100_000

    def _distributed_model(self) -> nn.Module:
        if distributed.world_size() == 1:
            return self.model
        return DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def _run_epoch(self, loader: Any, model: nn.Module) -> None:
        """The epoch's remaining steps, its line of metrics and its checkpoint."""
        n_steps, optim = len(self.batches), self.config.optim
        checkpoint_steps = max(1, round(self.config.run.checkpoint_every * n_steps))
        self.batches.start(self.epoch, self.step_in_epoch)
        self.model.train()
        loss_sum = torch.tensor(self.totals["loss"], dtype=torch.float64, device=self.device)
        bad_step = torch.full((), torch.iinfo(torch.int64).max, device=self.device)
        started = time.perf_counter()
        title = f"epoch {self.epoch + 1}/{optim.epochs}"
        with progress(title, n_steps, self.step_in_epoch) as advance:
            for view, other_view, indices, wanted in loader:
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.step, n_steps, optim)
                self._note_unreadable(indices, wanted)
                loss, indices = self._train_step(model, view, other_view, indices)
                loss_sum += loss
                bad_step = torch.where(loss.isfinite(), bad_step, bad_step.clamp(max=self.step + 1))
                self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
                advance(1, f"loss {loss.item():.3f}" if self.step % 10 == 0 else "")
                last = self.step_in_epoch == n_steps
                if last or self.step % 50 == 0 or self.device.type == "cpu":
                    self._check_finite(bad_step)
                if not last and self.step % checkpoint_steps == 0:
                    self.totals["loss"] = float(loss_sum)
                    self.totals["seconds"] += time.perf_counter() - started
                    started = time.perf_counter()
                    self.save()
        self.totals["loss"] = float(loss_sum)
        self.totals["seconds"] += time.perf_counter() - started
        self.last_indices = indices
        self._end_epoch(n_steps, checkpoint_steps)

    def _train_step(
        self, model: nn.Module, view: Tensor, other_view: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One update of the encoders and the queue; the loss, and every rank's indices."""
        view, other_view = (
            to_input(v, self.config.data, self.device).contiguous(memory_format=self.layout)
            for v in (view, other_view)
        )
        indices = indices.to(self.device, non_blocking=True)
        with self.autocast():
            query, key = model(view, other_view, shuffle_seed=self.step)
        loss = self._loss(query, key, indices)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.update_key_encoder()
        keys, indices = distributed.all_gather(key.detach()), distributed.all_gather(indices)
        if self.queue is not None:
            self.queue.enqueue(keys, self.accepted[indices], indices)
        if self.bank is not None:
            self.bank[indices] = keys
        return distributed.sum_over_ranks(loss.detach().clone()) / distributed.world_size(), indices

    def _loss(self, query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
        """IFND's loss against the queue, or against all views of the batch's other images (NT-Xent)."""
        strategy = self.config.contrast.false_negatives
        if self.queue is not None:
            positive, (negatives, negative_labels, negative_ids) = key, self.queue.negatives()
        else:
            query, positive = torch.cat([query, key]), torch.cat([key, query])
            indices = torch.cat([indices, indices])
            negatives, negative_ids = distributed.all_gather_with_grad(query), distributed.all_gather(indices)
            negative_labels = self.accepted[negative_ids]
        return info_nce(
            query,
            positive,
            negatives,
            temperature=self.config.contrast.temperature,
            query_labels=self.accepted[indices],
            negative_labels=negative_labels,
            query_ids=indices,
            negative_ids=negative_ids,
            false_negatives="eliminate" if strategy == "oracle" else strategy,
        )

    # ---- pseudo labels ----

    def _recluster(self) -> None:
        """New pseudo labels when they are due, or the true ones for the oracle."""
        if self.config.contrast.false_negatives == "oracle":
            assert self.images.labels is not None
            labels = torch.from_numpy(self.images.labels).int()[:, None].to(self.device)
            self._accept(labels, 1.0)
            return
        epochs = self.config.optim.epochs
        rate = acceptance_rate(self.epoch / epochs, self.config.cluster.acceptance_end)
        if not self._clusters or self.epoch % self.config.recluster_epochs or rate == 0:
            return
        started = time.perf_counter()
        vectors, usable = self._cluster_features()
        if not torch.isfinite(vectors).all():
            raise NonFiniteError(f"features are not finite at step {self.step}; {self._way_back()}")
        self.totals["feature_seconds"] += time.perf_counter() - started
        started = time.perf_counter()
        accepted = torch.full_like(self.accepted, -1)
        if distributed.rank() == 0:
            self._fit_pseudo_labels(vectors[usable])
            accepted[usable] = self.pseudo_labels.accept(rate)
        self._accept(distributed.broadcast(accepted), rate)
        self.totals["cluster_seconds"] += time.perf_counter() - started

    def _fit_pseudo_labels(self, vectors: Tensor) -> None:
        iterations = len(self.levels) * self.config.cluster.kmeans_iterations
        with progress("clustering", iterations) as advance:
            try:
                self.pseudo_labels.fit(vectors, progress=lambda *_: advance())
            except ValueError as error:  # too few different images for the clusters, say
                raise CommandError(f"clustering failed after epoch {self.epoch}: {error}") from error

    def _cluster_features(self) -> tuple[Tensor, Tensor]:
        """Unit features (N, D) and which rows hold any, (N,): not those of images unread or not yet seen."""
        if self.bank is not None:
            return self.bank, self.bank.any(dim=1)
        encoder = self.model.feature_encoder
        vectors, readable = features.extract(
            encoder, self.images, self.config.data, self.device, self.autocast
        )
        for index in (~readable).nonzero().flatten().tolist():
            self._skip(index)
        return vectors, readable

    def _accept(self, labels: Tensor, rate: float) -> None:
        self.accepted, self.acceptance_rate = labels, rate
        if self.queue is not None:
            self.queue.relabel(labels)

    # ---- what is reported and kept ----

    def _end_epoch(self, n_steps: int, checkpoint_steps: int) -> None:
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        metrics = self._metrics(n_steps)
        every, epochs = self.config.run.knn_every, self.config.optim.epochs
        if self.probe is not None and (self.epoch == epochs or (every and self.epoch % every == 0)):
            metrics["knn_top1"] = self.knn_top1()
        self._report(metrics)
        self.seconds += sum(seconds for name, seconds in self.totals.items() if name != "loss")
        self.totals = dict.fromkeys(self.totals, 0.0)
        due = self.step // checkpoint_steps > (self.step - n_steps) // checkpoint_steps
        if due or self.epoch == epochs:
            self.save()

    def _metrics(self, n_steps: int) -> dict[str, Any]:
        """The epoch's line of metrics.jsonl."""
        if self.queue is not None:
            _, queue_labels, queue_indices = self.queue.negatives()
        else:
            queue_indices = self.last_indices
            queue_labels = self.accepted[queue_indices]
        labels = self.images.labels
        detected = detection_statistics(
            self.accepted, queue_labels, queue_indices, None if labels is None else torch.from_numpy(labels)
        )
        images = n_steps * self.config.optim.batch_size
        return {
            "epoch": self.epoch,
            "step": self.step,
            "loss": self.totals["loss"] / n_steps,
            "lr": self.optimizer.param_groups[0]["lr"],
            "acceptance_rate": self.acceptance_rate,
            **detected,
            "images_per_second": images / self.totals["seconds"],
            **{name: seconds for name, seconds in self.totals.items() if name != "loss"},
        }

    def _report(self, metrics: dict[str, Any]) -> None:
        if distributed.rank() == 0:
            run_folder.append_metrics(self.out, metrics)
            if self.config.run.tensorboard:
                run_folder.write_tensorboard(self.out, metrics)
        counts = " ".join(f"{count:.1f}" for count in metrics["false_negatives_per_query"])
        knn = f"  kNN {metrics['knn_top1']:.2f} %" if "knn_top1" in metrics else ""
        say(
            f"epoch {self.epoch}/{self.config.optim.epochs}  loss {metrics['loss']:.3f}"
            f"  lr {metrics['lr']:.4f}  accepted {100 * self.acceptance_rate:.0f} %"
            f"  false negatives/query {counts}  {metrics['images_per_second']:.0f} images/s{knn}"
        )

    def knn_top1(self) -> float:
        """kNN accuracy of the query encoder's backbone, percent."""
        assert self.probe is not None
        backbone = self.encoder.backbone
        return self.probe.accuracy(
            lambda images: features.extract(
                backbone, images, self.config.data, self.device, self.autocast, "kNN features"
            )[0]
        )

    def _finish(self) -> dict[str, float]:
        """Write the backbone and the result."""
        if self.probe is not None:
            self.result["knn_top1"] = self.knn_top1()
        self.result["seconds"] = self.seconds
        if distributed.rank() == 0:
            backbone = {name: value.cpu() for name, value in self.encoder.backbone.state_dict().items()}
            checkpoint.write_atomically(self.out / "backbone.pt", lambda file: torch.save(backbone, file))
            run_folder.write_result(self.out, self.result)
        return self.result

    # ---- guards ----

    def _check_finite(self, bad_step: Tensor) -> None:
        step = int(bad_step)
        if step <= self.step:
            raise NonFiniteError(f"the loss is not finite at step {step}; {self._way_back()}")

    def _way_back(self) -> str:
        found = checkpoint.list_checkpoints(self.out)
        where = f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        return f"{where}; a lower --lr, a warm-up or --amp off may help"

    def _note_unreadable(self, indices: Tensor, wanted: Tensor) -> None:
        if torch.equal(indices, wanted):
            return
        if bool((indices < 0).any()):
            first = self.images.name(int(wanted[indices < 0][0]))
            raise CommandError(f"100 images in a row can't be read, from {first} on")
        for index in wanted[indices != wanted].tolist():
            self._skip(index)

    def _skip(self, index: int) -> None:
        """Warn once of an image that can't be read; with --strict, stop."""
        if index in self.unreadable:
            return
        if self.config.data.strict:
            raise CommandError(f"unreadable image (--strict): {self.images.name(index)}")
        self.unreadable.add(index)
        warn(f"unreadable image skipped: {self.images.name(index)} ({len(self.unreadable)} so far)")

    # ---- checkpoints ----

    def save(self) -> None:
        """Write a checkpoint, from rank 0."""
        if distributed.rank() == 0:
            checkpoint.save(self.out, self.state_dict(), self.config.run.keep_checkpoints)
        distributed.barrier()

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
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
            "unreadable": sorted(self.unreadable),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "negatives": None if self.queue is None else self.queue.state_dict(),
            "pseudo_labels": self.pseudo_labels.state_dict(),
            "accepted": self.accepted,
            "acceptance_rate": self.acceptance_rate,
            "bank": self.bank,
            "rng": rng,
        }

    def resume(self) -> None:
        """Go on from the run's newest readable checkpoint.

        Raises:
            CommandError: there is none, or it is of another model or data set.
        """
        self.load_state_dict(checkpoint.load_latest(self.out))
        if distributed.rank() == 0:
            run_folder.truncate_metrics(self.out, self.epoch)
        say(f"going on with {self.out} after epoch {self.epoch}, step {self.step}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CommandError: the state is of another model or data set."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.queue is not None:
                self.queue.load_state_dict(state["negatives"])
            accepted, self.acceptance_rate = state["accepted"], state["acceptance_rate"]
            if accepted.shape != self.accepted.shape:
                raise ValueError(f"labels {tuple(accepted.shape)} for {len(self.images)} images")
            self.accepted = accepted.to(self.device)
            self.pseudo_labels.load_state_dict(state["pseudo_labels"])
            if self.bank is not None:
                self.bank.copy_(state["bank"])
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CommandError(f"the checkpoint does not fit this run: {error}") from error
        self.epoch, self.step_in_epoch, self.step = state["epoch"], state["step_in_epoch"], state["step"]
        self.totals, self.result = dict(state["totals"]), dict(state["result"])
        self.seconds = state["seconds"]
        self.unreadable = set(state["unreadable"])
