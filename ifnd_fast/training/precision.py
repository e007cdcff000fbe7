"""What --amp auto comes to on a CPU: measured where a run begins, the run's own where it goes on."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import nn

from ifnd_fast.config import Config
from ifnd_fast.ops import backends
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.compute import Compute, pick_compute
from ifnd_fast.runtime.console import say
from ifnd_fast.training.objective import memory_format, new_encoder

PRECISIONS = {"off": "float32", "bf16": "bfloat16"}
LEAST, ROUNDS, SECONDS = 4, (3, 9), 3.0  # images of a pass, passes of each precision, and what these take about
GAIN = 0.95  # of float32's time: less gain would be within what timings vary by, and float32 is the more exact


def settle(config: Config, compute: Compute, backbone: nn.Module | None = None) -> Compute:
    """What a run computes with: `compute`, but for --amp auto on a CPU, which is bfloat16 where that is faster than
    float32 for the run's own encoder. The config keeps the choice, and a run that goes on takes the one that it has.

    All ranks have to call it, and measure at the same time, as they will train; rank 0's choice is theirs.

    Args:
        backbone: the run's, where it is not that of --arch.
    """
    if config.run.amp != "auto" or compute.device.type != "cpu":
        return compute
    if not config.run.resume:
        choice: Literal["bf16", "off"] = "off"
        if backends.cpu_has_bfloat16():
            own = config.optim.batch_size // distributed.world_size() // config.optim.accumulate
            rows = 2 * own if config.contrast.negatives == "in-batch" else own
            seconds, n = measure(training_pass(config, backbone), rows)
            choice = choose(seconds)
            times = ", ".join(f"{1e3 * seconds[amp]:.0f} ms in {name}" for amp, name in PRECISIONS.items())
            say(f"--amp auto: {choice} on this CPU, where {n} images forward and back take {times}")
        config.amp_on_cpu = distributed.all_gather_objects(choice)[0]
    return pick_compute(config.run.device, config.run.amp, config.amp_on_cpu)


def choose(seconds: Mapping[str, float]) -> Literal["bf16", "off"]:
    """The precision to train with, by the seconds that each takes."""
    return "bf16" if seconds["bf16"] < GAIN * seconds["off"] else "off"


def measure(run: Callable[[str, int], float], rows: int) -> tuple[dict[str, float], int]:
    """Median seconds of each precision, whose passes take turns, and of how many images: `rows`, or what can be timed
    in some seconds.

    Args:
        run: does a pass in a precision over so many images, and gives its seconds.
    """
    n, (fewest, most) = min(rows, LEAST), ROUNDS

    def turn() -> dict[str, float]:
        return {amp: run(amp, n) for amp in PRECISIONS}

    turn()  # loads and compiles
    n = max(n, min(rows, int(n * SECONDS / fewest / sum(turn().values()))))
    rounds = max(fewest, min(most, int(SECONDS / sum(turn().values()))))  # the first of a size prepares for it
    taken = [turn() for _ in range(rounds)]
    return {amp: statistics.median(seconds[amp] for seconds in taken) for amp in PRECISIONS}, n


def training_pass(config: Config, backbone: nn.Module | None) -> Callable[[str, int], float]:
    """`run` of `measure`: the run's encoder forward and back, a copy that is thrown away, over noise. It is not that of
    --compile, which takes a minute in each precision. Nothing that training depends on changes by it."""
    with torch.random.fork_rng(devices=[]):
        encoder = new_encoder(config, copy.deepcopy(backbone))
    encoder, size = encoder.to(memory_format=memory_format(config)).train(), config.data.image_size

    def run(amp: str, n: int) -> float:
        with torch.random.fork_rng(devices=[]):
            images = torch.randn(n, 3, size, size, dtype=torch.float32, device="cpu")
            images = images.to(memory_format=memory_format(config))
            started = time.perf_counter()
            with pick_compute("cpu", amp).autocast():
                features = encoder(images)
            features.sum().backward()
            encoder.zero_grad(set_to_none=True)
            return time.perf_counter() - started

    return run
