"""A run's folder: OUT/config.yaml, metrics.jsonl, result.json, checkpoints/, backbone.pt, report.html."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from ifnd_fast.runtime import checkpoint
from ifnd_fast.runtime.errors import CommandError, UsageError

CONFIG, METRICS = "config.yaml", "metrics.jsonl"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """This process alone writes to OUT meanwhile; the system frees the lock of one that is killed.

    Raises:
        UsageError: another run holds it.
        CommandError: OUT can't be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / ".lock")
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise UsageError(f"another process trains in --out {out}: wait for it, or choose another folder") from error
    except OSError as error:
        raise CommandError(f"--out {out} can't be written: {error}") from error
    try:
        checkpoint.remove_temporaries(out)
        yield
    finally:
        lock.release()


def create(out: Path, config: str) -> None:
    """Make OUT and write its config.yaml. Raises CommandError: OUT can't be made or written."""
    checkpoint.write_atomically(out / CONFIG, lambda file: file.write(config.encode()))


def refuse_a_run(out: Path) -> None:
    """Raises UsageError: OUT already holds a run; nothing in it is touched."""
    if any((out / name).exists() for name in (CONFIG, METRICS, "checkpoints")):
        raise UsageError(f"--out {out} already holds a run: add --resume to go on with it, or choose another folder")


def truncate_metrics(out: Path, count: str, last: int) -> None:
    """Keep the lines up to that "epoch" or "step": what a killed run wrote after its last checkpoint goes, and comes
    again."""
    path = out / METRICS
    if path.exists():
        kept = [line for line in _complete_lines(path) if json.loads(line)[count] <= last]
        text = "".join(f"{line}\n" for line in kept)
        checkpoint.write_atomically(path, lambda file: file.write(text.encode()))


def _complete_lines(path: Path) -> list[str]:
    lines = path.read_text().split("\n")[:-1]  # what follows the last line feed was cut off by a kill
    return [line for line in lines if line.strip()]


def append_metrics(out: Path, metrics: dict[str, Any]) -> None:
    """A line of metrics.jsonl. Raises CommandError: the disk is full or not writable."""
    path = out / METRICS
    try:
        with open(path, "a") as file:
            file.write(json.dumps(metrics) + "\n")
    except OSError as error:
        raise CommandError(f"could not write {path}: {error}") from error


def last_epoch(out: Path) -> int:
    """Of metrics.jsonl; 0: it has none."""
    lines = _complete_lines(out / METRICS) if (out / METRICS).exists() else []
    return json.loads(lines[-1])["epoch"] if lines else 0


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Raises CommandError: the disk is full or not writable."""
    text = json.dumps(content, indent=indent) + "\n"
    checkpoint.write_atomically(path, lambda file: file.write(text.encode()))
