"""A config as YAML and in checkpoints, and in what two of them differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ifnd_fast.config.options import Config, with_full_paths
from ifnd_fast.config.ranges import may_change
from ifnd_fast.runtime.errors import CommandError


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists, strings and numbers, as config.yaml and checkpoints hold them."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


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


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as ("section.name", value) pairs, in their order."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows.append((f"{prefix}{key}", ", ".join(map(str, value)) or "none"))
        else:
            rows.append((f"{prefix}{key}", "none" if value is None else str(value)))
    return rows


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
    then, now = decisive(with_full_paths(saved)), decisive(with_full_paths(wanted))
    if saved.identity:  # where the data lie may change where it is known what they are
        del now["data"]
    preset = {"preset": now.pop("preset")}  # it is no option
    return changes(then, preset, prefix="") + changes(then, now)


def decisive(options: Any, kind: type | None = None) -> dict[str, Any]:
    """Plain values by name of the options, those of sections too, that are not marked `MayChange`: a training that is
    gone on with must have the same ones, for with others it would compute something else.

    Args:
        kind: only the options of this class; default: of the class of `options`, a dataclass.
    """
    found: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(kind or type(options))):
        value = getattr(options, name)
        found |= decisive(value) if dataclasses.is_dataclass(value) else {name: _plain(value)}
    return {name: value for name, value in found.items() if name not in may_change(kind or type(options))}


def changes(saved: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "--") -> list[str]:
    """A line for each value that is not the same; `prefix` stands before the names."""
    return [
        f"{prefix}{name.replace('_', '-')}: the run has {saved.get(name)}, asked for {value}"
        for name, value in wanted.items()
        if saved.get(name) != value
    ]
