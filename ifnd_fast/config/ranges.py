"""What an option may be, said at its field, and whether a resumed training may have another value of it."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from ifnd_fast.runtime.errors import UsageError

T = TypeVar("T")

LARGEST = sys.float_info.max  # an integer that no float can hold is none that anything could count to


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`, but not `exclude`, which is one of them; of a tuple, each of its numbers.

    Attributes:
        words: what is wanted, where it is not said by the numbers; messages then show a tuple whole.
        empty: a tuple may be without numbers.
    """

    low: float = -math.inf
    high: float = math.inf
    exclude: float | None = None
    words: str = ""
    empty: bool = True

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high and -LARGEST <= number <= LARGEST and number != self.exclude

    def __str__(self) -> str:
        if self.words:
            return self.words
        if self.low == -math.inf:
            return "a finite number"
        if self.high == math.inf:
            return f"a finite number above {self.low:g}" if self.exclude == self.low else f"{self.low:g} or more"
        excluded = " (excluded)" if self.exclude == self.low else ""
        up_to = "below " if self.exclude == self.high else ""
        return f"from {self.low:g}{excluded} to {up_to}{self.high:g}"

    def check(self, name: str, value: Any) -> None:
        """Raises UsageError: the value of the option `name` is out of range."""
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        wrong = [number for number in numbers if number is None or number not in self]
        if wrong or not (numbers or self.empty):
            got = value if self.words or not wrong else wrong[0]
            raise UsageError(f"--{name.replace('_', '-')} must be {self}, got {got}")


def at_least(low: float, words: str = "", empty: bool = True) -> Range:
    return Range(low, words=words, empty=empty)


def above(low: float, words: str = "", empty: bool = True) -> Range:
    return Range(low, exclude=low, words=words, empty=empty)


def between(low: float, high: float, exclude: float | None = None, words: str = "", empty: bool = True) -> Range:
    return Range(low, high, exclude, words, empty)


FINITE = Range()
SEED = between(0, 2**62)
TEMPERATURE = between(1e-6, 1e6)
MOMENTUM = between(0, 1, exclude=1)  # at 1 nothing would move
RANK_TIMEOUT = between(0, 1e6, exclude=0)

_MAY_CHANGE = "a resumed training may have another value"
MayChange = Annotated[T, _MAY_CHANGE]
"""An option that changes nothing that is computed: a resumed training may have another value of it."""


def noted(of: type | Callable[..., object]) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Name, type and annotations of each option: a field of a dataclass, or a parameter of a function."""
    for name, hint in get_type_hints(of, include_extras=True).items():
        annotated = hasattr(hint, "__metadata__")
        yield name, get_args(hint)[0] if annotated else hint, hint.__metadata__ if annotated else ()


def check(options: Any) -> None:
    """A dataclass's options, those of sections too, are within the ranges at their fields; None may stand in for any
    that has it in its type.

    Raises:
        UsageError: one is out of its range, which it names with the option and the value.
    """
    _check(type(options), vars(options))


def check_arguments(function: Callable[..., object], **values: Any) -> None:
    """As `check`, of options that are a function's arguments."""
    _check(function, values)


def _check(of: type | Callable[..., object], values: Mapping[str, Any]) -> None:
    for name, kind, notes in noted(of):
        if name not in values:
            continue
        if dataclasses.is_dataclass(kind):
            check(values[name])
        for note in notes:
            if isinstance(note, Range) and not (values[name] is None and type(None) in get_args(kind)):
                note.check(name, values[name])


def may_change(kind: type) -> set[str]:
    """The names of the options that are marked so, of sections too."""
    found: set[str] = set()
    for name, inner, notes in noted(kind):
        if dataclasses.is_dataclass(inner):
            found |= may_change(inner)  # type: ignore[arg-type]
        elif _MAY_CHANGE in notes:
            found.add(name)
    return found


def check_levels(levels: tuple[int, ...]) -> None:
    """Raises UsageError: --levels are none, too many, or two of them the same."""
    if not 1 <= len(levels) <= 16:
        raise UsageError(f"--levels must be 1 to 16 numbers of clusters, got {len(levels)}")
    if len(set(levels)) < len(levels):
        raise UsageError(f"--levels must differ from each other, got {' '.join(map(str, levels))}")
