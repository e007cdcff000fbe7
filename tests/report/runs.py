"""Run folders made up for tests of the report, and how its page is read."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import yaml
from PIL import Image

from ifnd_fast.runtime import checkpoint

OF_FEATURES = ["Spread of the features", "Alignment and uniformity"]
FIGURES = [
    "Loss", "kNN accuracy", *OF_FEATURES, "Acceptance rate", "False negatives per query",
    "Precision and recall of detection", "Balance and agreement of clusters", "Inertia of the last clustering", "Time",
]  # fmt: skip
CLASSES, PER_CLASS, LEVELS = 3, 20, (3, 6)
N = CLASSES * PER_CLASS


def epoch_line(epoch: int, epochs: int = 6) -> dict:
    rate = epoch / epochs
    return {
        "epoch": epoch, "step": 10 * epoch, "loss": 5 - rate, "lr": 0.1 * (1 - rate),
        "acceptance_rate": rate,
        "false_negatives_per_query": [12 * rate, 5 * rate], "images_per_second": 1234.0, "seconds": 4.0,
        "feature_seconds": 1.0, "cluster_seconds": 0.5,
        "false_negative_precision": [None if epoch == 1 else 0.8, 0.9],
        "false_negative_recall": [0.5, 0.25], **({"knn_top1": 80 + epoch} if epoch % 2 == 0 else {}),
        "feature_rank": 30 + epoch, "feature_std": 0.1, "alignment": 1 / epoch, "uniformity": -3.0 - rate,
        "cluster_largest": [0.4, 0.2], **({"cluster_agreement": [0.6, min(1.0, 0.1 * epoch)]} if epoch > 1 else {}),
        "cluster_inertia": [[0.5, 0.3, 0.25], [0.4, 0.2]],
    }  # fmt: skip


class MakeRun:
    """A run folder of 6 epochs on 60 images, with any part of it changed or left out."""

    def __init__(self, folder: Path):
        self.folder = folder

    def images(self, classes: bool = True) -> Path:
        data = self.folder / "images"
        rng = np.random.default_rng(0)
        for i in range(N):
            path = data / (f"class {i // PER_CLASS}" if classes else ".") / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(path)
        return data

    def __call__(
        self, *, lines=None, tail="", config=(), result=True, data=None, queue=True, state=(), figures=()
    ) -> Path:
        out = self.folder / "my run"
        out.mkdir(exist_ok=True)
        settings = {
            "preset": "demo",
            "data": {"data": str(self.images() if data is None else data)},
            "optim": {"epochs": 6},
            "contrast": {"false_negatives": "eliminate"},
            "cluster": {"levels": list(LEVELS)},
        } | dict(config)
        lines = [epoch_line(epoch) for epoch in range(1, 7)] if lines is None else lines
        (out / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
        known = {"knn_top1_raw_pixels": 93.1, "knn_top1_untrained": 70.5}
        if result:
            trained = {"knn_top1": 95.3, "seconds": 3725.0} | dict(figures)
            (out / "result.json").write_text(json.dumps(known | trained))
        rng = np.random.default_rng(1)
        labels = torch.from_numpy(np.stack([rng.integers(-1, c, N) for c in LEVELS], axis=1)).int()
        state = {
            "epoch": 6, "step": 60, "result": known, "accepted": labels,
            "pseudo_labels": {
                "levels": torch.tensor(LEVELS), "labels": labels.clamp_min(0),
                "confidence": torch.from_numpy(rng.random((N, len(LEVELS)))).float(),
            },
            "negatives": {"indices": torch.tensor([-1, *range(0, N, 2), 0])} if queue else None,
        } | dict(state)  # fmt: skip
        checkpoint.save(out, state)
        return out


def clustered(confidence=None, labels=None):
    """Parts of a checkpoint after a clustering of all images but the first."""
    rng = np.random.default_rng(3)
    if labels is None:
        labels = torch.from_numpy(np.stack([rng.integers(0, c, N - 1) for c in LEVELS], axis=1)).int()
    confidence = torch.from_numpy(rng.random((N - 1, 2))).float() if confidence is None else confidence
    usable = torch.arange(N) > 0
    accepted = torch.full((N, 2), -1, dtype=torch.int32)
    accepted[usable] = labels
    return {
        "pseudo_labels": {"levels": torch.tensor(LEVELS), "labels": labels, "confidence": confidence},
        "cluster_waiting": {"usable": usable}, "acceptance_rate": 1.0, "accepted": accepted,
    }  # fmt: skip


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.texts.append(data)


def figure_titles(page: str) -> list[str]:
    return re.findall("<figcaption><h3>(.*?)</h3>", page)


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]
