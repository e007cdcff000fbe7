"""ifnd-fast-export: the backbone of a run's checkpoint as a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from ifnd_fast.evaluate.backbone import load_backbone
from ifnd_fast.runtime.console import say
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.runtime.paths import refuse_folder
from ifnd_fast.training import saved_run


def export(
    run: tyro.conf.Positional[Path],
    step: Annotated[int | Literal["latest"], tyro.conf.arg(name="checkpoint")] = "latest",
    out: Path | None = None,
) -> None:
    """Write the backbone of a run's checkpoint, with the names of torchvision's ResNets, as backbone.pt has it at the
    end; also of a run that trains or was stopped.

    Args:
        run: the run's folder
        step: which of its checkpoints, by its step, or the latest
        out: file to write, which must not be there yet; default: RUN/backbone-step-STEP.pt
    """
    state = saved_run.chosen_state(run, step)
    assert state is not None  # a checkpoint was asked for
    path = out or run / f"backbone-step-{state.step:09d}.pt"
    refuse_folder("--out", path)
    if path.exists():
        raise UsageError(f"--out {path} is there already: give another name")
    saved_run.write_backbone(path, load_backbone(run, state=state).network.state_dict())
    say(f"{path}: the backbone of {run} at {state.position}")
