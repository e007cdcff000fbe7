"""python bench/cifar10.py --data data/cifar10/final: what the strategies learn on CIFAR-10, with paired seeds.

Trains and compares as bench/learning.py does, with the options of RECIPE, on folders that bench/cifar10_data.py wrote.
The tables are written anew whenever a seed is done, with detection by epoch; what is finished or begun under --runs is
gone on with. Choose options with --data data/cifar10/choose, which measures with further training images.

What counts as an effect was fixed before any paired run: eliminate over keep by 1.0 point or more with 10 labels a
class, p < 0.05 by a two-sided paired t-test over the seeds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import learning
import tyro
from tables import table

RECIPE = (
    "--image-size 32 --width 32 --channels-last --crop-min 0.2 --rotation 0 --color-jitter 0.4 --grayscale 0.2 --flip "
    "--pixel-mean 0.49 0.48 0.45 --pixel-std 0.25 0.24 0.26 --augment device --workers 0 "
    "--epochs 80 --batch-size 128 --queue-size 2048 --temperature 0.1 --lr 0.06 --levels 10 30 100 --acceptance-end 1.0"
)
"""With 500 images a class true labels were seen to pay: one seed, 47.2 over 45.0 of plain MoCo by kNN."""
LINES = 8  # of detection by epoch
HEADER = ("strategy", "epoch", "accepted", "precision", "recall", "loss")


@dataclass
class Options(learning.Options):
    """Train on CIFAR-10 with every strategy and several seeds, and tabulate what each learned."""

    data: Path = Path("data/cifar10/final")
    """folder with train/ and test/ or val/"""
    runs: Path = Path("runs/cifar10")
    """folder of the runs, and of the decoded images"""
    title: str = "What the strategies learn on CIFAR-10"
    """of the table"""
    result: Path = learning.RESULTS.with_name("cifar10_strategies.md")
    """file for the tables, which are printed too"""


def detection_by_epoch(options: learning.Options) -> list[str]:
    """Lines of precision and recall by level while the first seed's runs train, of those that detect anything."""
    rows = []
    for strategy in options.strategies:
        found = learning.epochs(learning.folder(options, strategy, options.seeds[0]))
        labelled = [line for line in found if line["acceptance_rate"] and strategy != "oracle"]
        rows += [row(strategy, line) for line in labelled[:: max(1, len(labelled) // LINES)]]
    return ["", "## Detection by epoch, first seed", "", *table(HEADER, rows)]


def row(strategy: str, line: dict[str, Any]) -> tuple[str, ...]:
    rate, loss = f"{line['acceptance_rate']:.0%}", f"{line['loss']:.3f}"
    return strategy, str(line["epoch"]), rate, *learning.detection(line), loss


def main(options: Options) -> None:
    recipe = f"--data {options.data} --cache {options.runs / 'cache'} {RECIPE} {options.options}"
    for done in range(1, len(options.seeds) + 1):
        learning.main(dataclasses.replace(options, options=recipe, seeds=options.seeds[:done]), detection_by_epoch)


if __name__ == "__main__":
    main(tyro.cli(Options))
