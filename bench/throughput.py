"""python bench/throughput.py: what a training step of the demo spends where, and what IFND costs beside plain MoCo.

Writes bench/results/throughput.md. Let the machine be idle; five minutes on 2 cores.
"""

from __future__ import annotations

import copy
import datetime
import functools
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from tables import machine, table
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ifnd_fast.config import PRESETS, Config
from ifnd_fast.runtime import run_folder
from ifnd_fast.training import trainer as trainer_module
from ifnd_fast.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "throughput.md"
RECLUSTER = 4  # epochs between the demo's clusterings: a round of so many epochs holds one of them
ENCODER = ("query encoder, forward", "key encoder, forward", "query encoder, backward")
LOSS, UPDATE = "loss with its label look-ups, forward and backward", "optimizer"
NOT_OWN = (*ENCODER, LOSS, UPDATE)
REST = "the rest: labels of the keys, finiteness, learning rate, progress bar"


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
    """write bench/results/throughput.md, besides printing it"""


def demo(out: str, **changes: Any) -> Trainer:
    """A trainer of the demo that measures no accuracy; `changes` are options by section, data={"workers": 0}."""
    config: Config = copy.deepcopy(PRESETS["demo"][1])
    config.run.out, config.run.knn_every = Path(out), 0
    for section, values in changes.items():
        for name, value in values.items():
            setattr(getattr(config, section), name, value)
    trainer = Trainer(config)
    trainer.probe = None
    run_folder.create(config)
    return trainer


def use_free_cores(trainer: Trainer) -> None:
    """Compute on the cores less the loading processes, as ifnd-fast-train does."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - trainer.config.data.workers))


# ---- a step's pieces ----


class Pieces:
    """Wall seconds of named pieces of each step; those of a piece within another count for the inner one alone."""

    def __init__(self) -> None:
        self.steps: list[defaultdict[str, float]] = []
        self.now = defaultdict[str, float](float)
        self.open: list[str] = []
        self.since = 0.0

    def switch(self, to: str | None = None) -> None:
        """What has passed belongs to the piece that is open, which goes on as `to`."""
        before, self.since = self.since, time.perf_counter()
        if self.open:
            self.now[self.open[-1]] += self.since - before
            self.open[-1] = to or self.open[-1]

    @contextmanager
    def piece(self, name: str) -> Iterator[None]:
        self.switch()
        self.open.append(name)
        try:
            yield
        finally:
            self.switch()
            self.open.pop()

    def end_step(self) -> None:
        self.switch()
        if self.now[ENCODER[0]]:  # else no step yet since the last
            self.steps.append(self.now)
            self.now = defaultdict[str, float](float)

    def wrap(self, owner: Any, attribute: str, name: str, ends_step: bool = False) -> None:
        """Calls of owner.attribute within an epoch are that piece from here on."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.open:
                return function(*args, **kwargs)
            if ends_step:
                self.end_step()
            with self.piece(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)

    def median(self, *names: str) -> float:
        return statistics.median(sum(step[name] for name in names) for step in self.steps)

    def share(self, *names: str) -> float:
        """Of the time of all steps."""
        return sum(step[name] for step in self.steps for name in names) / sum(sum(s.values()) for s in self.steps)


def watch(trainer: Trainer, pieces: Pieces) -> None:
    """From here on the steps of the trainer's epochs are timed: a step begins where it asks for its batch."""
    for owner, attribute, name in (
        (trainer.model.query_encoder, "forward", ENCODER[0]),
        (trainer.model.key_encoder, "forward", ENCODER[1]),
        (trainer.optimizer, "zero_grad", UPDATE),
        (trainer.scaler, "step", UPDATE),
        (trainer_module, "to_input", "pixels to the encoder's input"),
        (trainer.model, "keys", "shuffling and gathering for batch norm"),
        (trainer.model, "update_key_encoder", "moving average of the key encoder"),
        (trainer.queue, "enqueue", "queue"),
        (trainer.labeller, "observe", "feature bank"),
        (trainer.unreadable, "note", "looking for unreadable images"),
        (trainer, "_look_at", "acting on values that are not finite"),
        (trainer, "_checkpoint_due", "acting on values that are not finite"),
    ):
        pieces.wrap(owner, attribute, name)
    pieces.wrap(_BaseDataLoaderIter, "__next__", "waiting for the loader", ends_step=True)
    train_epoch, loss_of, backward = trainer._train_epoch, trainer._loss, torch.Tensor.backward

    def timed_epoch(*args: Any) -> Any:
        with pieces.piece(REST):
            result = train_epoch(*args)
            pieces.end_step()
            return result

    def timed_loss(query: torch.Tensor, *args: Any) -> torch.Tensor:
        query.register_hook(lambda _: pieces.switch(to=ENCODER[2]))  # the loss's backward ends where its gradient is
        with pieces.piece(LOSS):
            return loss_of(query, *args)

    def timed_backward(*args: Any, **kwargs: Any) -> None:
        with pieces.piece(LOSS):
            backward(*args, **kwargs)

    replaced: Any = trainer
    replaced._train_epoch, replaced._loss = timed_epoch, timed_loss
    torch.Tensor.backward = timed_backward  # type: ignore[method-assign]


def profile(options: Options, out: str) -> list[str]:
    pieces = Pieces()
    trainer = demo(out, run={"checkpoint_every": 1e6})
    use_free_cores(trainer)
    epochs = trainer.epochs()
    for _ in range(RECLUSTER):
        next(epochs)
    watch(trainer, pieces)
    for _ in range(options.epochs):
        next(epochs)
    names = sorted({name for step in pieces.steps for name in step}, key=lambda name: -pieces.share(name))
    own = [name for name in names if name not in NOT_OWN]
    rows = [
        (name, "yes" if name in own else "", f"{1e3 * pieces.median(name):.3f}", f"{pieces.share(name):.2%}")
        for name in names
    ]
    for what, chosen in (("the trainer's own, all of them", own), ("the same and the loss", [*own, LOSS])):
        rows.append((f"**{what}**", "", f"{1e3 * pieces.median(*chosen):.3f}", f"**{pieces.share(*chosen):.2%}**"))
    rows.append(("a step", "", f"{1e3 * pieces.median(*names):.3f}", "100%"))
    return [
        f"{len(pieces.steps)} steps of the preset `demo` (batch {trainer.config.optim.batch_size}, "
        f"{trainer.config.data.workers} loading processes, {torch.get_num_threads()} computing thread(s)), epochs "
        f"{RECLUSTER + 1} to {RECLUSTER + options.epochs}: wall time between the calls of each piece, a piece within "
        "another taken off the outer one. Own is all but the encoders' forward and backward, the loss and the "
        "optimizer; the target is at most 5% of all steps' time.",
        "",
        *table(("piece", "own", "median, ms", "share of all steps' time"), rows),
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
    told = machine()
    with tempfile.TemporaryDirectory() as folder:
        parts: list[tuple[str, Callable[[Options, str], list[str]]]] = []
        parts += [("IFND beside plain MoCo", strategies)] * (options.rounds > 0)
        parts += [("Views by the loader and on the device", loading)] * options.images
        parts += [("A training step", lambda o, f: profile(o, f"{f}/profile"))]  # last: it wraps what all share
        sections = [f"\n## {title}\n\n" + "\n".join(part(options, folder)) for title, part in parts]
    text = (
        "# The trainer's own time, measured\n\n"
        f"`python bench/throughput.py`, {datetime.date.today()}. {told['CPU']}, {os.cpu_count()} cores, kernels for "
        f"{told['instruction set']}. Python {platform.python_version()}, torch {told['torch']}.\n"
        + "\n".join(sections)
        + "\n"
    )
    print(text)
    if options.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
