"""The errors autopar raises on purpose; the command line turns each into one message and an exit status."""

from __future__ import annotations


class AutoparError(Exception):
    """Base of every deliberate error: names the thing, the place and the way out. Exit status 2."""

    exit_status = 2


class BadInputError(AutoparError, ValueError):
    """The user's model, cluster, job, fix or file cannot be used as given."""


class InfeasibleError(AutoparError):
    """No plan fits: says which stage, what is short and by how many bytes. Exit status 3."""

    exit_status = 3


class UnsupportedError(AutoparError):
    """A model or plan uses something autopar cannot execute; names it and the way out."""


class VerificationError(AutoparError):
    """A plan's module does not compute what the single device computes. Exit status 1."""

    exit_status = 1
