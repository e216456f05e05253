"""Errors that end a run with one line: what a user can mend is a ValueError, what befalls a run is a RunError."""

from __future__ import annotations

import re

BAD_INPUT, FAILED = 2, 1
"""Exit codes."""

_LOST_PEER = ("connection closed", "connection re", "broken pipe", "timed out", "timeout", "remote process", "socket")


class RunError(Exception):
    """A run that can't go on, for a reason that isn't its input; the message says what happened and what to do."""


def describe(error: BaseException) -> tuple[str, int] | None:
    """One line and an exit code for an expected error; None for one that is our own bug and deserves its traceback."""
    if isinstance(error, ValueError):
        return _line(error), BAD_INPUT
    if isinstance(error, RunError):
        return _line(error), FAILED
    if isinstance(error, RuntimeError | ConnectionError) and any(sign in str(error).lower() for sign in _LOST_PEER):
        # gloo says where in its source, then what happened, then advice.
        reason = re.sub(r"^\[[^]]*\] *", "", _line(error)).split(". This ")[0]
        return f"lost another rank, which ended or no longer answers ({reason}); its own output says why", FAILED
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return f"{_line(error)}; free space or mend the folder, then --resume", FAILED
    if isinstance(error, MemoryError):
        return f"out of memory ({_line(error)}); use more ranks, or --checkpoint-activations full", FAILED
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
