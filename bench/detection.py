"""python bench/detection.py RUN --steps 390 1560: which ideas find false negatives, without training anything anew.

RUN was trained with `--false-negatives keep --keep-checkpoints 100` on labelled images. For each of the checkpoints
every idea clusters the momentum encoder's features, and all pairs of images that it would take out of the loss are
counted: precision and recall, each pair alike, and weighted by its part of the anchor's softmax over all other images
at the run's temperature, which is what a pair costs in the loss. An idea whose weighted precision is the share that
false negatives have of the softmax anyway tells nothing that the loss doesn't know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
import tyro
from tables import table
from torch import Tensor

from ifnd_fast import cluster_levels, config
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.clustering.whitening import whiten
from ifnd_fast.contrast.encoder import Encoder, build
from ifnd_fast.data.batch_views import InputViews
from ifnd_fast.data.cache import cached
from ifnd_fast.data.features import extract
from ifnd_fast.data.images import Images
from ifnd_fast.data.loading import PairDataset
from ifnd_fast.data.sources import open_for_run
from ifnd_fast.runtime.checkpoint import load
from ifnd_fast.runtime.compute import Compute

COMPUTE = Compute(torch.device("cpu"))


@dataclass
class Options:
    """Count what each idea detects in the features of a run's checkpoints."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    steps: tuple[int, ...]
    """of the checkpoints"""
    levels: tuple[int, ...] = (10, 30, 100)
    """clusters"""
    features: tuple[str, ...] = ("head", "backbone", "backbone whitened by 0.5")
    """what is clustered: also "backbone, mean of 3 views", and that "whitened by 0.5" too"""


@torch.inference_mode()
def features_at(options: Options, settings: config.Config, images: Images, step: int) -> dict[str, Tensor]:
    """Unit rows (N, D) by their name."""
    prefix = "key_encoder." if settings.contrast.negatives == "queue" else "query_encoder."
    model = load(options.run / "checkpoints" / f"step-{step:09d}.pt")["model"]
    encoder = build(settings.model)().eval()
    encoder.load_state_dict({name.removeprefix(prefix): value for name, value in model.items() if prefix in name})
    backbone = extract(encoder.backbone, images, settings.data, COMPUTE)[0]
    viewed = backbone
    if any("views" in name for name in options.features):
        viewed = backbone + sum(backbone_of_views(encoder, images, settings))
    shards = Shards(len(images), COMPUTE.device)
    found = {
        "head": encoder.head(backbone),
        "backbone": backbone,
        "backbone, mean of 3 views": viewed,
        "backbone whitened by 0.5": whiten(backbone.clone(), 0.5, shards),
        "backbone, mean of 3 views, whitened by 0.5": whiten(viewed.clone(), 0.5, shards),
    }
    return {name: F.normalize(rows, dim=1) for name, rows in found.items() if name in (*options.features, "head")}


def backbone_of_views(encoder: Encoder, images: Images, settings: config.Config) -> Iterator[Tensor]:
    """The backbone's features (N, D) of each of two random views."""
    dataset, views = PairDataset(images, settings.data, seed=1), InputViews(settings.data, COMPUTE.device, FORMAT)
    parts = []
    for rows in torch.arange(len(images)).split(250):
        loaded = [torch.stack(part) for part in zip(*(dataset[0, row][:2] for row in rows.tolist()), strict=True)]
        parts.append([encoder.backbone(view) for view in views(loaded)])
    return (torch.cat(part) for part in zip(*parts, strict=True))


FORMAT = torch.contiguous_format


class Pairs:
    """Counts pairs of N images, of `truth` (N,) and similar as unit rows (N, D) are."""

    def __init__(self, rows: Tensor, truth: Tensor, temperature: float):
        self.truth = truth[:, None] == truth
        self.truth.fill_diagonal_(False)
        self.weights = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf).softmax(dim=1)
        self.of_false = (self.weights * self.truth).sum()

    def cells(self, chosen: list[Tensor]) -> tuple[str, ...]:
        """Precision, recall, weighted precision and recall of pairs (N, N), for each of several choices."""
        found = []
        for pairs in chosen:
            pairs = pairs.clone().fill_diagonal_(False)
            hits, weight = pairs & self.truth, (self.weights * pairs).sum()
            weighted = (self.weights * hits).sum()
            found.append((hits.sum() / pairs.sum(), hits.sum() / self.truth.sum(), weighted / weight,
                          weighted / self.of_false))  # fmt: skip
        return tuple(" ".join(f"{float(value):.2f}" for value in values) for values in zip(*found, strict=True))


def together(labels: Tensor) -> Tensor:
    """(N, N) bool: which pairs have the same label (N,), -1 for none."""
    return (labels[:, None] == labels) & (labels >= 0)


def ideas(name: str, rows: Tensor, levels: tuple[int, ...], temperature: float) -> Iterator[tuple[str, list[Tensor]]]:
    """What each idea takes out, (N, N) bool for each level (or otherwise as its name says)."""

    def clustered(seed: int = 0, spherical: bool = False, n_init: int = 1) -> tuple[list[Tensor], list[Tensor]]:
        found = cluster_levels(rows, levels, temperature=temperature, seed=seed, spherical=spherical, n_init=n_init)
        return [level.labels for level in found], [level.confidence for level in found]

    labels, confidence = clustered()
    own = [together(label) for label in labels]
    yield f"{name}: every label", own
    for rate in (0.5, 0.25):
        least = [values.quantile(1 - rate) for values in confidence]
        kept = [label.where(values >= low, -1) for label, values, low in zip(labels, confidence, least, strict=True)]
        yield f"{name}: the most confident {rate:.0%}", [together(label) for label in kept]
    other = [together(label) for label in clustered(seed=50)[0]]
    yield f"{name}: two clusterings agree", [a & b for a, b in zip(own, other, strict=True)]
    yield f"{name}: spherical, 5 restarts", [together(label) for label in clustered(spherical=True, n_init=5)[0]]
    yield f"{name}: any level; all levels", [own[0] | own[1] | own[2], own[0] & own[1] & own[2]]
    for k in (10, 100):
        near = torch.zeros_like(own[0]).scatter_(1, (rows @ rows.T).topk(k + 1, dim=1).indices, True)
        mutual = near & near.T
        yield f"{name}: {k} nearest; mutual; mutual in a cluster of level 1", [near, mutual, mutual & own[0]]


def main(options: Options) -> None:
    settings = config.load(options.run / "config.yaml")
    images = cast(Images, open_for_run(settings.data)[0])
    images, temperature = cached(images, settings.data), settings.contrast.temperature
    header = ("features: what is taken out", "precision", "recall", "weighted precision", "weighted recall")
    for step in options.steps:
        features = features_at(options, settings, images, step)
        pairs = Pairs(features["head"], torch.from_numpy(images.labels), temperature)
        blind = float(pairs.of_false) / len(images)
        print(f"\nStep {step}: false negatives have {blind:.2f} of the softmax.\n", flush=True)
        print("\n".join(table(header, [])))
        for name in options.features:
            rows = features[name]
            for idea, chosen in ideas(name, rows, options.levels, temperature):
                print(table(header, [(idea, *pairs.cells(chosen))])[-1], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
