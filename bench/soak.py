"""python bench/soak.py: kill a run with SIGKILL at random moments, resume it each time, compare it with one left alone.

Kills are aimed at steps, feature passes, clustering and checkpoint writes; which, and when in it, is drawn at random.
Exits with 1 when a bit of the weights, the queue, the labels or the metrics (times excepted) differs.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from sklearn.datasets import load_digits

from ifnd_fast.runtime import checkpoint

PHASES = {"step": 0.05, "features": 0.1, "clustering": 0.05, "checkpoint": 0.02}  # spans; seconds they last, at most
TRAIN = """
from ifnd_fast import cli
from ifnd_fast.runtime import spans
phases, file = {phases!r}, {file!r}
def write(name, begins):
    if name in phases:
        with open(file, "w") as out:
            out.write(name if begins else "between")
spans.listeners.append(write)
cli.train()
"""


@dataclass
class Options:
    """Kill a small run again and again; what it ends with must be what an undisturbed run ends with."""

    kills: int = 30
    """SIGKILLs in all"""
    ranks: int = 1
    """processes that train together (gloo)"""
    epochs: int = 30
    """of the run; one that ends before all kills were made is compared, and another begun"""
    seed: int = 0
    """of the moments of the kills"""


class Run:
    """Its processes, started or resumed; rank 0 writes its phase to a file."""

    def __init__(self, out: Path, data: Path, options: Options):
        self.out, self.phase_file = out, out.with_suffix(".phase")
        self.phase_file.write_text("starting")
        resume = (out / "config.yaml").exists()
        settings = [
            "--data", data, "--out", out, "--epochs", options.epochs, "--batch-size", 32, "--queue-size", 64,
            "--levels", 3, 6, "--image-size", 16, "--width", 8, "--dim", 16, "--workers", 0, "--recluster-every", 1,
            "--amp", "off", "--checkpoint-every", 0.34, "--knn-every", 3,
        ]  # fmt: skip
        arguments = [str(word) for word in (["--resume", "--out", out] if resume else settings)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(options.ranks)}
        self.log = open(out.with_suffix(".log"), "a")
        self.processes = []
        for rank in range(options.ranks):
            code = TRAIN.format(phases=PHASES, file=str(self.phase_file) if rank == 0 else os.devnull)
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            if options.ranks > 1:
                environment |= {**together, "RANK": str(rank)}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, *arguments], env=environment, stdout=self.log, stderr=self.log
                )
            )

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.wait()

    def wait(self) -> list[int]:
        codes = [process.wait() for process in self.processes]
        self.log.close()
        return codes


def kill_in(run: Run, phase: str, dice: random.Random) -> str | None:
    """Kill the run somewhere in one of the next few phases of that name; the phase hit. None: it ended before."""
    passes, seen = dice.randint(1, 4), False
    while run.running():
        now = run.phase_file.read_text() == phase
        if now and not seen:
            passes -= 1
            if passes == 0:
                time.sleep(dice.uniform(0, PHASES[phase]))
                break
        seen = now
        time.sleep(0.0005)
    if not run.running():
        return None
    run.kill()
    return run.phase_file.read_text() or phase


def make_data(folder: Path) -> Path:
    pixels, labels = load_digits(return_X_y=True)
    for label in range(5):
        (folder / str(label)).mkdir(parents=True)
        for number, image in enumerate(pixels[labels == label][:40]):
            picture = Image.fromarray((image.reshape(8, 8) * 15).astype("uint8"))
            picture.save(folder / str(label) / f"{number}.png")
    return folder


def outcome(out: Path) -> dict[str, Any]:
    """Everything that must be the same."""
    state = checkpoint.load_latest(out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if "second" not in key} for line in lines]
    return {"backbone": torch.load(out / "backbone.pt", weights_only=True), "metrics": metrics} | {
        key: state[key]
        for key in ("model", "optimizer", "negatives", "accepted", "clustered", "pseudo_labels", "step", "rng")
    }


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [path]


def finish(run: Run) -> None:
    codes = run.wait()
    if any(codes):
        sys.exit(f"the run failed with {codes}; the end of its log:\n{run.out.with_suffix('.log').read_text()[-3000:]}")


def main(options: Options) -> None:
    dice, hits = random.Random(options.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder) / "data")
        whole = Path(folder) / "whole"
        finish(Run(whole, data, options))
        expected, different, number = outcome(whole), [], 0
        while sum(hits.values()) < options.kills:
            number += 1
            out = Path(folder) / f"killed-{number}"
            while sum(hits.values()) < options.kills:
                run = Run(out, data, options)
                hit = kill_in(run, dice.choice(list(PHASES)), dice)
                if hit is None:
                    break
                hits[hit] += 1
                print(f"kill {sum(hits.values())} in {hit}", flush=True)
            finish(run if hit is None else Run(out, data, options))
            found = differences(expected, outcome(out))
            print(f"run {number}: {'differs in ' + ', '.join(found[:5]) if found else 'the same bits'}", flush=True)
            different += found
    told = ", ".join(f"{phase} {count}" for phase, count in hits.most_common())
    print(f"{sum(hits.values())} kills ({told}), {number} runs of {options.ranks} ranks: "
          f"{'DIFFERENT' if different else 'the same bits as the run left alone'}")  # fmt: skip
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main(tyro.cli(Options))
