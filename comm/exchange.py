"""Exchanges: how the ranks' shards of K and V pass by every rank, and how the gradients get home.

An exchange of ``P`` ranks has ``P`` steps. In step ``t`` rank ``r`` computes with the shard of rank ``r - t``, while
the shard of step ``t + 1`` is on its way. K and V travel as one flat message, heads unexpanded. In a backward, the
gradient of the shard of step ``t`` leaves when the step is done, and travels while step ``t + 1`` is computed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .world import Transfer, World


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
    """A gradient on its way here: of all of this rank's rows, or of those in ``rows``."""

    transfer: Transfer
    grad: KeyValues
    rows: Tensor | None

    def add_to(self, into: KeyValues) -> None:
        self.transfer.wait()
        if self.rows is None:
            into.message.add_(self.grad.message)
            return
        for x, part in ((into.k, self.grad.k), (into.v, self.grad.v)):
            x.index_add_(1, self.rows, part.to(x.dtype))


class Exchange(ABC):
    """One pass of all shards: iterate over it, and in a backward :meth:`give_back` every step's gradient."""

    _relays: bool  # whether a gradient that arrives is added to the one that leaves next, or stays

    def __init__(self, world: World, k: Tensor, v: Tensor, rows: Sequence[int], grad_wire: torch.dtype) -> None:
        """``rows[source]``: how many rows of each rank's shard arrive here. ``grad_wire``: the gradients' dtype."""
        self._world, self._k, self._v, self._rows, self._grad_wire = world, k, v, rows, grad_wire
        self._step = 0
        self._home: KeyValues | None = None
        self._return: _Return | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """K and V of ranks ``r, r - 1, r - 2, ...``: this rank's own first, of others the rows that arrive here."""
        k, v, message = self._k, self._v, None
        for step in range(self._world.size):
            self._step = step
            if step + 1 == self._world.size:
                yield k, v
                return
            to, outgoing, source = self._outgoing(step + 1, message)
            rows = self._rows[self._peer(-step - 1)]
            message = self._k.new_empty(_numel(self._k, self._v, rows))
            transfer = self._world.start([(to, outgoing)], [(source, message)], "kv")
            yield k, v
            transfer.wait()
            _, k, v = KeyValues.carve(message, self._k, self._v, rows)

    def give_back(self, grad: KeyValues) -> None:
        """Send the gradient of the current step's rows on its way; that of the first step's is at home."""
        if self._home is None:
            self._home = grad
            return
        if self._return is not None:
            self._return.add_to(grad if self._relays else self._home)
        self._return = self._start_return(grad)

    def home(self) -> KeyValues:
        """The gradient of this rank's own rows, once every rank's part of it has come home."""
        assert self._home is not None, "give_back was never called"
        if self._return is not None:
            self._return.add_to(self._home)
        return self._home

    @abstractmethod
    def _outgoing(self, step: int, previous: Tensor | None) -> tuple[int, Tensor, int]:
        """To whom what is sent while ``step`` is fetched, and from whom; ``previous`` is the message that came last."""

    @abstractmethod
    def _start_return(self, grad: KeyValues) -> _Return:
        """Send ``grad``, of the current step's rows, and receive in turn."""

    def _swap_gradients(self, to: int, grad: KeyValues, source: int, num_rows: int, rows: Tensor | None) -> _Return:
        message = self._k.new_empty(_numel(self._k, self._v, num_rows), dtype=self._grad_wire)
        outgoing = grad.message.to(self._grad_wire)
        transfer = self._world.start([(to, outgoing)], [(source, message)], "grad")
        return _Return(transfer, KeyValues.carve(message, self._k, self._v, num_rows), rows)

    def _peer(self, distance: int) -> int:
        return (self._world.rank + distance) % self._world.size


class RingExchange(Exchange):
    """Every shard goes from rank to rank, to the next neighbour, whole.

    ``P - 1`` messages per rank each way: K and V pass on as they came, and each shard's gradient follows one step
    behind, growing by every rank's part, until it is home.
    """

    _relays = True

    def _outgoing(self, step: int, previous: Tensor | None) -> tuple[int, Tensor, int]:
        message = KeyValues.pack(self._k, self._v, None).message if previous is None else previous
        return self._peer(1), message, self._peer(-1)

    def _start_return(self, grad: KeyValues) -> _Return:
        following = self._rows[self._peer(-self._step - 1)]
        return self._swap_gradients(self._peer(1), grad, self._peer(-1), following, None)


class DirectExchange(Exchange):
    """Only the rows that some query of the receiver needs travel, straight from their owner, and gradients back."""

    _relays = False

    def __init__(
        self,
        world: World,
        k: Tensor,
        v: Tensor,
        rows: Sequence[int],
        grad_wire: torch.dtype,
        send_rows: Sequence[Tensor | None],
    ) -> None:
        """``send_rows[destination]``: this rank's rows that each rank needs (on k's device), None for all of them."""
        super().__init__(world, k, v, rows, grad_wire)
        self._send_rows = send_rows

    def _outgoing(self, step: int, previous: Tensor | None) -> tuple[int, Tensor, int]:
        reader = self._peer(step)
        return reader, KeyValues.pack(self._k, self._v, self._send_rows[reader]).message, self._peer(-step)

    def _start_return(self, grad: KeyValues) -> _Return:
        reader = self._peer(self._step)
        rows = self._send_rows[reader]
        num_rows = self._k.shape[1] if rows is None else len(rows)
        return self._swap_gradients(self._peer(-self._step), grad, reader, num_rows, rows)
