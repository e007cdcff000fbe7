"""What can be told of a run's features without labels: of the last pairs of views that an epoch trained on."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from ifnd_fast.config import Config
from ifnd_fast.metrics.feature_quality import alignment, collapse, effective_rank, feature_std, uniformity
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.console import warn

PAIRS = 2048
"""at least, where an epoch has as many: an effective rank of few rows is too low"""


class FeatureWatch:
    """Keeps the queries and keys of an epoch's last steps, which are there anyway, and measures them at its end.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config):
        self.config = config
        self.pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=-(-PAIRS // config.optim.batch_size))
        self.warned = False

    def note(self, query: Tensor, key: Tensor) -> None:
        """A step's (B, dim) unit features of two views of this rank's images; they are neither copied nor read."""
        self.pairs.append((query.detach(), key.detach()))

    def figures(self, epoch: int) -> dict[str, float]:
        """Of all ranks' pairs since the epoch began, at most the last PAIRS or a step more; a warning, once, where the
        features have collapsed. All ranks have to call it, after that epoch (from 1).

        `feature_rank`, `feature_std`: `effective_rank` and `feature_std` of the queries. `alignment`: of queries and
        keys. `uniformity`: mean of theirs.
        """
        queries, keys = self._of_all_ranks()
        self.pairs.clear()
        found = {
            "feature_rank": effective_rank(queries),
            "feature_std": feature_std(queries),
            "alignment": alignment(queries, keys),
            "uniformity": (uniformity(queries) + uniformity(keys)) / 2,
        }
        reason = collapse(found["feature_rank"], found["feature_std"], queries.shape[1])
        if reason and not self.warned:
            self.warned = True
            warn(f"the features have collapsed by epoch {epoch}: {reason}. {self._remedy()}")
        return found

    def _remedy(self) -> str:
        """What to try; which first depends on the strategy."""
        tried = ["a lower --lr", "--warmup-epochs", "a lower --temperature"]
        if self.config.contrast.false_negatives in ("eliminate", "attract"):
            tried += [
                "a larger --acceptance-end (1: labels are trusted late)", "a lower --acceptance-max",
                "more clusters by --levels",
            ]  # fmt: skip
        return f"Such features tell images apart no more: start again with {', '.join(tried)}, or another --seed"

    def _of_all_ranks(self) -> tuple[Tensor, Tensor]:
        queries, keys = (torch.cat(parts) for parts in zip(*self.pairs, strict=True))
        return distributed.gather_rows(queries), distributed.gather_rows(keys)

    def state(self) -> list[list[Tensor]]:
        """The pairs so far, a step's of all ranks together; all ranks have to call it: any number of them can go on."""
        return [list(distributed.all_gather_rows(query, key)) for query, key in self.pairs]

    def load_state(self, pairs: list[list[Tensor]], device: torch.device) -> None:
        """From what `state` gave."""
        self.pairs.clear()
        self.pairs.extend(
            (distributed.own_share(query).to(device), distributed.own_share(key).to(device)) for query, key in pairs
        )
