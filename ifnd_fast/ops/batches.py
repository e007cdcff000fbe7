"""torch.func.vmap of operators that know no batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def one_by_one(operator: Callable) -> Callable[..., tuple]:
    """vmap's rule for it: a call for each element of the batch, its results stacked in the first dimension."""

    def rule(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        results = [
            operator(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule
