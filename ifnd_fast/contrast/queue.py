"""NegativeQueue: the most recent keys, as negatives, with their pseudo labels and dataset indices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ifnd_fast.ops import checks


class NegativeQueue(nn.Module):
    """MoCo's queue of keys (He et al., 2020), which also knows which image each key is of and its labels.

    A ring: key number t (from 0, over the queue's life) is in slot t mod K. So slots 0..count-1 are filled,
    in order of arrival until the queue is full; from then on the oldest key is at `pointer`.

    `pointer` and `count` are Python integers, because the host always knows them: enqueue never waits for a
    GPU. They travel in the state_dict as a CPU tensor (`_extra_state`).

    Args:
        size: K, the most keys it holds.
        dim: D of a key.
        levels: L, the number of label levels.
        dtype: of the stored keys: float32, float16 or bfloat16.

    Buffers:
        features: (K, D) keys. labels: (K, L) int32, -1 for none. indices: (K,) int64 dataset indices, -1 where
        unknown or an empty slot: to `ifnd_fast.info_nce` that is no image's, so such a key is a negative to all.

    Example:
        >>> queue = NegativeQueue(size=4, dim=2, levels=1)
        >>> queue.enqueue(torch.ones(3, 2), indices=torch.tensor([7, 8, 9]))
        >>> queue.negatives()[2]
        tensor([7, 8, 9])
    """

    features: Tensor
    labels: Tensor
    indices: Tensor

    def __init__(self, size: int, dim: int, levels: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        size, dim, levels = (
            checks.integer(name, value, 1) for name, value in (("size", size), ("dim", dim), ("levels", levels))
        )
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        self.register_buffer("features", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("labels", torch.full((size, levels), -1, dtype=torch.int32))
        self.register_buffer("indices", torch.full((size,), -1, dtype=torch.int64))
        self.pointer = 0  # the slot that the next key goes to
        self._set_count(0)

    @property
    def count(self) -> int:
        """Filled slots."""
        return self._filled.shape[0]

    def _set_count(self, count: int) -> None:
        # As a size of a tensor without numbers: torch.compile takes a module's integers for constants, so a step
        # that reads the queue would be compiled anew for each count; sizes of tensors vary.
        self._filled = torch.empty((count, 0), device="cpu")

    @property
    def size(self) -> int:
        return len(self.features)

    def extra_repr(self) -> str:
        levels = self.labels.shape[1]
        return f"size={self.size}, dim={self.features.shape[1]}, levels={levels}, count={self.count}"

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None, indices: Tensor | None = None) -> None:
        """Append keys in order, over the oldest ones; of more than K keys the last K stay.

        Writes in place. The loss's fused backends keep nothing of `negatives()` that get no gradient, so it may come
        before the backward pass, as in MoCo; the reference backend then says that it may not.

        Args:
            keys: (B, D) float tensor, any B; stored in the queue's dtype, without gradient.
            labels: (B, L) int32 pseudo labels; None: -1.
            indices: (B,) int64 dataset indices of the keys' images; None: -1.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype, shape or device.
        """
        self._check(keys, labels, indices)
        batch = len(keys)
        first = max(0, batch - self.size)  # earlier keys would be overwritten by this very batch
        slot = (self.pointer + first) % self.size
        before_wrap = min(batch, first + self.size - slot)
        for start, end, to in ((first, before_wrap, slot), (before_wrap, batch, 0)):
            slots = slice(to, to + end - start)
            self.features[slots] = keys[start:end].detach().to(self.features.dtype)
            self.labels[slots] = -1 if labels is None else labels[start:end]
            self.indices[slots] = -1 if indices is None else indices[start:end]
        self.pointer = (self.pointer + batch) % self.size
        self._set_count(min(self.size, self.count + batch))

    def negatives(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features (k, D), labels (k, L), indices (k,) of the k = `count` filled slots, in slot order.

        They are views: the next enqueue or relabel shows in them. k is 0 before the first enqueue.
        """
        return self.features[: self.count], self.labels[: self.count], self.indices[: self.count]

    @torch.no_grad()
    def relabel(self, table: Tensor) -> None:
        """Give every key the labels that its image now has: labels = table[indices], -1 where index is -1.

        Args:
            table: (N, L) int32 labels of the whole data set, -1 for none.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or device, or an index in the queue is N or more.
        """
        checks.integers("table", table, torch.int32, (None, self.labels.shape[1]), self.labels, "the queue")
        known = (self.indices >= 0).nonzero().flatten()
        indices = self.indices[known]
        largest = int(indices.max()) if len(known) else -1
        if largest >= len(table):
            raise ValueError(f"table has {len(table)} rows, but the queue has a key of image {largest}")
        self.labels.fill_(-1)
        self.labels[known] = table[indices]

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.pointer, self.count], dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        pointer, count = state.tolist()
        filling = 0 <= pointer == count < self.size
        full = 0 <= pointer < count == self.size
        if not (filling or full):
            raise ValueError(f"pointer {pointer} and count {count} don't fit a queue of size {self.size}")
        self.pointer = pointer
        self._set_count(count)

    def _check(self, keys: Tensor, labels: Tensor | None, indices: Tensor | None) -> None:
        if not isinstance(keys, Tensor):
            raise TypeError(f"keys must be a torch.Tensor, got {type(keys).__name__}")
        if not keys.is_floating_point():
            raise TypeError(f"keys must be floating point, got {keys.dtype}")
        dim, levels = self.features.shape[1], self.labels.shape[1]
        if keys.dim() != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys must have shape (B, {dim}), got {tuple(keys.shape)}")
        checks.same_device("keys", keys, self.features, "the queue")
        if labels is not None:
            checks.integers("labels", labels, torch.int32, (len(keys), levels), keys, "keys")
        if indices is not None:
            checks.integers("indices", indices, torch.int64, (len(keys),), keys, "keys")
