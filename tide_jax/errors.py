"""Exceptions a user's mistake can raise."""

from __future__ import annotations


class TideError(ValueError):
    """Bad input: one line saying what was wrong, what was expected and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
