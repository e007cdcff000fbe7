"""Lightning: a queue of keys and pseudo labels as a pair of callbacks, for a LightningModule's own training_step."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ifnd_fast.clustering.acceptance import acceptance_rate
from ifnd_fast.clustering.pseudo_labels import PseudoLabels
from ifnd_fast.contrast.loss import IFNDLoss
from ifnd_fast.contrast.queue import NegativeQueue
from ifnd_fast.ops import checks
from ifnd_fast.runtime import distributed

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(f"{error}: pip install 'ifnd-fast[lightning]'") from error


class KeyQueue(Callback):
    """Negatives of a LightningModule: its training_step returns `queue.loss(query, key, indices)`, and the keys, of all
    ranks, go into the queue when the step is done. The queue is part of the trainer's checkpoints.

    Args:
        size: K, the most keys it holds.
        dim: D of a key.
        levels: L, levels of the labels: as many as `PseudoLabelRenewal` has; 1 without it.
        dtype: of the stored keys, and of what the loss is computed from: float32, float16 or bfloat16.
        loss: the settings of an `ifnd_fast.IFNDLoss` (temperature, false_negatives, ...).

    Attributes:
        queue: the `ifnd_fast.NegativeQueue`.
        labels: (N, L) int32, accepted pseudo labels of all images; None before there are any.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or out of range.

    Example:
        >>> queue = KeyQueue(4096, dim=16, temperature=0.1)
        >>> query, key = (torch.nn.functional.normalize(torch.randn(8, 16)) for _ in range(2))
        >>> queue.loss(query, key, torch.arange(8)).shape
        torch.Size([])
    """

    def __init__(self, size: int, dim: int, levels: int = 1, dtype: torch.dtype = torch.float32, **loss: Any):
        self.queue, self.loss_fn = NegativeQueue(size, dim, levels, dtype), IFNDLoss(**loss)
        self.labels: Tensor | None = None
        self._keys: list[tuple[Tensor, Tensor]] = []  # of this step, with their indices

    def loss(self, query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
        """The loss against the queue, whose negatives are keys of earlier steps.

        Args:
            query: (B, D) of one view, with gradient.
            key: (B, D) of the other view: the positives.
            indices: (B,) int64 numbers of the images in the data set.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype, shape or device.
        """
        query, key = (rows.to(self.queue.features.dtype) for rows in (query, key))
        negatives, negative_labels, negative_ids = self.queue.negatives()
        if torch.is_grad_enabled():  # not in validation
            self._keys.append((key.detach(), indices))
        labels = None if self.labels is None else self.labels[indices]
        return self.loss_fn(
            query, key, negatives, labels, None if labels is None else negative_labels, indices, negative_ids
        )

    def relabel(self, labels: Tensor) -> None:
        """From now on all images have these labels, (N, L) int32, -1 for none; those of the keys too."""
        self.queue.relabel(labels.to(self.queue.labels.device))
        self.labels = labels.to(self.queue.labels.device)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.queue.to(pl_module.device)
        self.labels = None if self.labels is None else self.labels.to(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for key, indices in self._keys:
            key, indices = distributed.all_gather_rows(key, indices)
            self.queue.enqueue(key, None if self.labels is None else self.labels[indices], indices)
        self._keys.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"queue": self.queue.state_dict(), "labels": self.labels}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.queue.load_state_dict(state_dict["queue"])
        self.labels = state_dict["labels"]


class PseudoLabelRenewal(Callback):
    """Pseudo labels for a `KeyQueue`, renewed before every n-th epoch but the first, as many as are trusted by then.

    The features are those of `pl_module(images)`, so of the LightningModule's forward, normalised, in evaluation mode.
    The share of accepted labels rises linearly over the training (`ifnd_fast.clustering.acceptance`).

    Args:
        loader: of all N images, once each, in views without randomness: batches (images, ..., indices), with the (B,)
            numbers of the images in the data set last. Of several ranks each clusters a part; give it torch's
            DistributedSampler(shuffle=False), so that each passes a part through the network, too.
        queue: gets the labels.
        levels: C_l, clusters at each level, at most about N / 4.
        every_n_epochs: between renewals.
        acceptance_end: the fraction of the training from which on no more labels are accepted.
        acceptance_max: share of the labels that is accepted from there on.
        clustering: other settings of `ifnd_fast.PseudoLabels` (temperature, max_iter, seed, ...).

    Attributes:
        pseudo_labels: the last clustering, an `ifnd_fast.PseudoLabels`.
        acceptance_rate: share of its labels that is in use, 0..1.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or out of range; in training, images whose features are
            missing or not finite, fewer of them than clusters, or a Trainer without max_epochs.
    """

    def __init__(
        self,
        loader: DataLoader,
        queue: KeyQueue,
        levels: Sequence[int],
        every_n_epochs: int = 1,
        acceptance_end: float = 1.0,
        acceptance_max: float = 1.0,
        **clustering: Any,
    ):
        acceptance_rate(0.0, acceptance_end, acceptance_max)
        self.loader, self.queue = loader, queue
        self.n_images = len(cast(Sized, loader.dataset))
        self.every_n_epochs = checks.integer("every_n_epochs", every_n_epochs, 1)
        self.acceptance_end, self.acceptance_max, self.acceptance_rate = acceptance_end, acceptance_max, 0.0
        self.pseudo_labels = PseudoLabels(levels, distributed=True, **clustering)
        if queue.queue.labels.shape[1] != len(self.pseudo_labels.levels):
            raise ValueError(
                f"levels has {len(self.pseudo_labels.levels)} levels, and the queue {queue.queue.labels.shape[1]}: "
                f"make it by KeyQueue(..., levels={len(self.pseudo_labels.levels)})"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch == 0 or epoch % self.every_n_epochs != 0:
            return
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise ValueError(
                "the Trainer needs max_epochs, of which the done share says how many labels are accepted; "
                f"got {trainer.max_epochs}"
            )
        own = distributed.share(self.n_images)
        features = self._features(trainer, pl_module)[own.start : own.stop]
        done = epoch / trainer.max_epochs
        self.acceptance_rate = acceptance_rate(done, self.acceptance_end, self.acceptance_max)
        self.queue.relabel(self.pseudo_labels.fit(features).accept(self.acceptance_rate))

    @torch.no_grad()
    def _features(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        """Unit features (N, D) of all images, by their numbers."""
        for buffer in pl_module.buffers():  # batch norm's: each rank's are of its own images
            distributed.broadcast(buffer)
        modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        features, numbers = [], []
        with trainer.precision_plugin.forward_context():
            for batch in self.loader:
                batch = trainer.precision_plugin.convert_input(batch)  # as before a training step
                images, *_, indices = trainer.strategy.batch_to_device(batch, pl_module.device)
                features.append(F.normalize(pl_module(images).float(), dim=1))
                numbers.append(indices)
        for module, training in modes.items():
            module.training = training
        found, indices = distributed.gather_rows(torch.cat(features)), distributed.gather_rows(torch.cat(numbers))
        missing = self.n_images - len(indices.unique())
        if missing:
            raise ValueError(f"loader gave no features of {missing} of {self.n_images} images: it must give each once")
        return torch.empty(self.n_images, found.shape[1], device=found.device).index_copy_(0, indices, found)

    def state_dict(self) -> dict[str, Any]:
        return {"pseudo_labels": self.pseudo_labels.state_dict(), "acceptance_rate": self.acceptance_rate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pseudo_labels.load_state_dict(state_dict["pseudo_labels"])
        self.acceptance_rate = state_dict["acceptance_rate"]
