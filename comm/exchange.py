"""Exchanges: how the ranks' shards of K and V pass by every rank, and how the gradients get home.

K and V travel as one flat message, heads unexpanded, while the rank computes with what it has; its own shard is always
first. In a backward, the gradient of a step's shard leaves when the step is done, and travels during the next.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .world import Transfer, World

_HOME = -1  # when what arrives is added to the gradient of this rank's own rows


class KeyValues(NamedTuple):
    """K ``[B, rows, Hkv, D]`` and V ``[B, rows, Hkv, Dv]``, views of one flat ``message``."""

    message: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def carve(cls, message: Tensor, k: Tensor, v: Tensor, rows: int) -> KeyValues:
        """Views of ``rows`` rows, shaped otherwise like k and v, in a flat message of the right length."""
        shapes = [(x.shape[0], rows, *x.shape[2:]) for x in (k, v)]
        parts = message.split([math.prod(shape) for shape in shapes])
        return cls(message, *(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))

    @classmethod
    def zeros(cls, k: Tensor, v: Tensor, rows: int, dtype: torch.dtype) -> KeyValues:
        """A message of zeros, to accumulate gradients in."""
        return cls.carve(k.new_zeros(_numel(k, v, rows), dtype=dtype), k, v, rows)

    @classmethod
    def pack(cls, k: Tensor, v: Tensor, rows: Tensor | None) -> KeyValues:
        """A message of the given rows (int64 indices), or of all."""
        count = k.shape[1] if rows is None else len(rows)
        packed = cls.carve(k.new_empty(_numel(k, v, count)), k, v, count)
        for into, x in ((packed.k, k), (packed.v, v)):
            into.copy_(x if rows is None else x.index_select(1, rows))
        return packed


def _numel(k: Tensor, v: Tensor, rows: int) -> int:
    return k.shape[0] * rows * (k.shape[2] * k.shape[3] + v.shape[2] * v.shape[3])


class _Return(NamedTuple):
    """Gradients on their way here in one transfer: of all rows, or of this rank's own in ``rows``."""

    transfer: Transfer
    grads: Sequence[KeyValues]
    rows: Tensor | None

    def add_to(self, into: KeyValues) -> None:
        self.transfer.wait()
        for grad in self.grads:
            if self.rows is None:
                into.message.add_(grad.message)
                continue
            for x, part in ((into.k, grad.k), (into.v, grad.v)):
                x.index_add_(1, self.rows, part.to(x.dtype))


class Exchange(ABC):
    """One pass of all shards: iterate over it, and in a backward :meth:`give_back` every step's gradient."""

    def __init__(
        self, world: World, k: Tensor, v: Tensor, sources: Sequence[int], rows: Sequence[int], grad_wire: torch.dtype
    ) -> None:
        """``sources``: whose shard comes in each step, this rank's own first; ``rows``: how many of its rows."""
        self._world, self._k, self._v, self._grad_wire = world, k, v, grad_wire
        self._sources, self._rows = sources, rows
        self._home: KeyValues | None = None
        self._due: dict[int, list[_Return]] = defaultdict(list)  # gradients on their way here, by step, or _HOME

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """K and V of each step: this rank's own first."""

    def give_back(self, grad: KeyValues) -> None:
        """Send the gradient of the current step's rows on its way; that of the first step's is at home."""
        if self._home is None:
            self._home = grad
        else:
            self._send_home(grad)

    def home(self) -> KeyValues:
        """The gradient of this rank's own rows, once every rank's part of it has come home."""
        assert self._home is not None, "give_back was never called"
        self._add_due(_HOME, self._home)
        return self._home

    @abstractmethod
    def _send_home(self, grad: KeyValues) -> None:
        """Send ``grad``, of the current step's rows, and receive in turn."""

    def _fetch(self, world: World, to: int, message: Tensor, source: int, rows: int) -> tuple[Transfer, KeyValues]:
        """Send a message of rows, and receive one."""
        arriving = self._carve(self._buffer(rows), rows)
        return world.start([(to, message)], [(source, arriving.message)], "kv"), arriving

    def _return(
        self, world: World, to: int, grad: KeyValues, source: int, rows: int, due: int, own: Tensor | None = None
    ) -> None:
        """Send a gradient, and receive one of ``rows`` rows (this rank's ``own``), to be added when it is ``due``."""
        arriving = self._carve(self._buffer(rows, self._grad_wire), rows)
        transfer = world.start([(to, grad.message.to(self._grad_wire))], [(source, arriving.message)], "grad")
        self._due[due].append(_Return(transfer, [arriving], own))

    def _add_due(self, step: int, into: KeyValues) -> None:
        for arriving in self._due.pop(step, ()):
            arriving.add_to(into)

    def _buffer(self, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """A message of ``rows`` rows, to be filled."""
        return self._k.new_empty(_numel(self._k, self._v, rows), dtype=dtype)

    def _carve(self, message: Tensor, rows: int) -> KeyValues:
        return KeyValues.carve(message, self._k, self._v, rows)


class RingExchange(Exchange):
    """Every shard goes from rank to rank, to the next neighbour, whole: around one ring, or around rings inside a ring.

    With rings of ``inside`` consecutive ranks, a shard goes around the ring it is in while the one that the same place
    of the next ring will begin with is already on its way: both links are busy at once (LoongTrain, Gu et al. 2024).
    ``P - 1`` messages per rank each way. Each shard's gradient follows it, growing by every rank's part: around each
    ring, from its end to the same place of the next, and from the last one home.
    """

    def __init__(
        self,
        world: World,
        k: Tensor,
        v: Tensor,
        sources: Sequence[int],
        rows: Sequence[int],
        grad_wire: torch.dtype,
        inside: int,
    ) -> None:
        """``inside``: how many consecutive ranks form a ring; all of them for a single one."""
        super().__init__(world, k, v, sources, rows, grad_wire)
        self._near, self._far = world.split(inside)
        self._step = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """K and V of the ranks of this ring, one before the other from this one on; then of the ring before it, ...."""
        near, far = self._near, self._far
        message, k, v = self._k, self._k, self._v
        if self._world.size > 1:
            message = KeyValues.pack(k, v, None).message
        for ring in range(far.size):
            first = ring * near.size
            crossing = self._pass_on(far, message, first + near.size) if ring + 1 < far.size else None
            for step in range(first, first + near.size):
                self._step = step
                last = step + 1 == first + near.size
                coming = crossing if last else self._pass_on(near, message, step + 1)
                yield k, v
                if coming is not None:
                    transfer, (message, k, v) = coming
                    transfer.wait()

    def _pass_on(self, ring: World, message: Tensor, step: int) -> tuple[Transfer, KeyValues]:
        """Send to the next rank of a ring, and receive what ``step`` computes with."""
        return self._fetch(ring, ring.peer(1), message, ring.peer(-1), self._rows[step])

    def _send_home(self, grad: KeyValues) -> None:
        step, near, far = self._step, self._near, self._far
        self._add_due(step, grad)
        ring, place = divmod(step, near.size)
        if ring == 0 or place + 1 < near.size:
            due = _HOME if place + 1 == near.size else step + 1
            self._return(near, near.peer(1), grad, near.peer(-1), self._due_rows(due), due)
        elif ring + 1 < far.size:
            due = step + near.size
            self._return(far, far.peer(1), grad, far.peer(-1), self._due_rows(due), due)
        else:  # whose shard it is, in the ring after this one, which is the one that it has not been in
            owner = self._sources[step]
            visitor = far.peer(-1) * near.size + near.peer(-1)
            self._return(self._world, owner, grad, visitor, self._due_rows(_HOME), _HOME)

    def _due_rows(self, due: int) -> int:
        return self._k.shape[1] if due == _HOME else self._rows[due]


class DirectExchange(Exchange):
    """Only the rows that some query of the receiver needs travel, straight from their owner, and gradients back."""

    def __init__(
        self,
        world: World,
        k: Tensor,
        v: Tensor,
        sources: Sequence[int],
        rows: Sequence[int],
        grad_wire: torch.dtype,
        send_rows: Sequence[Tensor | None],
    ) -> None:
        """``send_rows[destination]``: this rank's rows that each rank needs (on k's device), None for all of them."""
        super().__init__(world, k, v, sources, rows, grad_wire)
        self._send_rows = send_rows
        self._step = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """K and V of this rank, then of the one before it, ...: of others the rows that are needed here."""
        k, v = self._k, self._v
        for step in range(self._world.size):
            self._step = step
            coming = self._request(step + 1) if step + 1 < self._world.size else None
            yield k, v
            if coming is not None:
                transfer, (_, k, v) = coming
                transfer.wait()

    def _request(self, step: int) -> tuple[Transfer, KeyValues]:
        reader = self._world.peer(step)
        outgoing = KeyValues.pack(self._k, self._v, self._send_rows[reader]).message
        return self._fetch(self._world, reader, outgoing, self._sources[step], self._rows[step])

    def _send_home(self, grad: KeyValues) -> None:
        assert self._home is not None, "this rank's own gradient comes first"
        self._add_due(_HOME, self._home)
        reader = self._world.peer(self._step)
        rows = self._send_rows[reader]
        num_rows = self._k.shape[1] if rows is None else len(rows)
        self._return(self._world, self._sources[self._step], grad, reader, num_rows, _HOME, rows)


class GatherExchange(Exchange):
    """Two steps: this rank's own shard, while those of all others arrive at once, and those as one shard.

    The gathered rows stand in the order of their positions, so that a kernel sees one interval of them.
    """

    def __init__(
        self,
        world: World,
        k: Tensor,
        v: Tensor,
        sources: Sequence[int],
        rows: Sequence[int],
        grad_wire: torch.dtype,
        places: Sequence[Tensor],
    ) -> None:
        """``places[source]``: where the rows of each rank's shard stand among those gathered (on k's device)."""
        super().__init__(world, k, v, sources, rows, grad_wire)
        self._places = places

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """K and V of this rank, then of all others together."""
        if self._world.size == 1:
            yield self._k, self._v
            return
        own = KeyValues.pack(self._k, self._v, None).message
        others = [self._world.peer(-step) for step in range(1, self._world.size)]
        parts = [self._carve(self._buffer(len(self._places[source])), len(self._places[source])) for source in others]
        receives = [(source, part.message) for source, part in zip(others, parts, strict=True)]
        transfer = self._world.start([(peer, own) for peer in others], receives, "kv")
        yield self._k, self._v
        transfer.wait()
        total = self._rows[1]
        gathered = self._carve(self._buffer(total), total)
        for source, part in zip(others, parts, strict=True):
            gathered.k.index_copy_(1, self._places[source], part.k)
            gathered.v.index_copy_(1, self._places[source], part.v)
        yield gathered.k, gathered.v

    def _send_home(self, grad: KeyValues) -> None:
        own, sends, receives, parts = self._k.shape[1], [], [], []
        for step in range(1, self._world.size):
            owner = self._world.peer(-step)
            outgoing = KeyValues.pack(grad.k, grad.v, self._places[owner]).message
            sends.append((owner, outgoing.to(self._grad_wire)))
            parts.append(self._carve(self._buffer(own, self._grad_wire), own))
            receives.append((owner, parts[-1].message))
        self._due[_HOME].append(_Return(self._world.start(sends, receives, "grad"), parts, None))
