"""Which of the rows that a rank holds, or that arrived, a kernel call reads as its keys, and where gradients go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Selection(ABC):
    """Takes keys ``[B, R, n, D]`` of ``n`` KV heads out of ``x [B, rows, h, D]``, of all heads in a row or one."""

    @abstractmethod
    def take(self, x: Tensor) -> Tensor:
        """The keys, or values: a view where they stand together."""

    def room(self, into: Tensor) -> Tensor:
        """Where the gradients of what was taken are added: in place, unless they have to be put back."""
        return self.take(into)

    def put_back(self, grads: Tensor, into: Tensor) -> None:  # noqa: B027 - most have nothing to put back
        """Add gradients from a :meth:`room` of their own."""


@dataclass(frozen=True)
class Whole(Selection):
    """All rows, of the heads ``heads`` (None: all) among ``kv_heads`` in a row (None: as they are)."""

    heads: range | None = None
    kv_heads: int | None = None

    def take(self, x: Tensor) -> Tensor:
        """A view."""
        if self.heads is None:
            return x
        assert self.kv_heads is not None, "heads are counted among all"
        if x.shape[2] != self.kv_heads:  # rows of one head each, token by token
            x = x.view(x.shape[0], -1, self.kv_heads, x.shape[3])
        return x[:, :, self.heads.start : self.heads.stop]


@dataclass(frozen=True)
class Consecutive(Selection):
    """Rows of one head each that stand together: ``rows`` of each of ``heads`` heads, one head after another.

    Of every head's rows those that are ``used``.
    """

    first: int
    heads: int
    rows: int
    used: tuple[int, int] | None = None

    def take(self, x: Tensor) -> Tensor:
        """A view."""
        span = x[:, self.first : self.first + self.heads * self.rows]
        first, last = self.used or (0, self.rows)
        return span.view(x.shape[0], self.heads, self.rows, x.shape[3])[:, :, first:last].transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Picked(Selection):
    """The rows ``index [1|B, n, R]``, counted over rows and heads together; padded with any where heads have fewer.

    No interval reaches the padding, so its gradients are zero.
    """

    index: Tensor
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def take(self, x: Tensor) -> Tensor:
        """A copy, packed."""
        index, flat = self._index(x), x.flatten(1, 2)
        if len(index) == 1:
            packed = flat.index_select(1, index[0])
        else:
            packed = flat.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[3]))
        return packed.unflatten(1, self.index.shape[1:]).transpose(1, 2)

    def room(self, into: Tensor) -> Tensor:
        """Zeros."""
        _, heads, rows = self.index.shape
        return into.new_zeros(into.shape[0], heads, rows, into.shape[3]).transpose(1, 2)

    def put_back(self, grads: Tensor, into: Tensor) -> None:
        """Add gradients ``[B, R, n, D]`` to the dense ``into``."""
        index, flat = self._index(into), into.view(into.shape[0], -1, into.shape[3])
        packed = grads.transpose(1, 2).flatten(1, 2)
        if len(index) == 1:
            flat.index_add_(1, index[0], packed)
        else:
            flat.scatter_add_(1, index.unsqueeze(-1).expand(-1, -1, into.shape[3]), packed)

    def _index(self, x: Tensor) -> Tensor:
        if x.device not in self._on_device:
            self._on_device[x.device] = self.index.flatten(1).to(x.device)
        return self._on_device[x.device]
