"""Named spans of a training: torch's profiler shows them, and a benchmark can listen to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import record_function

Listener = Callable[[str, bool], object]
"""called with a span's name, and True where it begins, False where it ends"""

listeners: list[Listener] = []


@contextmanager
def span(name: str) -> Iterator[None]:
    """What is done within is the span of that name; microseconds where nobody listens."""
    for listener in listeners:
        listener(name, True)
    try:
        with record_function(f"ifnd_fast: {name}"):
            yield
    finally:
        for listener in listeners:
            listener(name, False)
