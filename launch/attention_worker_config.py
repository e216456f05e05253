"""What `seqpar attention-worker` can be told: one frozen dataclass, from which the command line is derived."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .options import LONGEST_WAIT, OptionError, at_least, option, positive

LONGEST_CALL = 86_399.0
"""The longest --deadline, in seconds: less than a day."""
MOST_GIB = 2.0**40
_ADDRESS = re.compile(r"(\[[^\[\]\s]+\]|[^\[\]:\s]+):(\d{1,5})")


@dataclass(frozen=True, kw_only=True)
class AttentionWorkerConfig:
    """Hold keys and values for `seqpar generate --attention-workers`, and compute the attention over them.

    Runs by itself (`seqpar attention-worker --listen HOST:PORT --nproc 2`) or under `torchrun --no-python ... seqpar
    attention-worker`, which ends all workers when one ends. Model ranks find the workers at a store, which this command
    serves (--listen) or has in common with workers that are already there (--store). The address has no password: let
    nobody reach it whom you don't trust. SIGTERM lets model ranks take what they keep here elsewhere before it ends.
    """

    listen: str | None = None
    """HOST:PORT at which model ranks find the workers: an address of this machine, port 0 for any free one."""
    store: str | None = None
    """HOST:PORT where other workers are, to join them."""
    memory: float | None = None
    """GiB for keys and values, of each worker. Default: 80% of what is free here, shared out evenly."""
    name: str | None = None
    """What messages call the workers. Default: this machine's name."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where keys and values are: a GPU for each worker where there are some, by default."""

    connections: int = 64
    """Model ranks that a worker serves at once, at most; --batches 2 makes two connections."""
    lease: float = 86_400.0
    """Seconds that a model rank may be silent; then what it keeps here is freed."""
    deadline: float = 30.0
    """Seconds that the rest of a request may take to arrive once it has begun."""
    grace: float = 60.0
    """Seconds that model ranks get after SIGTERM to take what they keep here elsewhere; a second one ends at once."""

    nproc: int = 1
    """Workers to start on this machine. Leave it out under torchrun, which starts them itself."""
    threads: int | None = None
    """CPU threads of each worker. Default: this machine's cores shared out evenly."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if (self.listen is None) == (self.store is None):
            which = "are both missing" if self.listen is None else "are both given"
            raise OptionError(
                f"--listen and --store {which}; expected one: --listen HOST:PORT for workers of their own, or --store "
                "HOST:PORT to join those that are there"
            )
        for name in ("listen", "store"):
            if getattr(self, name) is not None:
                check_address(name, getattr(self, name), free_port=name == "listen")
        for name in ("connections", "nproc"):
            at_least(1, name, getattr(self, name))
        if self.threads is not None:
            at_least(1, "threads", self.threads)
        if self.memory is not None:
            positive("memory", self.memory, MOST_GIB)
        for name in ("lease", "grace"):
            positive(name, getattr(self, name), LONGEST_WAIT)
        positive("deadline", self.deadline, LONGEST_CALL)
        if self.name is not None and not (0 < len(self.name) <= 200 and self.name.isprintable()):
            raise OptionError(f"--name is {self.name[:40]!r}; expected 1 to 200 printable characters")


def check_address(name: str, address: str, *, free_port: bool = False) -> None:
    """Raise OptionError where the value of the field `name` is not HOST:PORT."""
    match = _ADDRESS.fullmatch(address)
    if match is None or not (0 if free_port else 1) <= int(match[2]) < 65_536:
        port = "0 to 65535, 0 for any free one" if free_port else "1 to 65535"
        raise OptionError(
            f"{option(name)} is {address!r}; expected HOST:PORT, or [HOST]:PORT for IPv6, a port of {port}"
        )
