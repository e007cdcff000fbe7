"""python bench/learning.py: train every false-negative strategy on the demo data with paired seeds.

Writes bench/results/learning.md: kNN top-1 of each strategy (mean, standard deviation, gain over keep by seed).
Finished runs under --runs are not trained again, so an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

RESULTS = Path(__file__).parent / "results" / "learning.md"


@dataclass
class Options:
    """Train the demo with every strategy and several seeds, and tabulate what each learned."""

    runs: Path = Path("runs/learning")
    """folder of the runs"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds, the same for every strategy"""
    strategies: tuple[str, ...] = ("keep", "eliminate", "attract", "oracle")
    """strategies; gains are over the first"""
    jobs: int = 1
    """runs at a time; with several, each computes on its share of the cores"""
    epochs: int | None = None
    """epochs of each run; default: the demo's"""
    write: bool = True
    """write bench/results/learning.md, besides printing it"""


def train(out: Path, strategy: str, seed: int, options: Options) -> dict[str, float]:
    """The result of a run of ifnd-fast-train, trained, resumed or read."""
    if not (out / "result.json").exists():
        arguments = ["--out", out, "--false-negatives", strategy, "--seed", seed]
        arguments += [] if options.epochs is None else ["--epochs", options.epochs]
        if list(out.glob("checkpoints/*.pt")):
            arguments = ["--resume", "--out", out]
        command = [sys.executable, "-c", "from ifnd_fast.cli import train; train()", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))}
        subprocess.run(command, check=True, env=environment)
    return json.loads((out / "result.json").read_text())


def detection(out: Path) -> str:
    """Precision and recall of the run's last epoch, by level."""
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])

    def shares(name: str) -> str:
        return " ".join("-" if share is None else f"{share:.2f}" for share in last[name])

    return f"{shares('false_negative_precision')} | {shares('false_negative_recall')}"


def main(options: Options) -> None:
    with ThreadPoolExecutor(options.jobs) as pool:  # seed by seed, so that what is finished is paired
        futures = {
            (strategy, seed): pool.submit(train, options.runs / f"{strategy}-{seed}", strategy, seed, options)
            for seed in options.seeds
            for strategy in options.strategies
        }
        results = {
            strategy: [futures[strategy, seed].result() for seed in options.seeds] for strategy in options.strategies
        }
    base = [result["knn_top1"] for result in results[options.strategies[0]]]
    first = results[options.strategies[0]][0]
    lines = [
        "# What the strategies learn on the demo data",
        "",
        f"`{' '.join(['python', 'bench/learning.py', *sys.argv[1:]])}`, {datetime.date.today()}, torch "
        f"{torch.__version__}, {platform.machine()} with {os.cpu_count()} cores.",
        "",
        f"Weighted kNN (k = 20) top-1 in percent on the 1,000 test digits, {len(options.seeds)} paired seeds "
        f"({', '.join(map(str, options.seeds))}). Raw pixels: {first['knn_top1_raw_pixels']:.2f}; untrained encoders: "
        + " ".join(f"{result['knn_top1_untrained']:.2f}" for result in results[options.strategies[0]])
        + ". Precision and recall of the detection by level, last epoch of the first seed.",
        "",
        f"| strategy | mean (sd) | by seed | gain over {options.strategies[0]} | precision | recall |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for strategy, runs in results.items():
        accuracies = [run["knn_top1"] for run in runs]
        spread = f" ({statistics.stdev(accuracies):.2f})" if len(accuracies) > 1 else ""
        gains = " ".join(f"{a - b:+.2f}" for a, b in zip(accuracies, base, strict=True))
        lines.append(
            f"| {strategy} | {statistics.mean(accuracies):.2f}{spread} | "
            + " ".join(f"{accuracy:.2f}" for accuracy in accuracies)
            + f" | {gains} | {detection(options.runs / f'{strategy}-{options.seeds[0]}')} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
