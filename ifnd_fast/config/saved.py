"""A config as YAML and in checkpoints, and in what two of them differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from ifnd_fast.config.options import Config, with_full_paths
from ifnd_fast.runtime.errors import CommandError

# What may differ when a run is resumed: nothing that changes what it computes. (Where --data lies may change too, where
# the identity of what is there is known: see `differences`.)
MAY_CHANGE = {"resume", "out", "device", "workers", "data_root", "knn_every", "checkpoint_every",
              "keep_checkpoints", "rank_timeout", "tensorboard"}  # fmt: skip


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists, strings and numbers, as config.yaml and checkpoints hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return list(value)
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`.

    Raises:
        CommandError: a section or option that this version doesn't know, or a value of the wrong kind.
    """

    def build(kind: type, values: Any) -> Any:
        default = kind()
        if not isinstance(values, dict):
            raise CommandError(f"the config's {kind.__name__} must be a mapping, got {type(values).__name__}")
        unknown = set(values) - {f.name for f in dataclasses.fields(kind)}
        if unknown:
            raise CommandError(f"the config has options that this version doesn't know: {sorted(unknown)}")
        return kind(**{name: convert(getattr(default, name), value) for name, value in values.items()})

    def convert(default: Any, value: Any) -> Any:
        if dataclasses.is_dataclass(default):
            return build(type(default), value)
        return tuple(value) if isinstance(default, tuple) else type(default)(value)

    return build(Config, values)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def load(path: Path) -> Config:
    """Raises CommandError: the file is missing, or is not a run's config."""
    try:
        return from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise CommandError(f"{path} is not the config of a run: {error}") from error


def differences(saved: Config, wanted: Config) -> list[str]:
    """The options in which two runs would compute different things, a line each."""
    lines = []
    saved, wanted = with_full_paths(saved), with_full_paths(wanted)
    may_change = MAY_CHANGE | ({"data"} if saved.identity else set())
    for section, values in to_dict(saved).items():
        other = to_dict(wanted)[section]
        if section == "identity":
            continue
        if not isinstance(values, dict):
            if values != other:
                lines.append(f"preset: the run has {values}, asked for {other}")
            continue
        lines += [
            f"--{name.replace('_', '-')}: the run has {value}, asked for {other[name]}"
            for name, value in values.items()
            if value != other[name] and name not in may_change
        ]
    return lines
