"""Errors that end a run with one line: what a user can mend is a ValueError, what befalls a run is a RunError."""

from __future__ import annotations

import re

BAD_INPUT, FAILED = 2, 1
"""Exit codes."""

_LOST_PEER = ("connection closed", "connection re", "broken pipe", "timed out", "timeout", "remote process", "socket")

_OF_MEMORY = ("out of memory", "can't allocate memory")

# What to do about files that can't be read or written, and about too little memory, by command.
_REMEDIES = {
    "train": ("free space or mend the folder, then --resume", "use more ranks, or --checkpoint-activations full"),
    "check": ("mend the file or folder", "use a smaller --seq-len, or --batch-size 1"),
    "generate": ("mend the file or folder", "use more ranks, a smaller --chunk, or --dtype bf16"),
}
_REMEDY = ("mend the file or folder", "free some")


class RunError(Exception):
    """A run that can't go on, for a reason that isn't its input; the message says what happened and what to do."""


def describe(error: BaseException, command: str | None = None) -> tuple[str, int] | None:
    """One line and an exit code for an expected error; None for one that is our own bug and deserves its traceback."""
    of_files, of_memory = _REMEDIES.get(command or "", _REMEDY)
    text = str(error).lower()
    if isinstance(error, ValueError):
        return _line(error), BAD_INPUT
    if isinstance(error, RunError):
        return _line(error), FAILED
    if isinstance(error, RuntimeError | ConnectionError) and any(sign in text for sign in _LOST_PEER):
        # gloo says where in its source, then what happened, then advice.
        reason = re.sub(r"^\[[^]]*\] *", "", _line(error)).split(". This ")[0]
        return f"lost another rank, which ended or no longer answers ({reason}); its own output says why", FAILED
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return f"{_line(error)}; {of_files}", FAILED
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in _OF_MEMORY)):
        return f"out of memory ({_line(error)}); {of_memory}", FAILED
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
