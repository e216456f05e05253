"""The small interface behind which all ranks look alike: processes, threads of one process, or a strict test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .meter import Meter

Messages = Sequence[tuple[int, Tensor]]  # (peer, contiguous tensor)


@dataclass(frozen=True)
class Transfer:
    """Sends and receives under way. Received tensors may be read after :meth:`wait`, sent ones written to."""

    wait: Callable[[], None]


class World(ABC):
    """A group of ranks as seen by one of them."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.meter = Meter()

    def start(self, sends: Messages, receives: Messages, kind: str) -> Transfer:
        """Start sending and receiving; both sides know every size. Every rank makes the same calls in the same order.

        Tensors must be contiguous and stay alive and untouched until ``wait``. Empty ones are not sent at all.
        """
        sends = [(peer, tensor) for peer, tensor in sends if tensor.numel()]
        receives = [(peer, tensor) for peer, tensor in receives if tensor.numel()]
        if sends:
            self.meter.add(kind, len(sends), sum(tensor.nbytes for _, tensor in sends))
        return self._start(sends, receives)

    def all_gather(self, tensor: Tensor, kind: str) -> list[Tensor]:
        """Every rank's ``tensor`` (of equal shape and dtype), by rank."""
        tensor = tensor.contiguous()
        self.meter.add(kind, 1, (self.size - 1) * tensor.nbytes)
        return self._all_gather(tensor) if self.size > 1 else [tensor]

    def all_reduce(self, tensor: Tensor, kind: str) -> Tensor:
        """The sum of every rank's ``tensor``, added in rank order, the same to the last bit on every rank."""
        gathered = self.all_gather(tensor, kind)
        total = gathered[0].clone()
        for other in gathered[1:]:
            total += other
        return total

    def peer(self, distance: int) -> int:
        """The rank ``distance`` after this one, in a circle."""
        return (self.rank + distance) % self.size

    def split(self, degree: int) -> tuple[World, World]:
        """The ``degree`` consecutive ranks that this one is among, and those at its place in every such block."""
        block = self.rank - self.rank % degree
        inside = SubWorld(self, range(block, block + degree))
        return inside, SubWorld(self, range(self.rank % degree, self.size, degree))

    @property
    def inside(self) -> int | None:
        """How many consecutive ranks share a node, where the group says so."""
        return None

    @property
    def lasting(self) -> object:
        """What lives as long as the group of ranks does, however often it is connected."""
        return self

    @property
    def control_device(self) -> torch.device:
        """Where small control tensors must lie to travel."""
        return torch.device("cpu")

    @property
    def payload_device(self) -> torch.device:
        """Where the tensors of attention lie that travel between these ranks."""
        return torch.device("cpu")

    @abstractmethod
    def _start(self, sends: Messages, receives: Messages) -> Transfer: ...

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        gathered = [tensor if rank == self.rank else torch.empty_like(tensor) for rank in range(self.size)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        self._start([(rank, tensor) for rank in others], [(rank, gathered[rank]) for rank in others]).wait()
        return gathered


class SingleRank(World):
    """One rank, alone: nothing travels."""

    def __init__(self) -> None:
        super().__init__(rank=0, size=1)

    @property
    def payload_device(self) -> torch.device:
        """An accelerator, where there is one."""
        on_gpu = torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def _start(self, sends: Messages, receives: Messages) -> Transfer:
        assert not [*sends, *receives], "one rank has no peers"
        return Transfer(wait=lambda: None)


class SubWorld(World):
    """Some ranks of a world, which talk through it: no group of their own has to be made. Bytes count in its meter."""

    def __init__(self, world: World, ranks: Sequence[int]) -> None:
        """``ranks`` of ``world``, this one among them; they are numbered in that order."""
        super().__init__(list(ranks).index(world.rank), len(ranks))
        self._world, self._ranks, self.meter = world, list(ranks), world.meter

    @property
    def lasting(self) -> object:
        """The world's."""
        return self._world.lasting

    @property
    def control_device(self) -> torch.device:
        """The world's."""
        return self._world.control_device

    @property
    def payload_device(self) -> torch.device:
        """The world's."""
        return self._world.payload_device

    def _start(self, sends: Messages, receives: Messages) -> Transfer:
        renumbered = ([(self._ranks[peer], tensor) for peer, tensor in messages] for messages in (sends, receives))
        return self._world._start(*renumbered)
