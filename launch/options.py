"""What the options of every command have in common: how a wrong value is refused."""

from __future__ import annotations

LONGEST_WAIT = 1e6
"""The largest --timeout, in seconds."""


class OptionError(ValueError):
    """An option's value that can't be; the message names the option as the command line spells it."""


def option(name: str) -> str:
    """How the command line spells a configuration's field."""
    return "--" + name.replace("_", "-")


def at_least(smallest: int, name: str, value: float) -> None:
    """Raise OptionError where the value of the field `name` is less than `smallest`."""
    if value < smallest:
        raise OptionError(f"{option(name)} is {value}; expected {smallest} or more")


def positive(name: str, value: float, most: float) -> None:
    """Raise OptionError unless the value of the field `name` is positive, and at most `most`."""
    if not 0 < value <= most:
        raise OptionError(f"{option(name)} is {value}; expected a positive number, at most {most:g}")


def check_seed(seed: int) -> None:
    """Raise OptionError for a --seed that torch doesn't take."""
    at_least(0, "seed", seed)
    if seed >= 2**63:
        raise OptionError(f"--seed is {seed}; expected less than 2**63")
