"""python bench/learning.py: train every false-negative strategy on the demo data with paired seeds.

Writes bench/results/learning.md: top-1 of each strategy with 10 labels a class and by kNN with all labels (mean,
standard deviation, gain over the first by seed with a paired t-test, share of the oracle's gain), its detection, and
the seconds that labels take. A strategy can bring options of its own,
"eliminate --features bank". Finished runs under --runs are not trained again, so an interrupted comparison goes on
where it stopped. Choose options with --options='--hold-out 0.25', which leaves the test images untouched.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from scipy.stats import ttest_1samp
from tables import precision

from ifnd_fast.metrics.few_shot import DRAWS
from ifnd_fast.training.accuracies import HEADLINE_LABELS, few_labels

RESULTS = Path(__file__).parent / "results" / "learning.md"


@dataclass
class Options:
    """Train the demo with every strategy and several seeds, and tabulate what each learned."""

    runs: Path = Path("runs/learning")
    """folder of the runs"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """seeds, the same for every strategy"""
    strategies: tuple[str, ...] = ("keep", "eliminate", "attract", "oracle")
    """strategies, each with further options of ifnd-fast-train where wanted; gains are over the first"""
    jobs: int = 1
    """runs at a time; with several, each computes on its share of the cores"""
    options: str = ""
    """further options of ifnd-fast-train for every run, as one word: --options="--epochs 20" """
    title: str = "What the strategies learn on the demo data"
    """of the table"""
    result: Path = RESULTS
    """file for the tables, which are printed too"""


def train(out: Path, strategy: str, seed: int, options: Options) -> dict[str, Any]:
    """The result of a run of ifnd-fast-train, trained, resumed or read."""
    if not (out / "result.json").exists():
        common = shlex.split(options.options)
        arguments = ["--out", out, "--amp", precision(), *common, "--seed", seed]
        arguments += ["--false-negatives", *shlex.split(strategy)]
        if list(out.glob("checkpoints/*.pt")):
            arguments = ["--resume", "--out", out]
        command = [sys.executable, "-c", "from ifnd_fast.cli import train; train()", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))}
        subprocess.run(command, check=True, env=environment)
    return json.loads((out / "result.json").read_text())


def folder(options: Options, strategy: str, seed: int) -> Path:
    return options.runs / f"{re.sub('[^a-z0-9]+', '-', strategy)}-{seed}"


def epochs(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def detection(epoch: dict[str, Any]) -> tuple[str, str]:
    """Precision and recall of an epoch, by level."""
    precision, recall = (
        " ".join("-" if share is None else f"{share:.2f}" for share in epoch.get(f"false_negative_{name}", []))
        for name in ("precision", "recall")
    )
    return precision, recall


def label_seconds(out: Path) -> float:
    """That the run's training waited for features and clustering, in all."""
    return sum(line["feature_seconds"] + line["cluster_seconds"] for line in epochs(out))


def paired_p(gains: list[float]) -> str:
    """Two-sided p of a paired t-test that the mean gain is 0."""
    if len(gains) < 2 or not any(gains):
        return "-"
    return f"{ttest_1samp(gains, 0.0).pvalue:.3g}"


def by_knn(result: dict[str, Any], suffix: str = "") -> float | None:
    return result.get(f"knn_top1{suffix}")


def with_few_labels(result: dict[str, Any], suffix: str = "") -> float | None:
    """Mean over draws; None of a run by an earlier version."""
    found = few_labels(result, suffix).get(HEADLINE_LABELS)
    return None if found is None else found.mean


MEASURES = {
    f"With {HEADLINE_LABELS} labels a class (logistic regression, mean of {DRAWS} draws)": with_few_labels,
    "With all labels (weighted kNN, k = 20)": by_knn,
}


def table(title: str, of: Callable[..., float | None], results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of the strategies' accuracies by one measure, with gains over the first; none where runs lack it."""
    known = {strategy: [value for run in runs if (value := of(run)) is not None] for strategy, runs in results.items()}
    accuracies = {strategy: own for strategy, own in known.items() if len(own) == len(results[strategy])}
    if len(accuracies) < len(results):
        return []
    first, base = next(iter(accuracies.items()))
    gains = {strategy: [a - b for a, b in zip(own, base, strict=True)] for strategy, own in accuracies.items()}
    most = statistics.mean(gains["oracle"]) if "oracle" in gains else 0.0
    raw = of(results[first][0], "_raw_pixels")
    untrained = [of(run, "_untrained") for run in results[first]]
    others = [f"raw pixels {raw:.2f}"] if raw is not None else []
    others += [f"untrained {' '.join(f'{value:.2f}' for value in untrained if value is not None)}"]
    lines = [
        "",
        f"## {title}",
        "",
        f"Beside them: {', '.join(others)}.",
        "",
        f"| strategy | mean (sd) | by seed | gain over {first} | mean gain | p | share of the oracle's |",
        "|---|---|---|---|---|---|---|",
    ]
    for strategy, own in accuracies.items():
        spread = f" ({statistics.stdev(own):.2f})" if len(own) > 1 else ""
        gain = statistics.mean(gains[strategy])
        cells = [
            strategy,
            f"{statistics.mean(own):.2f}{spread}",
            " ".join(f"{accuracy:.2f}" for accuracy in own),
            " ".join(f"{one:+.2f}" for one in gains[strategy]),
            f"{gain:+.2f}",
            paired_p(gains[strategy]),
            f"{gain / most:.0%}" if most > 0 else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def detection_table(options: Options) -> list[str]:
    """Lines of the strategies' detection, and of what labels cost."""
    lines = ["", "## Detection", "", "| strategy | precision | recall | label seconds |", "|---|---|---|---|"]
    for strategy in options.strategies:
        seconds = statistics.mean(label_seconds(folder(options, strategy, seed)) for seed in options.seeds)
        last = epochs(folder(options, strategy, options.seeds[0]))[-1]
        lines.append(f"| {' | '.join((strategy, *detection(last), f'{seconds:.1f}'))} |")
    return lines


def no_more(_: Options) -> list[str]:
    return []


def main(options: Options, more: Callable[[Any], list[str]] = no_more) -> None:
    """`more` are lines after the tables."""
    with ThreadPoolExecutor(options.jobs) as pool:  # seed by seed, so that what is finished is paired
        futures = {
            (strategy, seed): pool.submit(train, folder(options, strategy, seed), strategy, seed, options)
            for seed in options.seeds
            for strategy in options.strategies
        }
        results = {
            strategy: [futures[strategy, seed].result() for seed in options.seeds] for strategy in options.strategies
        }
    lines = [
        f"# {options.title}",
        "",
        f"`{shlex.join(['python', *sys.argv])}`, {datetime.date.today()}, torch "
        f"{torch.__version__}, {platform.machine()} with {os.cpu_count()} cores.",
        "",
        f"Top-1 in percent on the test images (or those held out), {len(options.seeds)} paired seeds "
        f"({', '.join(map(str, options.seeds))}). Precision and recall of the detection by level, last epoch of the "
        "first seed. Label seconds: what features and clustering took of a run's time, mean.",
    ]
    for title, of in MEASURES.items():
        lines += table(title, of, results)
    text = "\n".join([*lines, *detection_table(options), *more(options)]) + "\n"
    print(text)
    options.result.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
