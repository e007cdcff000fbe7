"""Errors that a command reports in a line and an exit code, without a traceback."""

from __future__ import annotations


class CommandError(Exception):
    """A failure with a message for the person who runs the command; exit code 1."""

    exit_code = 1


class UsageError(CommandError):
    """What was asked for can't be done with these options or this data; exit code 2."""

    exit_code = 2


class NonFiniteError(CommandError):
    """A loss, features or centroids that are not finite."""
