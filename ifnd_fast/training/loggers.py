"""Where a run's figures go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, each a small logger."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from ifnd_fast.config import Config, flatten, to_dict
from ifnd_fast.runtime import distributed, run_folder
from ifnd_fast.runtime.console import warn
from ifnd_fast.runtime.errors import Stopped, UsageError

End = Literal["finished", "stopped", "failed"]
IDS = "loggers.json"  # in a run's folder: by which ids the trackers know it, so that a resumed run goes on with them
LONGEST_PARAMETER = 500  # characters: what MLflow's servers take, also older ones


class Logger(Protocol):
    """Takes a run's figures."""

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        """The figures after so many epochs."""
        ...

    def close(self, end: End) -> None:
        """There are no more in this sitting; a run that was stopped may be gone on with."""
        ...


class TensorBoard:
    """An event file in OUT/tensorboard for each sitting, whole after every epoch. (Files are read in the order of their
    names, which for those of one second is not that of the epochs.)"""

    def __init__(self, config: Config):
        from torch.utils.tensorboard import SummaryWriter

        out = config.run.out
        # What an earlier sitting wrote of epochs that metrics.jsonl no longer has is not shown from here on.
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=run_folder.last_epoch(out) + 1)

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self, end: End) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of --wandb PROJECT; WANDB_MODE=offline keeps it in OUT/wandb, for `wandb sync`. The x axis is the epoch:
    one that is trained again after a kill has two points, with the same figures."""

    def __init__(self, config: Config):
        import wandb

        out = config.run.out
        number = _id_of(out, "wandb", lambda: uuid.uuid4().hex)
        self.run = wandb.init(
            project=config.run.wandb, name=out.name, id=number, resume="allow", dir=str(out), config=to_dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        self.run.define_metric("epoch")
        self.run.define_metric("*", step_metric="epoch")

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        self.run.log({"epoch": epoch, **figures})

    def close(self, end: End) -> None:
        self.run.finish(exit_code=0 if end == "finished" else 1)


class MLflow:
    """A run of --mlflow EXPERIMENT on the server that MLFLOW_TRACKING_URI names; a step is an epoch."""

    ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def __init__(self, config: Config):
        from mlflow import MlflowClient

        self.client = MlflowClient()
        self.run = _id_of(config.run.out, "mlflow", lambda: self._begin(config))
        self.client.update_run(self.run, status="RUNNING")

    def _begin(self, config: Config) -> str:
        from mlflow.entities import Param

        experiment = self.client.get_experiment_by_name(config.run.mlflow)
        number = experiment.experiment_id if experiment else self.client.create_experiment(config.run.mlflow)
        run = self.client.create_run(number, run_name=config.run.out.name).info.run_id
        settings = [Param(name, str(value)[:LONGEST_PARAMETER]) for name, value in flatten(to_dict(config))]
        self.client.log_batch(run, params=settings)
        return run

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[Metric(name, value, now, epoch) for name, value in figures.items()])

    def close(self, end: End) -> None:
        self.client.set_terminated(self.run, self.ENDS[end])


def _id_of(out: Path, tracker: str, begin: Callable[[], str]) -> str:
    """By which the tracker knows the run in OUT; `begin` makes it known where it is not."""
    path = out / IDS
    ids = json.loads(path.read_text()) if path.exists() else {}
    if tracker not in ids:
        ids[tracker] = begin()
        run_folder.write_json(path, ids)
    return ids[tracker]


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as numbers by name: of a list NAME/level_0 and so on; of a figure for each iteration the
    last one; without epoch and step."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, list):
            for level, item in enumerate(value):
                last = (item[-1] if item else None) if isinstance(item, list) else item
                found |= {} if last is None else {f"{name}/level_{level}": last}
        elif name not in ("epoch", "step"):
            found[name] = value
    return found


class Loggers:
    """The loggers that were asked for, on rank 0, while the context is open. One that fails later on is warned of, and
    training goes on without it.

    Args:
        config: of the run, whose folder is there when the context is entered.
    """

    def __init__(self, config: Config):
        self.config, self.open = config, dict[str, Logger]()

    def __enter__(self) -> Loggers:
        """Raises UsageError: one can't begin; PeerError on ranks but 0."""
        run = self.config.run
        wanted: dict[str, tuple[object, Callable[[Config], Logger]]] = {
            "--tensorboard": (run.tensorboard, TensorBoard),
            "--wandb": (run.wandb, WeightsAndBiases),
            "--mlflow": (run.mlflow, MLflow),
        }
        with distributed.raise_on_all_ranks(True):
            for option, (asked, begin) in wanted.items():
                if asked and distributed.rank() == 0:
                    try:
                        self.open[option] = begin(self.config)
                    except Exception as error:  # whatever network and server make of it
                        raise UsageError(f"{option} {asked}: {type(error).__name__}: {error}{HINTS[option]}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        stopped = isinstance(error, (Stopped, KeyboardInterrupt))
        end: End = "finished" if kind is None else "stopped" if stopped else "failed"
        for option in list(self.open):
            self._try(option, lambda logger: logger.close(end))
        self.open.clear()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self.open:
            figures = scalars(metrics)
            for option in list(self.open):
                self._try(option, lambda logger: logger.log(metrics["epoch"], figures))

    def _try(self, option: str, call: Callable[[Logger], object]) -> None:
        try:
            call(self.open[option])
        except Exception as error:
            del self.open[option]
            warn(f"{option} failed, training goes on without it: {type(error).__name__}: {error}")


HINTS = {
    "--tensorboard": "; pip install 'ifnd-fast[tensorboard]' first",
    "--wandb": "; log in with `wandb login`, or set WANDB_MODE=offline",
    "--mlflow": "; MLFLOW_TRACKING_URI names the server, such as http://localhost:5000; without one set it to "
    "file:FOLDER, and MLFLOW_ALLOW_FILE_STORE=true",
}
