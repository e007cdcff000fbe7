"""python bench/clustering.py: k-means beside its peers, warm, over ranks, its memory, ImageNet's size, V100s on paper.

Writes bench/results/clustering-KIND.md of this kind of CPU. Let the machine be idle. An hour, most of it the peers'.
`pip install -e '.[bench]'` brings the peers that the package does not use itself; `--quick` shows that it all runs.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from kmeans_peers import OURS, PEERS, WARM, Data, Engine, Fit, Missing
from peak_memory import new_peak, resident_peak
from roofline import CARDS, Assignment, mix_of
from tables import installed, machine, results_of, table, told

from ifnd_fast import KMeans
from ifnd_fast.runtime import distributed

D, ITERATIONS = 128, 20
IMAGENET, LEVELS = 1_281_167, (25_000, 50_000, 100_000)
PCL_STEPS = 100  # niter 20 times nredo 5, at every level (facebook's and salesforce's published settings)
APART, OVERLAPPING = 0.9, 1.6  # noise
COMPARED = [
    Data(100_000, 3_000, D, APART),
    Data(100_000, 3_000, D, OVERLAPPING),
    Data(50_000, 2_000, 384, OVERLAPPING),
    Data(50_000, 2_000, 768, APART),
    Data(50_000, 2_000, 768, OVERLAPPING),
    Data(50_000, 2_000, 768, 3.9),  # as far from each other, in their spread, as those of 128 columns at 1.6
    Data(25_000, 1_000, 1024, OVERLAPPING),
    Data(25_000, 1_000, 1536, OVERLAPPING),
]
SMALL = Data(4_000, 20)
LONG = 20.0  # seconds: an engine whose fit takes longer has one
Rows = list[tuple[str, ...]]
Part = Literal["peers", "warm", "first", "ranks", "memory", "imagenet", "paper"]


@dataclass
class Options:
    """Measure clustering and write bench/results/clustering-KIND.md."""

    rounds: int = 3
    """timings of which the median counts"""
    parts: tuple[Part, ...] = ("peers", "warm", "first", "ranks", "memory", "imagenet", "paper")
    """what to measure"""
    without: tuple[str, ...] = ()
    """peers that are not measured: faiss.SuperKmeans and "scikit-learn, k-means++" take most of the hour"""
    write: bool = True
    """write bench/results/clustering-KIND.md, besides printing it; it names the parts and peers that it has"""
    quick: bool = False
    """all of it once, at a hundredth of the size: shows that it runs, and writes nothing"""

    @property
    def divisor(self) -> int:
        return 100 if self.quick else 1

    @property
    def compared(self) -> list[Data]:
        return [d._replace(n=d.n // self.divisor, clusters=d.clusters // self.divisor) for d in COMPARED]


# ---- beside the peers ----


def in_turns(names: Sequence[str], data: Data, rounds: int) -> dict[str, Fit | str]:
    """The fit of median seconds of each engine, or why there is none; each in a process that is warm, in turns."""
    found: dict[str, list[Fit]] = {name: [] for name in names}
    missing: dict[str, Fit | str] = {}
    with ExitStack() as held:
        engines = {name: held.enter_context(Engine(name)) for name in names}
        for number in range(rounds):
            for name, engine in engines.items():
                if name in missing or (found[name] and found[name][0].seconds > LONG):
                    continue
                try:
                    if number == 0:
                        engine.fit(SMALL, 2)  # loads what is loaded late, starts threads
                    found[name].append(engine.fit(data, ITERATIONS, trail=number == 0 and name == OURS))
                except Missing as error:
                    missing[name] = str(error)
    medians: dict[str, Fit | str] = {}
    for name, fits in found.items():
        middle = sorted(fits)[(len(fits) - 1) // 2] if fits else None
        medians[name] = missing[name] if middle is None else middle._replace(trail=fits[0].trail)
    return medians


def beside_peers(data: Data, peers: Sequence[str], rounds: int) -> list[str]:
    found = in_turns([OURS, *peers], data, rounds)
    ours = found[OURS]
    assert isinstance(ours, Fit)
    rows: Rows = []
    for name, fit in found.items():
        if isinstance(fit, str):
            rows.append((name, fit, *[""] * 5))
            continue
        cells = (f"{fit.seconds:.2f}", f"{fit.iterations}", f"{1e3 * fit.seconds / fit.iterations:.0f}")
        if name == OURS:
            rows.append((name, *cells, "", "", ""))
            continue
        reached = min((seconds for seconds, inertia in ours.trail if inertia <= fit.inertia), default=None)
        to_equal = ("never", "") if reached is None else (f"{reached:.2f}", f"{fit.seconds / reached:.1f}")
        rows.append((name, *cells, f"{100 * (ours.inertia / fit.inertia - 1):+.2f}%", *to_equal))
    header = (
        str(data),
        "s",
        "iterations",
        "ms an iteration",
        "our inertia over its",
        "ours is as low after, s",
        "faster",
    )
    return [*table(header, rows), ""]


def warm(data: Data, rounds: int) -> Rows:
    moved = data._replace(cosine=0.98)
    found = in_turns([WARM, "faiss.Kmeans"], moved, rounds)
    ours, faiss = found[WARM], found["faiss.Kmeans"]
    assert isinstance(ours, Fit)
    what = f"{data}, warm: features moved to cosine {moved.cosine}, tol 1e-3, s ({ours.iterations} iterations)"
    rows: Rows = [(what, "", f"{ours.seconds:.2f}")]
    if isinstance(faiss, str):
        return [*rows, ("faiss.Kmeans", "", faiss)]
    return [
        *rows,
        (f"faster than faiss from scratch ({faiss.seconds:.2f} s)", "≥ 8", f"{faiss.seconds / ours.seconds:.1f}"),
        ("inertia above faiss's", "≤ 0.2%", f"{100 * (ours.inertia / faiss.inertia - 1):+.2f}%"),
    ]


def first_fit(rounds: int) -> Rows:
    data, more, again = Data(20_000, 100), [], []
    for _ in range(rounds):
        with Engine(OURS) as fresh:
            first, second = (fresh.fit(data, ITERATIONS).seconds for _ in range(2))
        more.append(first - second)
        again.append(second)
    what = f"{data}: s more that the first fit of a process takes than its second ({statistics.median(again):.3f} s)"
    return [(what, "≤ 0.1", f"{statistics.median(more):.3f}")]


# ---- ranks, memory, ImageNet ----


def one_rank(data: Data) -> None:
    """Seconds of this rank's k-means, printed by rank 0."""
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    own = distributed.share(data.n)
    x = data.features()[own.start : own.stop].clone()

    def run() -> None:
        distributed.barrier()
        KMeans(data.clusters, max_iter=ITERATIONS // 2, distributed=True).fit(x)

    run()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    if distributed.rank() == 0:
        print(statistics.median(seconds))
    distributed.stop()


def over_ranks(data: Data) -> Rows:
    def seconds(ranks: int) -> float:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        return float(child(*launch, __file__, "--one-rank", data.n, data.clusters))

    alone, two = seconds(1), seconds(2)
    what = f"2 ranks of 1 thread over 1 rank of 1 thread, {ITERATIONS // 2} iterations, {data}"
    return [(f"{what} ({alone:.2f} s, {two:.2f} s)", "≥ 1.7", f"{alone / two:.2f}")]


def child(*arguments: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if "--one-rank" in arguments else None
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def memory_of(data: Data, engine: str) -> None:
    """Bytes that a fit takes at its peak beside the features, printed."""
    x = data.features()
    KMeans(20, max_iter=2, engine=engine).fit(x[:4000])  # starts threads, loads what is loaded late
    before = new_peak()
    KMeans(data.clusters, max_iter=5, engine=engine).fit(x)
    print(resident_peak() - before)


def memory(data: Data) -> Rows:
    rows: Rows = []
    for n, engine in ((data.n, "fused"), (10 * data.n, "fused"), (data.n, "faiss")):
        features, centroids = 4 * D * n, 4 * D * data.clusters
        taken = int(child(__file__, "--memory", engine, n, data.clusters))
        what = f"{engine}, N={n:,}: peak memory beside features and centroids, of the features' {features / 1e6:.0f} MB"
        rows.append((what, "≤ 20%" if engine == "fused" else "", f"{100 * (taken - centroids) / features:.0f}%"))
    return rows


def at_size(n: int, *numbers: int) -> None:
    """Seconds of two iterations with so many clusters, and the resident peak in bytes, printed as JSON."""
    x = Data(n, numbers[0]).features()
    found: dict[str, float] = {}
    for clusters in numbers:
        started = time.perf_counter()
        KMeans(clusters, max_iter=2).fit(x)
        found[str(clusters)] = time.perf_counter() - started
    print(json.dumps(found | {"peak": resident_peak()}))


def imagenet_sized(n: int, *numbers: int) -> Rows:
    tenth, whole = (json.loads(child(__file__, "--size", rows, *numbers)) for rows in (n // 10, n))
    rows = [
        (f"N={n:,} C={clusters:,} D={D}, 2 iterations: {whole[str(clusters)]:.1f} s over ten times "
         f"N/10's {tenth[str(clusters)]:.2f} s", "≤ 1.15", f"{whole[str(clusters)] / (10 * tenth[str(clusters)]):.2f}")
        for clusters in numbers
    ]  # fmt: skip
    return [*rows, ("resident peak of that process, GiB", "≤ 24", f"{whole['peak'] / 2**30:.1f}")]


def on_paper() -> list[str]:
    """Seconds of an epoch's clustering of ImageNet, from the roofline's range of the V100's assignment kernel."""
    card = CARDS[0]
    rows = []
    for clusters in LEVELS:
        shape = Assignment(IMAGENET, clusters)
        best, worst = mix_of(shape, card).share(card)
        step = [shape.operations() / card.tensor / share for share in (best, worst)]
        cells = [
            f"{steps / cards * step[0]:.0f} to {steps / cards * step[1]:.0f}"
            for steps in (ITERATIONS, PCL_STEPS)
            for cards in (1, 8)
        ]
        reduced = 8 * clusters * D + 8 * clusters
        rows.append((f"{clusters:,}", *cells, f"{reduced / 1e6:.0f}"))
    header = (
        "clusters", f"{ITERATIONS} iterations, 1 V100", "8 V100s", f"PCL's {PCL_STEPS} steps, 1 V100", "8 V100s",
        "MB summed over ranks an iteration",
    )  # fmt: skip
    return [
        "",
        "## ImageNet on V100s, on paper",
        "",
        f"N={IMAGENET:,}, D={D}, float16, labels with confidence: seconds that the assignments of one clustering take, "
        "from the share of the tensor cores' peak in bench/results/roofline.md (its range). Initial centroids, "
        "sums and communication are not in it; the last column is what ranks exchange. PCL runs 20 iterations five "
        "times for each level.",
        "",
        *table(header, rows),
    ]


def measured(options: Options) -> dict[Part, Callable[[], Rows]]:
    """What gives rows of the table of targets, by its part's name."""
    main = options.compared[:2]
    sizes = [size // options.divisor for size in (IMAGENET, 1_000, 10_000)]
    return {
        "warm": lambda: [row for data in main for row in warm(data, options.rounds)],
        "first": lambda: first_fit(options.rounds),
        "ranks": lambda: over_ranks(main[1]),
        "memory": lambda: memory(main[0]),
        "imagenet": lambda: imagenet_sized(*sizes),
    }


def main(options: Options) -> None:
    if options.quick:
        options.rounds = 1
    told_of, lines = machine(), list[str]()
    peers = [name for name in PEERS if name not in options.without]
    if "peers" in options.parts:
        for data in options.compared:
            found = beside_peers(data, peers, options.rounds)
            print(*found, sep="\n", file=sys.stderr, flush=True)
            lines += found
    rows = [row for part, rows_of in measured(options).items() if part in options.parts for row in rows_of()]
    versions = ", ".join(map(installed, ("torch", "faiss-gpu", "superkmeans", "scikit-learn", "scikit-learn-intelex")))
    text = "\n".join([
        "# Clustering, measured",
        "",
        f"`python bench/clustering.py`, {datetime.date.today()}. {told(told_of)}. Python {platform.python_version()}, "
        f"{versions}. Measured: {', '.join(options.parts)}; left out: {', '.join(options.without) or 'no peer'}.",
        "",
        "## Beside its peers",
        "",
        f"At most {ITERATIONS} iterations from scratch, on all rows; each engine stops where it does by itself: ours "
        "where nothing moves any more, superkmeans by its early stop. Features are unit vectors around random "
        "directions; with noise 0.9 clusters are well apart and most settle after a few iterations, with 1.6 they "
        "overlap (the more columns, the less). Ours starts by greedy k-means++, as scikit-learn's k-means++ does "
        "(n_init=1), the others from random rows, which they are fastest with. Every engine runs in a process of its "
        "own, warm, with as many threads, and with the OpenBLAS kernels that are fastest here. Times are medians of "
        f"{options.rounds} that take turns, of those above {LONG:.0f} s one; an iteration's "
        "has its share of the start. Ours is as low after: until our inertia is at most the peer's in the end, start "
        "included, and how many times faster that is. The goals at N=100,000: 4 times faster than faiss, 5 than "
        "scikit-learn, an inertia at most 0.2% above theirs.",
        "",
        *lines,
        "## The rest",
        "",
        *table(("target", "", "measured"), rows),
        *(on_paper() if "paper" in options.parts else []),
    ]) + "\n"  # fmt: skip
    print(text)
    if options.write and not options.quick:
        results_of("clustering", told_of["kind"]).write_text(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one-rank"]:
        one_rank(Data(*map(int, sys.argv[2:])))
    elif sys.argv[1:2] == ["--memory"]:
        memory_of(Data(*map(int, sys.argv[3:])), sys.argv[2])
    elif sys.argv[1:2] == ["--size"]:
        at_size(*map(int, sys.argv[2:]))
    else:
        main(tyro.cli(Options))
