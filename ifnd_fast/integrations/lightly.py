"""In place of lightly's NTXentLoss: `from ifnd_fast.integrations.lightly import NTXentLoss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ifnd_fast.contrast.loss import IFNDLoss
from ifnd_fast.contrast.queue import NegativeQueue
from ifnd_fast.ops import checks
from ifnd_fast.runtime import distributed


class NTXentLoss(nn.Module):
    """lightly.loss.NTXentLoss, fused, and with pseudo labels without its false negatives.

    The loss and the memory bank are lightly's (1.6): rows are normalised here; without a bank all other rows of both
    views are negatives (SimCLR), with one its rows are (MoCo). The bank starts with random unit rows, and a call whose
    `out0` requires a gradient puts `out1` in, which later calls see; what of a batch is beyond the bank's end is left
    out. Other than theirs the bank is in the state_dict, so that a training resumes with its negatives; one that
    lightly's saved, without a bank, is loaded too. Computed in float32 whatever the inputs are (float64 stays).

    Args:
        temperature: softmax temperature, 1e-6 to 1e6.
        memory_bank_size: (K, D) rows and their length; 0: no bank.
        gather_distributed: negatives are of all ranks, and so is what goes into the bank.
        false_negatives, level_combination, backend: see `ifnd_fast.info_nce`.
        levels: L, levels of the labels.

    Attributes:
        queue: the bank, an `ifnd_fast.NegativeQueue`; None without one. After new labels of all images call
            `loss_fn.queue.relabel(labels)`.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or out of range.

    Example:
        >>> loss_fn = NTXentLoss(temperature=0.2, memory_bank_size=(4096, 16))
        >>> loss_fn(torch.randn(8, 16), torch.randn(8, 16)).shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        false_negatives: str = "eliminate",
        level_combination: str = "mean",
        levels: int = 1,
        backend: str = "auto",
    ):
        super().__init__()
        self.contrast = IFNDLoss(temperature, false_negatives, level_combination=level_combination, backend=backend)
        self.gather_distributed = gather_distributed
        self.queue: NegativeQueue | None = None
        size: Sequence[int] = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if len(size) != 2 and size != (0,):
            raise ValueError(f"memory_bank_size must be 0 or (rows, length of a row), got {memory_bank_size!r}")
        if size[0] != 0:
            self.queue = NegativeQueue(size[0], size[1], levels)
            self.queue.enqueue(F.normalize(torch.randn(size), dim=1))

    @property
    def temperature(self) -> float | Tensor:
        return self.contrast.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.contrast.temperature = checks.temperature(value)

    def forward(
        self, out0: Tensor, out1: Tensor, labels: Tensor | None = None, indices: Tensor | None = None
    ) -> Tensor:
        """The mean loss, a scalar.

        Args:
            out0: (B, D) of one view.
            out1: (B, D) of the other, of the same images.
            labels: (B, L) int32 accepted pseudo labels of the images, -1 for none: `PseudoLabels.accept(...)[indices]`.
            indices: (B,) int64 numbers of the images in the data set: an image is never its own negative.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype, shape or range.
        """
        out0, out1 = (F.normalize(out if out.dtype == torch.float64 else out.float(), dim=1) for out in (out0, out1))
        if self.queue is None:
            return self._in_batch(out0, out1, labels, indices)
        return self._with_bank(self.queue, out0, out1, labels, indices)

    def _in_batch(self, out0: Tensor, out1: Tensor, labels: Tensor | None, indices: Tensor | None) -> Tensor:
        """Every row is a query; its positive is the image's other row, and its negatives are all rows but these two."""
        if indices is None:
            first = distributed.rank() * len(out0) if self.gather_distributed else 0
            indices = torch.arange(first, first + len(out0), dtype=torch.int64, device=out0.device)
        elif len(indices) and int(indices.min()) < 0:
            raise ValueError(f"indices must be 0 or more where there is no memory bank, got {int(indices.min())}")
        rows, positive, ids = torch.cat([out0, out1]), torch.cat([out1, out0]), torch.cat([indices, indices])
        labels = None if labels is None else torch.cat([labels, labels])
        negatives, negative_labels, negative_ids = rows, labels, ids
        if self.gather_distributed:
            negatives, negative_ids = distributed.all_gather_with_grad(rows), distributed.all_gather(ids)
            negative_labels = None if labels is None else distributed.all_gather(labels)
        return self.contrast(rows, positive, negatives, labels, negative_labels, ids, negative_ids)

    def _with_bank(
        self, queue: NegativeQueue, out0: Tensor, out1: Tensor, labels: Tensor | None, indices: Tensor | None
    ) -> Tensor:
        """Queries of one view, positives of the other, negatives of calls before this one."""
        negatives, negative_labels, negative_ids = queue.negatives()
        if out0.requires_grad:  # the bank changes before the backward pass
            negatives = negatives.clone()
        loss = self.contrast(
            out0, out1, negatives.to(out0.dtype),
            labels, None if labels is None else negative_labels, indices, None if indices is None else negative_ids,
        )  # fmt: skip
        if out0.requires_grad:
            self._enqueue(queue, out1.detach(), labels, indices)
        return loss

    def _enqueue(self, queue: NegativeQueue, keys: Tensor, labels: Tensor | None, indices: Tensor | None) -> None:
        gather = distributed.all_gather if self.gather_distributed else lambda rows: rows
        room = queue.size - queue.pointer
        labels, indices = (None if rows is None else gather(rows)[:room] for rows in (labels, indices))
        queue.enqueue(gather(keys)[:room], labels, indices)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """What lightly saved has no bank: the one that is here stays."""
        if self.queue is not None and not any(name.startswith(f"{prefix}queue.") for name in state_dict):
            state_dict |= {f"{prefix}queue.{name}": value for name, value in self.queue.state_dict().items()}
        super()._load_from_state_dict(state_dict, prefix, *arguments)
