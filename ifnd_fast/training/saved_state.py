"""What a run's checkpoint tells: who reads one asks here, so that its keys are known to those who write it alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ifnd_fast.clustering.image_clusters import ImageClusters
from ifnd_fast.runtime import checkpoint
from ifnd_fast.runtime.errors import CommandError

POINTS = 1000  # t-SNE takes some seconds for them


class StoredFeatures(NamedTuple):
    """Unit features of n different images that a checkpoint holds."""

    features: np.ndarray  # (n, D) float32
    indices: np.ndarray  # (n,) int64, of the images
    source: str


class SavedState:
    """A checkpoint that `Trainer.state_dict` and `Labeller.state_dict` made up, of N images and L levels of labels.

    Args:
        values: by key; empty: there is none that can be read.
    """

    def __init__(self, values: Mapping[str, Any] | None = None):
        self.values = values or {}

    @classmethod
    def latest(cls, out: Path) -> SavedState:
        """A run's newest. Raises CommandError: it has none that can be read."""
        return cls(checkpoint.load_latest(out))

    @classmethod
    def at(cls, out: Path, step: int) -> SavedState:
        """A run's after so many steps. Raises CommandError: it keeps none of that step, or it can't be read."""
        path = checkpoint.path_of(out, step)
        if not path.exists():
            steps = ", ".join(str(int(kept.stem.removeprefix("step-"))) for kept in checkpoint.list_checkpoints(out))
            raise CommandError(
                f"{out} holds no checkpoint of step {step}, but of {steps or 'none'}: a run keeps its last "
                "--keep-checkpoints, one each --checkpoint-every epochs"
            )
        return cls(checkpoint.load(path))

    @property
    def step(self) -> int:
        return self.values["step"]

    @property
    def position(self) -> str:
        """For people: "step 300 (after epoch 2)"."""
        return f"step {self.step} (after epoch {self.epoch})"

    @property
    def epoch(self) -> int:
        """Finished ones."""
        return self.values["epoch"]

    @property
    def accepted(self) -> Tensor | None:
        """(N, L) int32, the labels in use, -1 where none is trusted."""
        return self.values.get("accepted")

    @property
    def acceptance_rate(self) -> float:
        return self.values["acceptance_rate"]

    @property
    def accuracies(self) -> dict[str, Any]:
        """The kNN accuracies measured so far, by their names in result.json."""
        return self.values.get("result", {})

    @property
    def identity(self) -> dict[str, str]:
        """Which images the run is of; empty in checkpoints of earlier versions."""
        return self.values.get("config", {}).get("identity", {})

    @property
    def levels(self) -> list[int] | None:
        """Clusters at each level, as the images allowed."""
        levels = self.values.get("pseudo_labels", {}).get("levels")
        return None if levels is None else [int(count) for count in levels]

    @property
    def unreadable(self) -> dict[int, str]:
        """The reasons by the images' numbers; in checkpoints of earlier versions they are empty."""
        noted = self.values.get("unreadable", {})
        return noted if isinstance(noted, dict) else dict.fromkeys(noted, "")

    @property
    def queued(self) -> np.ndarray | None:
        """(K,) int64, the numbers of the queue's images, -1 in empty slots; None: in-batch negatives."""
        queue = self.values.get("negatives")
        return None if queue is None else np.asarray(queue["indices"], dtype=np.int64)

    @property
    def model(self) -> dict[str, Tensor]:
        """The weights of all encoders."""
        return self.values["model"]

    @property
    def encoder(self) -> dict[str, Tensor]:
        """The momentum encoder's weights; of an in-batch run its only encoder's."""
        weights = self.model
        prefix = "key_encoder." if any(name.startswith("key_encoder.") for name in weights) else "query_encoder."
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

    def without_tensors(self) -> SavedState:
        """The small part that comparisons of runs need."""
        levels = {} if self.levels is None else {"levels": self.levels}
        return SavedState({"result": self.accuracies, "pseudo_labels": levels})

    def clustering(self) -> ImageClusters | None:
        """The last one; None before the first and where there is none (keep, oracle)."""
        found = self.values.get("pseudo_labels", {})
        usable = self.values.get("cluster_waiting", {}).get("usable")
        if "labels" not in found or usable is None or int(usable.sum()) != len(found["labels"]):
            return None
        labels = torch.full((len(usable), len(found["levels"])), -1, dtype=torch.int32, device="cpu")
        confidence = torch.zeros(labels.shape, dtype=torch.float32, device="cpu")
        labels[usable], confidence[usable] = found["labels"], found["confidence"]
        return ImageClusters(tuple(found["levels"].tolist()), labels, confidence)

    def features(self, most: int = POINTS, seed: int = 0) -> StoredFeatures | None:
        """Of at most `most` images, always the same ones: their newest keys in the queue, else what the bank holds of
        them; None where there is neither."""
        queue, bank = self.values.get("negatives"), self.values.get("bank")
        if queue is not None and "features" in queue:
            features, indices = queue["features"], queue["indices"].numpy()
            pointer = int(queue["_extra_state"][0]) if "_extra_state" in queue else 0
            newest_first = (pointer - 1 - np.arange(len(indices))) % len(indices)
            newest_first = newest_first[indices[newest_first] >= 0]
            distinct, at = np.unique(indices[newest_first], return_index=True)
            rows, source = newest_first[at], "newest key in the queue"
        elif bank is not None:
            features, source = bank, "newest key in the bank"
            distinct = rows = bank.any(dim=1).nonzero().flatten().numpy()
        else:
            return None
        kept = np.sort(np.random.default_rng(seed).permutation(len(rows))[:most])
        found = features[torch.from_numpy(rows[kept])].float().numpy()
        finite = np.isfinite(found).all(axis=1)
        return StoredFeatures(found[finite], distinct[kept][finite], source)
