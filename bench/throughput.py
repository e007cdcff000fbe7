"""python bench/throughput.py: what a training step of the demo spends where, and what IFND costs beside plain MoCo.

Writes bench/results/throughput-KIND.md of this kind of CPU. Let the machine be idle; five minutes on 2 cores.
"""

from __future__ import annotations

import copy
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from tables import machine, precision, results_of, table, told

from ifnd_fast.config import PRESETS, Config, to_yaml
from ifnd_fast.runtime import run_folder, spans
from ifnd_fast.training.trainer import Trainer

RECLUSTER = 4  # epochs between the demo's clusterings: a round of so many epochs holds one of them
NOT_OWN = ("query encoder", "key encoder", "loss", "backward", "optimizer")
REST = "the rest: learning rate, progress bar, checkpoints that are not due"


@dataclass
class Options:
    """Profile the demo's training step, and time `eliminate --features bank` against `keep`."""

    epochs: int = 10
    """epochs that are profiled, after those before the first labels"""
    rounds: int = 9
    """rounds of 4 epochs of each strategy, of which the median counts; 9: the demo with all its clusterings"""
    images: bool = True
    """measure images/s with views made by the loader and on the device too"""
    write: bool = True
    """write bench/results/throughput-KIND.md, besides printing it"""


def demo(out: str, **changes: Any) -> Trainer:
    """A trainer of the demo that measures no accuracy; `changes` are options by section, data={"workers": 0}."""
    config: Config = copy.deepcopy(PRESETS["demo"][1])
    config.run.out, config.run.knn_every = Path(out), 0
    config.run.amp = precision()
    for section, values in changes.items():
        for name, value in values.items():
            setattr(getattr(config, section), name, value)
    trainer = Trainer(config)
    trainer.measuring.labelled = None
    run_folder.create(config.run.out, to_yaml(config))
    return trainer


def use_free_cores(trainer: Trainer) -> None:
    """Compute on the cores less the loading processes, as ifnd-fast-train does."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - trainer.config.data.workers))


# ---- a step's pieces ----


class Pieces:
    """Seconds, by a clock, of the spans of each step; those of a span within another count for the inner one alone. A
    step begins where it asks for its batch."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.steps: list[defaultdict[str, float]] = []
        self.now = defaultdict[str, float](float)
        self.open: list[str] = []
        self.since = 0.0

    def listen(self, name: str, begins: bool) -> None:
        """A span of training begins or ends; what is outside an epoch doesn't count."""
        before, self.since = self.since, self.clock()
        if self.open:
            self.now[self.open[-1]] += self.since - before
        if begins and (self.open or name == "epoch"):
            if name == "load" or name == "epoch":
                self._end_step()
            self.open.append(REST if name in ("epoch", "step") else name)
        elif self.open and not begins:
            self.open.pop()

    def _end_step(self) -> None:
        if self.now["backward"]:  # else no step yet since the last
            self.steps.append(self.now)
        self.now = defaultdict[str, float](float)

    def median(self, *names: str) -> float:
        return statistics.median(sum(step[name] for name in names) for step in self.steps)

    def share(self, *names: str) -> float:
        """Of the time of all steps."""
        return sum(step[name] for step in self.steps for name in names) / sum(sum(s.values()) for s in self.steps)


def profile(options: Options, out: str) -> list[str]:
    wall, cpu = Pieces(time.perf_counter), Pieces(time.thread_time)
    trainer = demo(out, run={"checkpoint_every": 1e6})
    use_free_cores(trainer)
    epochs = trainer.epochs()
    for _ in range(RECLUSTER):
        next(epochs)
    spans.listeners += [wall.listen, cpu.listen]
    for _ in range(options.epochs):
        next(epochs)
    for pieces in (wall, cpu):
        spans.listeners.remove(pieces.listen)
    names = sorted({name for step in wall.steps for name in step}, key=lambda name: -wall.share(name))
    own = [name for name in names if name not in NOT_OWN]

    def cells(*chosen: str) -> list[str]:
        found = ((f"{1e3 * pieces.median(*chosen):.3f}", f"{pieces.share(*chosen):.2%}") for pieces in (wall, cpu))
        return [cell for pair in found for cell in pair]

    rows = [(name, "yes" if name in own else "", *cells(name)) for name in names]
    for what, chosen in (("the trainer's own, all of them", own), ("the same and the loss", [*own, "loss"])):
        rows.append((f"**{what}**", "", *(f"**{cell}**" for cell in cells(*chosen))))
    rows.append(("a step", "", *cells(*names)))
    return [
        f"{len(wall.steps)} steps of the preset `demo` (batch {trainer.config.optim.batch_size}, "
        f"{trainer.config.data.workers} loading processes, {torch.get_num_threads()} computing thread(s)), epochs "
        f"{RECLUSTER + 1} to {RECLUSTER + options.epochs}: time of each span, one within another taken off the outer "
        "one, on the wall and of the training thread's CPU time, which has no waiting for a batch and none for a core. "
        "Own is all but the encoders' forward and backward, the loss and the optimizer; the target is at most 5% of "
        "the CPU time.",
        "",
        *table(("piece", "own", "median, ms", "share", "CPU, median, ms", "share"), rows),
    ]


# ---- whole epochs ----


def seconds_of(epochs: Iterator[None], trainer: Trainer) -> float:
    use_free_cores(trainer)
    started = time.perf_counter()
    next(epochs)
    return time.perf_counter() - started


def take_turns(trainers: list[Trainer], rounds: int, warm_up: int, length: int) -> list[list[float]]:
    """Seconds per epoch of each trainer in each round of `length` epochs; the trainers take turns at every epoch."""
    epochs = [trainer.epochs() for trainer in trainers]
    seconds: list[list[float]] = [[] for _ in trainers]
    for number in range(warm_up + rounds * length):
        for i in list(range(len(trainers)))[:: 1 if number % 2 else -1]:
            seconds[i].append(seconds_of(epochs[i], trainers[i]))
    means = [[statistics.mean(s[i : i + length]) for i in range(warm_up, len(s), length)] for s in seconds]
    for running in epochs:
        cast(Generator[None], running).close()
    return means


def strategies(options: Options, folder: str) -> list[str]:
    ifnd = {"contrast": {"false_negatives": "eliminate"}, "cluster": {"features": "bank"}}
    trainers = [demo(f"{folder}/keep", contrast={"false_negatives": "keep"}), demo(f"{folder}/ifnd", **ifnd)]
    keep, eliminate = take_turns(trainers, options.rounds, RECLUSTER, RECLUSTER)
    more = [b / a - 1 for a, b in zip(keep, eliminate, strict=True)]
    rows = [(f"{n}", f"{a:.3f}", f"{b:.3f}", f"{m:+.1%}") for n, (a, b, m) in
            enumerate(zip(keep, eliminate, more, strict=True), 1)]  # fmt: skip
    keep_median, eliminate_median = (f"{statistics.median(values):.3f}" for values in (keep, eliminate))
    rows.append(("median", keep_median, eliminate_median, f"**{statistics.median(more):+.1%}**"))
    return [
        "Wall seconds per epoch: steps, clustering, metrics and checkpoint, without measuring accuracy. The two runs "
        f"take turns at every epoch; a round is {RECLUSTER} epochs, one of which begins with a clustering, and the "
        f"first {RECLUSTER} epochs, without labels, don't count. The target is at most 8% more.",
        "",
        *table(("round", "`keep`", "`eliminate --features bank`", "more"), rows),
    ]


def loading(options: Options, folder: str) -> list[str]:
    settings = [("loader", 2), ("loader", 0), ("device", 2), ("device", 0)]
    trainers = [demo(f"{folder}/{augment}-{workers}", data={"augment": augment, "workers": workers})
                for augment, workers in settings]  # fmt: skip
    seconds = take_turns(trainers, 3, 1, 1)
    rows = [
        (f"`--augment {augment} --workers {workers}`",
         f"{len(trainer.batches) * trainer.config.optim.batch_size / statistics.median(found):.0f}")
        for (augment, workers), trainer, found in zip(settings, trainers, seconds, strict=True)
    ]  # fmt: skip
    return ["Images per second of whole epochs without labels, medians of 3 that take turns; computing threads are the "
            "cores less the loading processes.", "", *table(("views", "images/s"), rows)]  # fmt: skip


def main(options: Options) -> None:
    here = machine()
    with tempfile.TemporaryDirectory() as folder:
        parts: list[tuple[str, Callable[[Options, str], list[str]]]] = []
        parts += [("IFND beside plain MoCo", strategies)] * (options.rounds > 0)
        parts += [("Views by the loader and on the device", loading)] * options.images
        parts += [("A training step", lambda o, f: profile(o, f"{f}/profile"))]
        sections = [f"\n## {title}\n\n" + "\n".join(part(options, folder)) for title, part in parts]
    text = (
        "# The trainer's own time, measured\n\n"
        f"`python bench/throughput.py`, {datetime.date.today()}. {told(here)}. Python {platform.python_version()}, "
        f"torch {here['torch']}, --amp {precision()}.\n" + "\n".join(sections) + "\n"
    )
    print(text)
    if options.write:
        results_of("throughput", here["kind"]).write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
