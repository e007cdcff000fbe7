"""Errors that a command reports in a line and an exit code, without a traceback."""

from __future__ import annotations

import signal


class CommandError(Exception):
    """A failure with a message for the person who runs the command; exit code 1."""

    exit_code = 1


class UsageError(CommandError):
    """What was asked for can't be done with these options or this data; exit code 2."""

    exit_code = 2


class NonFiniteError(CommandError):
    """A loss, features or centroids that are not finite."""


class LoadingError(CommandError):
    """A process that loads images failed or died.

    Attributes:
        details: its traceback, if there is one.
    """

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


class Stopped(CommandError):
    """A signal asked the run to stop; exit code 128 + its number, as a shell reports it."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class PeerError(CommandError):
    """Another rank failed, and tells why itself."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code
