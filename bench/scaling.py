"""python bench/scaling.py: training ImageNet on 1, 8 and 64 cards, on paper, and what saturates first.

Writes bench/results/scaling.md. Only the time to load and augment an image is measured, on this machine's CPU.
"""

from __future__ import annotations

import datetime
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from roofline import CARDS, Assignment, Card, Loss, mix_of
from tables import machine, table

from ifnd_fast.config import PRESETS
from ifnd_fast.data.loading import PairDataset
from ifnd_fast.data.sources import open_images

RESULTS = Path(__file__).parent / "results" / "scaling.md"
IMAGES, BATCH, LEVELS, ITERATIONS, DIM = 1_281_167, 256, (25_000, 50_000, 100_000), 20, 128
PARAMETERS = 25.6e6 + 2048 * 2048 + 2048 * 128  # ResNet-50 and MoCo v2's head
LAUNCHES = 9e-3  # seconds: some 1,500 kernels a step for two ResNet-50, at 6 us each


@dataclass(frozen=True)
class Speeds:
    """Images a second and card, and bytes a second of an all-reduce in a machine of 8 cards and between machines."""

    training: float
    inference: float
    inside: float
    between: float


SPEEDS = {"V100": Speeds(1200, 3382, 130e9, 12e9), "H100": Speeds(4050, 11400, 400e9, 50e9)}
ASSUMPTIONS = """
- ResNet-50 on a V100, mixed precision: 1,200 images/s of training and 3,382 of inference (NVIDIA's
  DeepLearningExamples, ResNet-50 v1.5 for PyTorch, 21.03). The H100's are those times 3.4: from the A100's 2,470 there,
  times the two cards' memory bandwidths, as training it is bound by that. Taken to be the same for small batches.
- A step: the query encoder's training, the key encoder's inference, and the loss, at the middle of the roofline's
  range; at least 9 ms, which the host takes to launch its kernels.
- Gradients (float32) are summed by a ring, beside the backward pass: a step takes at least as long as that. An
  all-reduce moves 130 GB/s within a machine of eight V100s and 12 GB/s between machines (100 Gb/s), H100: 400 and 50.
- Clustering every epoch, three levels of 20 iterations, middle of the roofline's range; the sums of each iteration
  (float64) go over the same links. Initial centroids are left out. A fresh pass for features runs at inference speed.
- Loading: one core decodes a JPEG of 500 x 375 pixels and makes two views of 224 x 224 in the time measured here.
"""


def loading_seconds() -> float:
    """Of one image and its two views, on one core."""
    torch.set_num_threads(1)
    settings = PRESETS["imagenet"][1].data
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(8):
            coarse = torch.randint(256, (24, 32, 3), generator=generator).to(torch.uint8)
            picture = Image.fromarray(coarse.numpy()).resize((500, 375), Image.Resampling.BICUBIC)
            picture.save(Path(folder) / f"{number}.jpg", quality=90)
        images = open_images(folder, "train", Path(folder))
        assert images is not None
        items = PairDataset(images, settings, 0)
        seconds = []
        for number in range(64):
            started = time.perf_counter()
            items[number // 8, number % 8]
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def middle(shape: Loss | Assignment, card: Card) -> float:
    """Seconds of the shape's operations, at the middle of the range of shares that the roofline gives."""
    return shape.operations() / card.tensor / (sum(mix_of(shape, card).share(card)) / 2)


def all_reduce(size: float, cards: int, speeds: Speeds) -> float:
    rate = speeds.inside if cards <= 8 else speeds.between
    return 0.0 if cards == 1 else 2 * size * (cards - 1) / cards / rate


def row(card: Card, cards: int, loading: float) -> tuple[str, ...]:
    speeds, own = SPEEDS[card.name], max(1, BATCH // cards)
    compute = own / speeds.training + own / speeds.inference + middle(Loss(own, 65536), card)
    times = {"encoders and loss": compute, "launches": LAUNCHES, "gradients": all_reduce(4 * PARAMETERS, cards, speeds)}
    step = max(times.values())
    epoch = IMAGES / BATCH * step
    clustering = sum(
        ITERATIONS * (middle(Assignment(IMAGES // cards, C), card) + all_reduce(8 * C * DIM, cards, speeds))
        for C in LEVELS
    )
    features = IMAGES / cards / speeds.inference
    return (
        f"{cards} {card.name}", f"{1 / step:.1f}", f"{BATCH / step:,.0f}", max(times, key=lambda name: times[name]),
        f"{epoch:,.0f}", f"{clustering:.1f}", f"{100 * clustering / (epoch + clustering):.1f}%",
        f"{100 * (clustering + features) / (epoch + clustering + features):.1f}%",
        f"{BATCH / step * loading / cards:.0f}",
    )  # fmt: skip


def main() -> None:
    loading = loading_seconds()
    header = (
        "", "steps/s", "images/s", "a step is bound by", "epoch, s", "clustering, s", "its share, bank",
        "with features, fresh", "cores to load, per card",
    )  # fmt: skip
    rows = [row(card, cards, loading) for card in CARDS if card.name in SPEEDS for cards in (1, 8, 64)]
    lines = [
        "# ImageNet on many cards, on paper",
        "",
        f"`python bench/scaling.py`, {datetime.date.today()}. Preset imagenet: ResNet-50, batch {BATCH} in all, queue "
        f"65,536, levels {', '.join(f'{level:,}' for level in LEVELS)}. No GPU was used. Measured: "
        f"{1e3 * loading:.1f} ms to load an image and make its two views on one core ({machine()['CPU']}).",
        "",
        *table(header, rows),
        "",
        "What saturates first: loading, on all of them, where there are fewer cores than the last column says; then, "
        "with 64 cards, the links between machines or the launches, as a batch of 256 leaves 4 images to each: more "
        "cards want a larger batch.",
        "",
        "Assumptions:",
        ASSUMPTIONS.rstrip(),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
