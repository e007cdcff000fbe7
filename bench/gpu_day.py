"""python bench/gpu_day.py [STEP ...]: the first day on a real GPU, in six steps that go on where they stopped.

1 build        without isolation, import, info           4 speed   against eager, torch.compile, cuBLAS + argmax
2 tests        tests/gpu on the card (here: emulated)    5 epoch   ResNet-50 with the queue, IFND against keep
3 sanitizers   memcheck and racecheck on a small run     6 cifar   CIFAR-10, ResNet-18: keep, eliminate, oracle

Each step writes a table to $OUT (or build/gpu_day) and says PASS, FAIL, SKIPPED (with what it lacks) or UNFINISHED (the
minutes were up: run it again). What passed is not run again (--again does), training is resumed. All, if none is named.

For a machine with one GPU, Python 3.12, torch 2.11, Triton 3.6, nvcc 13, no network and ten minutes a command. Packages
that it lacks are brought as wheels: where there is a network and the package is installed, --fetch prints the command
that downloads them into wheels/; step 1 installs what lies there and says what is still missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / "build" / "gpu_day"
NAMES = {1: "build", 2: "tests", 3: "sanitizers", 4: "speed", 5: "epoch", 6: "cifar"}
PASS, FAIL, SKIPPED, UNFINISHED = "PASS", "FAIL", "SKIPPED", "UNFINISHED"
# Of the package's requirements: what torch brings, and what the day does without.
WITH_TORCH = {"torch", "torchvision", "triton", "numpy", "sympy", "mpmath", "networkx", "fsspec", "setuptools"}
NOT_NEEDED = {"faiss-gpu", "faiss-cpu", "ruff", "mypy", "types-pyyaml", "tensorboard", "tomli", "exceptiongroup"}


@dataclass
class Options:
    steps: tuple[int, ...] = tuple(NAMES)
    minutes: float = 9.0
    again: bool = False
    wheels: Path = Path("wheels")
    cifar: Path = Path("data/cifar10")
    seeds: tuple[int, ...] = (0,)
    epochs: int = 200


def parser() -> argparse.ArgumentParser:
    """The standard library's, as the machine may have no other before step 1."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option, default = out.add_argument, Options()
    option("steps", nargs="*", type=int, default=default.steps, help="numbers of the steps to run")
    option("--minutes", type=float, default=default.minutes, help="until what runs is told to stop")
    option("--again", action="store_true", help="run what passed before, too")
    option("--wheels", type=Path, default=default.wheels, help="folder of wheels that this machine lacks")
    option(
        "--cifar",
        type=Path,
        default=default.cifar,
        help="CIFAR-10 as images, as bench/cifar10_data.py writes them (step 6)",
    )
    option("--seeds", type=int, nargs="+", default=default.seeds, help="of step 6")
    option("--epochs", type=int, default=default.epochs, help="of step 6")
    option("--fetch", action="store_true", help="print the command that downloads wheels")
    option("--missing", action="store_true", help="say which packages are not installed (as step 1 does)")
    option("--images", type=Path, help="fill this folder with pictures (as step 5 does)")
    option("--compare", type=Path, nargs=2, help="table of the times of two runs (as step 5 does)")
    return out


@dataclass(frozen=True)
class Command:
    name: str
    argv: tuple[str, ...]
    needs: tuple[str, ...] = ("gpu",)
    """ "gpu", a program, or a path: without one of them it is skipped"""


def python(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, *map(str, arguments))


def train(*arguments: object) -> tuple[str, ...]:
    """As ifnd-fast-train, which a tree that was not installed has not."""
    return python("-c", "from ifnd_fast.cli import train; train()", *arguments)


def commands(step: int, o: Options) -> list[Command]:
    return {1: build, 2: tests, 3: sanitizers, 4: speed, 5: epoch, 6: cifar}[step](o)


def build(o: Options) -> list[Command]:
    wheels = [str(wheel) for wheel in sorted(o.wheels.glob("*.whl"))]
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-index")
    bring = [Command("wheels", python(*pip, *wheels), needs=())] if wheels else []
    return [
        *bring,
        Command("build", python("setup.py", "-q", "build_ext", "--inplace"), needs=()),
        Command("info", python("-m", "ifnd_fast.info"), needs=()),
        Command("runs on the card", python("-c", ON_THE_CARD)),
        Command("packages", python("bench/gpu_day.py", "--missing"), needs=()),
    ]


ON_THE_CARD = """
import torch
from ifnd_fast.ops import backends
device = torch.device("cuda")
for operator in ("info_nce", "assign_clusters"):
    for dtype in (torch.float16, torch.float32):
        refused = {name: backends.refusal(name, operator, device, dtype) for name in ("cuda", "triton")}
        print(operator, dtype, backends.choose("auto", operator, device, dtype), refused)
        assert refused["cuda"] is None, refused
"""


def tests(o: Options) -> list[Command]:
    """In parts, as Triton compiles for each shape; without a GPU the first part alone, on the emulated cards."""
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    return [
        Command("values and gradients", python(*pytest, "tests/gpu/test_operators.py", "-k", SHORT), needs=()),
        Command("streams and graphs", python(*pytest, "tests/gpu/test_on_gpu.py")),
        Command("operators, cuda", python(*pytest, "tests/gpu/test_operators.py", "-k", "cuda")),
        Command("operators, triton", python(*pytest, "tests/gpu/test_operators.py", "-k", "triton")),
        Command("extremes", python(*pytest, "tests/gpu/test_extremes.py")),
        Command("torch", python(*pytest, "tests/gpu/test_torch.py")),
    ]


SHORT = "values_and_gradients or many_points"


def sanitizers(o: Options) -> list[Command]:
    def under(tool: str) -> tuple[str, ...]:
        checked = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all")
        return (*checked, *python("-m", "pytest", "-q", "-x", "tests/gpu/test_operators.py", "-k", SHORT))

    return [Command(tool, under(tool), needs=("gpu", "compute-sanitizer")) for tool in ("memcheck", "racecheck")]


def speed(o: Options) -> list[Command]:
    return [
        Command(f"{what}, {dtype}", python("bench/gpu_speed.py", "--what", what, "--dtype", dtype))
        for what in ("queue", "in-batch", "assign")
        for dtype in ("float16", "bfloat16", "float32")
    ]


def epoch(o: Options) -> list[Command]:
    """Random pictures: the time of an epoch does not depend on what they show."""
    images = STATE / "images"
    common = ("imagenet", "--data", images, "--epochs", 2, "--levels", 250, 500, 1000, "--knn-every", 0,
              "--workers", os.cpu_count() or 1, "--augment", "device", "--amp", "bf16")  # fmt: skip
    make = python("bench/gpu_day.py", "--images", images)
    runs = [
        Command(name, train(*common, "--out", STATE / "epoch" / name, "--false-negatives", name))
        for name in ("keep", "eliminate")
    ]
    compare = python("bench/gpu_day.py", "--compare", STATE / "epoch" / "keep", STATE / "epoch" / "eliminate")
    return [Command("images", make), *runs, Command("compare", compare)]


def cifar(o: Options) -> list[Command]:
    common = ("cifar10", "--data", o.cifar, "--arch", "resnet18", "--epochs", o.epochs, "--augment", "device",
              "--amp", "bf16", "--knn-every", max(1, o.epochs // 10))  # fmt: skip
    runs = STATE / "cifar"
    return [
        Command(
            f"{name}, seed {seed}",
            train(*common, "--out", runs / f"{name}-{seed}", "--false-negatives", name, "--seed", seed),
            needs=("gpu", str(o.cifar / "train")),
        )
        for seed in o.seeds
        for name in ("keep", "eliminate", "oracle")
    ]


# ---- what the commands need of this file --------------------------------------------------------------------------


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required() -> list[str]:
    """Names of what the package, its build and its tests need themselves, and the day takes."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:requires|dependencies|test|augment) = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    entries = [entry for one in lists for entry in re.findall(r'"([^"]+)"', one) if "nvidia" not in entry]
    names = [normal(re.match(r"[\w.-]+", entry).group()) for entry in entries]  # type: ignore[union-attr]
    return [name for name in dict.fromkeys(names) if name not in NOT_NEEDED]


def missing() -> list[str]:
    def there(name: str) -> bool:
        try:
            return bool(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            return False

    return [name for name in required() if not there(name)]


def closure(names: Iterable[str]) -> list[str]:
    """These packages and all that they need, by what is installed here, without what torch brings."""
    installed = {normal(one.metadata["Name"]): one for one in importlib.metadata.distributions()}
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = normal(waiting.pop())
        if name in installed and name not in found | WITH_TORCH | NOT_NEEDED:
            found.add(name)
            needs = [need for need in installed[name].requires or [] if "extra ==" not in need]
            waiting += [re.match(r"[\w.-]+", need).group() for need in needs]  # type: ignore[union-attr]
    return [f"{name}=={installed[name].version}" for name in sorted(found)]


def fetch() -> str:
    """The command that downloads them for the machine."""
    where = ("--python-version", "3.12", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64")
    return shlex.join(["pip", "download", "--no-deps", "--only-binary=:all:", *where, "-d", "wheels",
                       *closure(required())])  # fmt: skip


def make_images(folder: Path, count: int = 8192, side: int = 256) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(count):
        picture = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:06}.jpg")


def compare(keep: Path, eliminate: Path) -> list[str]:
    """Seconds of the second epoch, after what is compiled and read once."""
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (keep, eliminate)]
    keys = [key for key in last[1] if key.endswith("seconds") or key in ("loss", "images_per_second")]
    lines = ["| of the last epoch | keep | eliminate |", "|---|---|---|"]
    return [*lines, *(f"| {key} | {last[0].get(key, '-')} | {last[1][key]} |" for key in keys)]


# ---- running them -------------------------------------------------------------------------------------------------


def lacks(command: Command) -> str | None:
    for need in command.needs:
        if need == "gpu":
            import torch

            if not torch.cuda.is_available():
                return "no GPU that torch can use"
        elif "/" in need:
            if not (ROOT / need).exists():
                return f"{need} is missing"
        elif shutil.which(need) is None:
            return f"{need} is not on the PATH"
    return None


def run(command: Command, log: Path, deadline: float) -> str:
    """Its verdict; at the deadline it is sent SIGTERM, at which training writes a checkpoint."""
    argv = list(command.argv)
    if "--out" in argv and list(Path(argv[argv.index("--out") + 1]).glob("checkpoints/*.pt")):
        argv.append("--resume")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            return PASS if process.wait(max(1.0, deadline - time.monotonic())) == 0 else FAIL
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return UNFINISHED


def verdict_of(verdicts: Sequence[str]) -> str:
    return next((worst for worst in (FAIL, UNFINISHED, PASS) if worst in verdicts), SKIPPED)


def run_step(step: int, o: Options, out: Path, deadline: float) -> str:
    memory = STATE / f"{step}.json"
    done = {} if o.again or not memory.exists() else json.loads(memory.read_text())
    rows, tails, verdicts = [], [], []
    for number, command in enumerate(commands(step, o)):
        log, why, begin = STATE / f"{step}-{number}.log", lacks(command), time.monotonic()
        if why:
            verdict, note = SKIPPED, why
        elif done.get(command.name, {}).get("verdict") == PASS:
            verdict, note = PASS, f"{done[command.name]['seconds']:.0f} s, before"
        elif FAIL in verdicts or begin >= deadline:
            verdict, note = UNFINISHED, "after the failure" if FAIL in verdicts else "the minutes were up"
        else:
            verdict = run(command, log, deadline)
            seconds = time.monotonic() - begin
            note = f"{seconds:.0f} s"
            done[command.name] = {"verdict": verdict, "seconds": seconds}
            memory.write_text(json.dumps(done))
        verdicts.append(verdict)
        rows.append(f"| {command.name} | {verdict} | {note} | `{shlex.join(command.argv)[:200]}` |".replace("\n", " "))
        if log.exists() and verdict != SKIPPED:
            tails += ["", f"## {command.name}", "", "```", *log.read_text().splitlines()[-60:], "```"]
    verdict = verdict_of(verdicts)
    some = f", {verdicts.count(SKIPPED)} of {len(verdicts)} skipped" * (verdict != SKIPPED and SKIPPED in verdicts)
    lines = [
        f"# {step} {NAMES[step]}: {verdict}{some}",
        "",
        card(),
        "",
        "| command | verdict | time | |",
        "|---|---|---|---|",
    ]
    (out / f"{step}-{NAMES[step]}.md").write_text("\n".join([*lines, *rows, *tails]) + "\n")
    print(f"{step} {NAMES[step]}: {verdict}{some}", *(f"  {row}" for row in rows), sep="\n", flush=True)
    return verdict


def card() -> str:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    versions = f"torch {torch.__version__}, Triton {triton}, Python {sys.version.split()[0]}"
    return f"{time.strftime('%Y-%m-%d')}, {name}, {versions}"


def run_day(o: Options) -> bool:
    """Whether no step failed."""
    out = Path(os.environ.get("OUT") or STATE)
    for folder in (out, STATE):
        folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * o.minutes
    return FAIL not in [run_step(step, o, out, deadline) for step in o.steps]


def main() -> None:
    arguments = parser().parse_args()
    if wrong := set(arguments.steps) - set(NAMES):
        parser().error(f"steps are {', '.join(map(str, NAMES))}, got {', '.join(map(str, sorted(wrong)))}")
    given = vars(arguments)
    wanted = {name: given.pop(name) for name in ("fetch", "missing", "images", "compare")}
    if wanted["fetch"]:
        print(fetch())
    elif wanted["missing"]:
        if lacking := missing():
            how = "where there is a network, `python bench/gpu_day.py --fetch` prints what downloads them into wheels/"
            sys.exit(f"missing: {', '.join(lacking)}; {how}")
    elif wanted["images"]:
        make_images(wanted["images"])
    elif wanted["compare"]:
        print("\n".join(compare(*wanted["compare"])))
    else:
        sys.exit(not run_day(Options(**given)))


if __name__ == "__main__":
    main()
