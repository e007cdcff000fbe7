"""python bench/clustering.py: k-means from scratch, warm, over ranks, its memory, ImageNet's size, and V100s on paper.

Writes bench/results/clustering.md. Let the machine be idle. Half an hour, most of it the peers' and ImageNet's size.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from peak_memory import new_peak, resident_peak
from roofline import CARDS, Assignment, mix_of
from tables import machine, table
from torch import Tensor
from torch.nn.functional import normalize

from ifnd_fast import KMeans
from ifnd_fast.ops.chunks import chunks
from ifnd_fast.runtime import distributed

RESULTS = Path(__file__).parent / "results" / "clustering.md"
D, ITERATIONS = 128, 20
IMAGENET, LEVELS = 1_281_167, (25_000, 50_000, 100_000)
PCL_STEPS = 100  # niter 20 times nredo 5, at every level (facebook's and salesforce's published settings)
NOISES = (0.8, 1.6)  # deviation of a feature from its cluster's direction, in that one's: separate, and overlapping


@dataclass
class Options:
    """Measure clustering and write bench/results/clustering.md."""

    n: int = 100_000
    """features of the comparisons"""
    clusters: int = 3_000
    """centroids of the comparisons"""
    rounds: int = 3
    """timings of which the median counts"""
    imagenet: bool = True
    """measure ImageNet's size too (some 2 GB)"""
    write: bool = True
    """write bench/results/clustering.md, besides printing it"""


def clustered_features(n: int, clusters: int, noise: float, seed: int = 0) -> Tensor:
    """(n, D) unit rows around `clusters` random directions, in random order."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, D, generator=generator)
    features = torch.empty(n, D)
    for part in chunks(features):
        rows = features[part]
        own = torch.randint(clusters, (len(rows),), generator=generator)
        rows.copy_(normalize(centres[own] + noise * torch.randn(len(rows), D, generator=generator)))
    return features


def inertia(x: Tensor, centroids: Tensor) -> float:
    return sum(float(torch.cdist(rows, centroids).min(1).values.double().square().sum()) for rows in x.split(4096))


def median_seconds(rounds: int, *calls: Callable[[], Any]) -> list[tuple[float, Any]]:
    """Median seconds and the last result of each call; the calls take turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    results: list[Any] = [None] * len(calls)
    for _ in range(rounds):
        for number, call in enumerate(calls):
            started = time.perf_counter()
            results[number] = call()
            seconds[number].append(time.perf_counter() - started)
    return [(statistics.median(times), result) for times, result in zip(seconds, results, strict=True)]


def faiss_kmeans(x: Tensor, clusters: int) -> Tensor:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    model = faiss.Kmeans(D, clusters, niter=ITERATIONS, min_points_per_centroid=1, max_points_per_centroid=len(x))
    model.train(x.numpy())
    return torch.from_numpy(model.centroids)


def sklearn_kmeans(x: Tensor, clusters: int, init: str) -> Tensor:
    from sklearn.cluster import KMeans as SklearnKMeans

    settings = {"max_iter": ITERATIONS, "n_init": 1, "tol": 0, "init": init, "random_state": 0}
    return torch.from_numpy(SklearnKMeans(clusters, algorithm="lloyd", **settings).fit(x.numpy()).cluster_centers_)


def seconds_to(wanted: float, x: Tensor, clusters: int) -> float:
    """Until ours has centroids of that inertia; infinite if it never does."""
    reached, started = [float("inf")], time.perf_counter()

    def look(_: int, found: float) -> None:
        if found <= wanted:
            reached.append(time.perf_counter() - started)

    model = KMeans(clusters, max_iter=ITERATIONS).fit(x, callback=look)
    look(0, model.inertia_)
    return min(reached)


def moved_features(x: Tensor, cosine: float) -> Tensor:
    """Unit rows at that cosine, on average, to what they were."""
    generator = torch.Generator().manual_seed(1)
    away = normalize(torch.randn(x.shape, generator=generator))
    return normalize(x + (1 / cosine**2 - 1) ** 0.5 * away)


def scratch_and_warm(options: Options, noise: float) -> list[tuple[str, ...]]:
    x = clustered_features(options.n, options.clusters, noise)
    (ours, model), (faiss_seconds, by_faiss) = median_seconds(
        options.rounds,
        lambda: KMeans(options.clusters, max_iter=ITERATIONS).fit(x),
        lambda: faiss_kmeans(x, options.clusters),
    )
    (sklearn_seconds, by_sklearn), (greedy_seconds, by_greedy) = median_seconds(
        1,
        lambda: sklearn_kmeans(x, options.clusters, "random"),
        lambda: sklearn_kmeans(x, options.clusters, "k-means++"),
    )
    peers = {
        "faiss": (faiss_seconds, inertia(x, by_faiss)),
        "scikit-learn from random rows": (sklearn_seconds, inertia(x, by_sklearn)),
        "scikit-learn by k-means++": (greedy_seconds, inertia(x, by_greedy)),
    }
    found = inertia(x, model.cluster_centers_)
    y = moved_features(x, 0.98)
    start = model.cluster_centers_
    (warm, warm_model), (faiss_again, by_faiss) = median_seconds(
        options.rounds,
        lambda: KMeans(options.clusters, max_iter=ITERATIONS, tol=1e-3, init=start).fit(y),
        lambda: faiss_kmeans(y, options.clusters),
    )
    warm_excess = inertia(y, warm_model.cluster_centers_) / inertia(y, by_faiss) - 1
    what = f"N={options.n:,} C={options.clusters:,} D={D}, noise {noise}"
    rows: list[tuple[str, ...]] = [
        (f"{what}: {ITERATIONS} iterations from scratch, s ({model.n_iter_} were enough)", "", f"{ours:.2f}"),
        ("faster than faiss", "≥ 4", f"{faiss_seconds / ours:.2f}"),
        ("faster than scikit-learn from random rows", "≥ 5", f"{sklearn_seconds / ours:.2f}"),
        ("faster than scikit-learn by k-means++", "", f"{greedy_seconds / ours:.2f}"),
    ]
    for peer, (seconds, reached) in peers.items():
        to_equal = statistics.median(seconds_to(reached, x, options.clusters) for _ in range(options.rounds))
        rows += [
            (f"inertia above that of {peer} ({seconds:.2f} s)", "≤ 0.2%", f"{100 * (found / reached - 1):+.2f}%"),
            (f"faster to an inertia as low as that ({to_equal:.2f} s)", "", f"{seconds / to_equal:.2f}"),
        ]
    return rows + [
        (f"warm, features moved to cosine 0.98, tol 1e-3, s (faiss from scratch {faiss_again:.2f}; ours took "
         f"{warm_model.n_iter_} iterations)", "", f"{warm:.2f}"),
        ("warm: faster than faiss from scratch", "≥ 8", f"{faiss_again / warm:.2f}"),
        ("warm: inertia above faiss's", "≤ 0.2%", f"{100 * warm_excess:+.2f}%"),
    ]  # fmt: skip


def one_rank(n: int, clusters: int) -> None:
    """Seconds of this rank's k-means, printed by rank 0."""
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    own = distributed.share(n)
    x = clustered_features(n, clusters, NOISES[1])[own.start : own.stop].clone()

    def run() -> None:
        distributed.barrier()
        KMeans(clusters, max_iter=ITERATIONS // 2, distributed=True).fit(x)

    run()
    [(seconds, _)] = median_seconds(3, run)
    if distributed.rank() == 0:
        print(seconds)
    distributed.stop()


def over_ranks(options: Options) -> list[tuple[str, ...]]:
    def seconds(ranks: int) -> float:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        return float(child(*launch, __file__, "--one-rank", options.n, options.clusters))

    alone, two = seconds(1), seconds(2)
    what = f"2 ranks of 1 thread over 1 rank of 1 thread, {ITERATIONS // 2} iterations, noise {NOISES[1]}"
    return [(f"{what} ({alone:.2f} s, {two:.2f} s)", "≥ 1.7", f"{alone / two:.2f}")]


def child(*arguments: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if "--one-rank" in arguments else None
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def memory_of(n: int, clusters: int, engine: str) -> None:
    """Bytes that a fit takes at its peak beside the features, printed."""
    x = clustered_features(n, clusters, NOISES[0])
    KMeans(20, max_iter=2, engine=engine).fit(x[:4000])  # starts threads, loads what is loaded late
    before = new_peak()
    KMeans(clusters, max_iter=5, engine=engine).fit(x)
    print(resident_peak() - before)


def memory(options: Options) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for n, engine in ((options.n, "fused"), (10 * options.n, "fused"), (options.n, "faiss")):
        features, centroids = 4 * D * n, 4 * D * options.clusters
        taken = int(child(__file__, "--memory", n, options.clusters, engine))
        what = f"{engine}, N={n:,}: peak memory beside features and centroids, of the features' {features / 1e6:.0f} MB"
        rows.append((what, "≤ 20%" if engine == "fused" else "", f"{100 * (taken - centroids) / features:.0f}%"))
    return rows


def at_size(n: int) -> None:
    """Seconds of an iteration with 1,000 and 10,000 clusters, and the resident peak in bytes, printed as JSON."""
    x = clustered_features(n, 1_000, NOISES[1])
    found: dict[str, float] = {}
    for clusters in (1_000, 10_000):
        started = time.perf_counter()
        KMeans(clusters, max_iter=2).fit(x)
        found[str(clusters)] = time.perf_counter() - started
    print(json.dumps(found | {"peak": resident_peak()}))


def imagenet_sized() -> list[tuple[str, ...]]:
    tenth, whole = (json.loads(child(__file__, "--size", n)) for n in (IMAGENET // 10, IMAGENET))
    rows = [
        (f"N={IMAGENET:,} C={clusters:,} D={D}, 2 iterations: {whole[str(clusters)]:.1f} s over ten times "
         f"N/10's {tenth[str(clusters)]:.2f} s", "≤ 1.15", f"{whole[str(clusters)] / (10 * tenth[str(clusters)]):.2f}")
        for clusters in (1_000, 10_000)
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
    return table(header, rows)


def main(options: Options) -> None:
    rows = [row for noise in NOISES for row in scratch_and_warm(options, noise)]
    rows += over_ranks(options) + memory(options)
    if options.imagenet:
        rows += imagenet_sized()
    told = machine()
    lines = [
        "# Clustering, measured",
        "",
        f"`python bench/clustering.py`, {datetime.date.today()}. {told['CPU']}, {told['threads']} threads, kernels for "
        f"{told['instruction set']}. Python {platform.python_version()}, torch {told['torch']}.",
        "",
        "Features are unit vectors around random directions; with noise 0.8 clusters are well apart and most settle "
        "after a few iterations, with 1.6 they overlap. faiss.Kmeans trains on all points, scikit-learn by Lloyd's "
        "algorithm; both start from random points, their fastest choice, and scikit-learn by its k-means++ (n_init=1) "
        "too, as ours does. Times are medians of "
        f"{options.rounds} runs that take turns (scikit-learn: one run).",
        "",
        *table(("target", "", "measured"), rows),
        "",
        "## ImageNet on V100s, on paper",
        "",
        f"N={IMAGENET:,}, D={D}, float16, labels with confidence: seconds that the assignments of one clustering take, "
        "from the share of the tensor cores' peak in bench/results/roofline.md (its range). Initial centroids, "
        "sums and communication are not in it; the last column is what ranks exchange. PCL runs 20 iterations five "
        "times for each level.",
        "",
        *on_paper(),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one-rank"]:
        one_rank(int(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["--memory"]:
        memory_of(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    elif sys.argv[1:2] == ["--size"]:
        at_size(int(sys.argv[2]))
    else:
        main(tyro.cli(Options))
