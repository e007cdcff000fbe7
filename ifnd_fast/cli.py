"""The commands: ifnd-fast-train (and `pretrain`, which is it from Python), ifnd-fast-eval, ifnd-fast-report,
ifnd-fast-export, ifnd-fast-embed."""

from __future__ import annotations

import argparse
import copy
import difflib
import io
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from torch import nn

from ifnd_fast import config as configs
from ifnd_fast.config import FROM_PYTHON, PRESETS, Config
from ifnd_fast.runtime import distributed, run_folder
from ifnd_fast.runtime.console import errors, guard_output, say, stage, table, warn
from ifnd_fast.runtime.errors import CommandError, LoadingError, PeerError, Stopped, UsageError
from ifnd_fast.runtime.paths import expand_home, refuse_file, refuse_folder
from ifnd_fast.runtime.stop import StopSignals

if TYPE_CHECKING:
    from ifnd_fast.data.images import Images

COMPARISON = Path("comparison.html")


def train() -> None:
    """ifnd-fast-train [PRESET] [options]"""
    to_go_on = "add --resume to the same command to go on from the last checkpoint"
    _run(lambda: _train(parse_train(sys.argv[1:])), f"interrupted: {to_go_on}")


def evaluate() -> None:
    """ifnd-fast-eval TASK CHECKPOINT [options]"""
    from ifnd_fast.evaluate.tasks import TASKS

    app = tyro.extras.SubcommandApp()
    for name, task in TASKS.items():
        app.command(name=name)(task)
    _run(
        lambda: app.cli(
            prog="ifnd-fast-eval", description="Measure a trained backbone.", args=expand_home(sys.argv[1:])
        )
    )


def export() -> None:
    """ifnd-fast-export RUN [--checkpoint STEP] [--out FILE]"""
    from ifnd_fast.evaluate.export import export as write

    _run(lambda: tyro.cli(write, prog="ifnd-fast-export", args=expand_home(sys.argv[1:])))


def embed() -> None:
    """ifnd-fast-embed CHECKPOINT --out FILE [options]"""
    from ifnd_fast.evaluate.embed import embed as write

    again = "the same command goes on where it was stopped"
    _run(lambda: tyro.cli(write, prog="ifnd-fast-embed", args=expand_home(sys.argv[1:])), f"interrupted: {again}")


def report() -> None:
    """ifnd-fast-report RUN [RUN ...] [--out FILE]"""

    def write(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")],
        out: Path | None = None,
    ) -> None:
        """Write the page of a run: its curves, the false negatives it detected, its clusters; or compare several runs.

        Args:
            runs: folder of a run, or of several runs to compare; those that differ in nothing but the seed are shown
                as mean and standard deviation
            out: file to write; default: RUN/report.html of one run, comparison.html here of several
        """
        if not runs:
            raise UsageError("give the folder of a run, or of several to compare")
        if out is not None:
            refuse_folder("--out", out)
        _write_report(runs, out)

    _run(lambda: tyro.cli(write, prog="ifnd-fast-report", args=expand_home(sys.argv[1:])))


def _run(command: Callable[[], object], interrupted: str = "interrupted") -> None:
    """Run a command; its failures become a line on standard error and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of names and signs that the terminal has no way to show
    output, code = guard_output(), 0
    try:
        with StopSignals():
            command()
    except CommandError as error:
        if isinstance(error, LoadingError) and error.details:
            errors.print(error.details, markup=False)
        reported_by_another = isinstance(error, PeerError) or (isinstance(error, Stopped) and distributed.rank() != 0)
        if not reported_by_another:
            errors.print(f"error: {error}", markup=False)
        code = error.exit_code
    except KeyboardInterrupt:
        errors.print(interrupted)
        code = 130
    except SystemExit as end:  # after --help, or an option that doesn't parse
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        distributed.stop()
        output.flush()
    if code or output.error:
        sys.exit(code or _lost(output.error))


def _lost(error: OSError | None) -> int:
    """The exit code of a command whose standard output could not be written."""
    if isinstance(error, BrokenPipeError):  # by `| head`, say: nothing to tell
        return 128 + getattr(signal, "SIGPIPE", 13)
    errors.print(f"error: standard output could not be written: {error}", markup=False)
    return 1


def parse_train(args: list[str]) -> Config:
    """The config that the command line asks for; with --resume, the run's own, which options must not change.

    Raises:
        UsageError: unknown preset, option out of range, or not what the run to resume was started with.
        SystemExit: 0 after --help, 2 for an option that doesn't parse.
    """
    args = expand_home(args)
    preset, args = (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    default = copy.deepcopy(PRESETS[preset or "demo"][1])
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--out", type=Path, default=default.run.out)
    early.add_argument("--resume", action="store_true")
    known, _ = early.parse_known_args(args)
    saved = configs.load(known.out / run_folder.CONFIG) if known.resume else None
    if saved is not None:
        default = copy.deepcopy(saved)
        default.run.out = known.out
        default.preset = preset or saved.preset
    settings = tyro.cli(
        Config,
        default=default,
        args=args,
        prog="ifnd-fast-train [PRESET]",
        description=_description(preset or "demo"),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    configs.validate(settings)
    if saved is not None:
        differences = configs.differences(saved, settings)
        if differences:
            raise UsageError(f"--resume: {known.out} was started with other options:\n  " + "\n  ".join(differences))
    refuse_file("--out", settings.run.out)
    return configs.with_full_paths(settings)


def pretrain(
    preset: str = "demo",
    *,
    backbone: nn.Module | None = None,
    images: Images | None = None,
    test_images: Images | None = None,
    **options: Any,
) -> dict[str, float]:
    """Train from Python as `ifnd-fast-train PRESET` does, with the same options, run's folder and report.

    Args:
        preset: "demo", "cifar10", "cifar100" or "imagenet".
        backbone: any network, (B, 3, S, S) float32 -> (B, n_features), in place of that of --arch; training starts from
            its weights. It is copied for the momentum encoder, and trained in place. Who resumes gives it again.
        images: what to train on, in place of --data: see `ifnd_fast.data.images.Images`.
        test_images: what to measure with; None: every tenth of `images`.
        options: of the command, by their names with underscores: out="runs/mine", epochs=10, levels=(10, 20).

    Returns:
        The figures of result.json: accuracies in percent, seconds.

    Raises:
        TypeError: there is no such option.
        UsageError, CommandError: what the command says, both of `ifnd_fast.runtime.errors`.

    Example:
        >>> pretrain("imagenet", backbone=network, data="/images", out="runs/mine", epochs=100)  # doctest: +SKIP
        >>> pretrain(epoch=3)
        Traceback (most recent call last):
        TypeError: pretrain() has no option epoch, but epochs
    """
    known = {name for section in vars(Config()).values() if hasattr(section, "__dict__") for name in vars(section)}
    if unknown := sorted(set(options) - known):
        near = difflib.get_close_matches(unknown[0], known)
        raise TypeError(f"pretrain() has no option {', '.join(unknown)}{f', but {near[0]}' if near else ''}")
    if backbone is not None:
        options["arch"] = _from_python(backbone)
    if images is not None:
        options["data"] = _from_python(images)
    try:
        settings = parse_train([preset, *_words(options)])
    except SystemExit as end:
        raise UsageError("options of another kind than the command takes (see above)") from end
    return _train(settings, backbone, None if images is None else (images, test_images))


def _from_python(given: object) -> str:
    return f"{FROM_PYTHON}{type(given).__module__}.{type(given).__qualname__}"


def _words(options: dict[str, Any]) -> Iterator[str]:
    """Options as a command line has them."""
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        elif isinstance(value, list | tuple):
            yield from (f"--{option}", *map(str, value))
        else:
            yield from (f"--{option}", str(value))


def _description(preset: str) -> str:
    presets = "\n".join(f"  {name}: {text}" for name, (text, _) in PRESETS.items())
    return (
        "Pre-train an image encoder by contrastive learning with incremental false negative detection.\n\n"
        f"Presets, whose values the options below override:\n{presets}\n\nDefaults shown: {preset}.\n\n"
        "Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 end a run after its step, with a checkpoint to --resume from. "
        "Where output is no terminal, a line tells of the progress each minute, or each IFND_FAST_LINE_SECONDS."
    )


def _train(
    settings: Config, backbone: nn.Module | None = None, images: tuple[Images, Images | None] | None = None
) -> dict[str, float]:
    import ifnd_fast.report.page  # noqa: F401  what it needs is missed now, not after the training
    from ifnd_fast.runtime.compute import leave_cores_to_workers, pick_compute
    from ifnd_fast.training.precheck import check_packages
    from ifnd_fast.training.trainer import Trainer  # after --help: this takes seconds to import

    started = time.perf_counter()
    check_packages(settings)
    distributed.ranks_in_environment()  # says what is wrong there
    compute = pick_compute(settings.run.device, settings.run.amp)
    leave_cores_to_workers(compute.device, settings.data.workers)
    distributed.start(compute.device, settings.run.rank_timeout)
    trainer = Trainer(settings, compute, backbone, images)
    with trainer.open():
        result = trainer.fit()
        if distributed.rank() == 0:
            _write_report((settings.run.out,))
    _print_result(result, time.perf_counter() - started, settings.run.out, bool(settings.model.weights))
    return result


def _write_report(runs: tuple[Path, ...], path: Path | None = None) -> None:
    from ifnd_fast.report.comparison import write_comparison
    from ifnd_fast.report.page import write_report

    try:
        with stage("report"):
            what = "report" if len(runs) == 1 else "comparison"
            written = write_report(runs[0], path) if len(runs) == 1 else write_comparison(runs, path or COMPARISON)
        say(f"{what}: {written}")
    except (OSError, ValueError) as error:
        raise CommandError(f"no report of {', '.join(map(str, runs))}: {error}") from error


def _print_result(result: dict[str, Any], seconds: float, out: Path, from_weights: bool) -> None:
    from ifnd_fast.training.accuracies import accuracy_table, headline

    columns, rows = accuracy_table(result, from_weights)
    if rows:
        table("Top-1 accuracy: few labels by logistic regression, all by kNN (k = 20)", columns, rows)
        if text := headline(result, from_weights):
            say(text)
    else:
        warn("accuracy was not measured: no labels, or no readable images to measure with")
    say(f"{seconds:.0f} seconds; backbone: {out / 'backbone.pt'}; report: {out / 'report.html'}")
