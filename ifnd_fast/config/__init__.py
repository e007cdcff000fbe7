"""A run's options: what they are, their presets, their ranges, and how they are saved."""

from ifnd_fast.config.options import (
    BUILT_IN,
    ClusterConfig,
    Config,
    ContrastConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    full_data,
    full_path,
    with_full_paths,
)
from ifnd_fast.config.presets import PRESETS
from ifnd_fast.config.ranges import RANGES, check_levels, check_range, validate
from ifnd_fast.config.saved import MAY_CHANGE, differences, from_dict, load, to_dict, to_yaml

__all__ = [
    "BUILT_IN",
    "MAY_CHANGE",
    "PRESETS",
    "RANGES",
    "ClusterConfig",
    "Config",
    "ContrastConfig",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "check_levels",
    "check_range",
    "differences",
    "from_dict",
    "full_data",
    "full_path",
    "load",
    "to_dict",
    "to_yaml",
    "validate",
    "with_full_paths",
]
