"""The one contract that every kernel fulfils: partial attention over key intervals.

Shapes in this package: q, out, dout ``[B, Tq, H, D]``; k, v ``[B, Tk, Hkv, D]``; lse ``[B, H, Tq]``. Query head ``h``
reads KV head ``h // (H // Hkv)``. Accumulators are fp32, or fp64 where the inputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .pieces import Piece, cut_into_pieces, cut_jointly, plain_piece


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partials, lse and gradients of ``dtype`` inputs are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Intervals:
    """The keys that each query sees: ``start[i] <= j < end[i]``, indices into the block's own keys.

    ``start`` and ``end`` are int32 ``[B|1, G, Tq]``, non-decreasing along Tq, and equal where a query sees nothing. G
    divides the query heads: neighbours share (1: all of them; the KV heads: each with those that read it).
    One instance serves every layer, so what kernels derive from it (pieces, copies on a device, the queries of key
    tiles) is kept on it. Plans make it on the CPU; a kernel that computes elsewhere takes its copy there.
    """

    start: Tensor
    end: Tensor
    _on_device: dict[torch.device, Intervals] = field(default_factory=dict, repr=False)
    _queries_of_tiles: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)
    _repeated: dict[tuple[int, ...], Intervals] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Dense: kernels read them by their shape."""
        object.__setattr__(self, "start", self.start.contiguous())
        object.__setattr__(self, "end", self.end.contiguous())

    def to(self, device: torch.device) -> Intervals:
        """The same intervals on ``device``; moved once."""
        if device == self.start.device:
            return self
        if device not in self._on_device:
            self._on_device[device] = Intervals(self.start.to(device), self.end.to(device))
        return self._on_device[device]

    def repeated(self, counts: tuple[int, ...]) -> Intervals:
        """Those of each of the G neighbours so often; themselves where there is one for all, or each once."""
        if self.start.shape[1] == 1 or max(counts) == 1:
            return self
        if counts not in self._repeated:
            times = torch.tensor(counts, device=self.start.device)
            start, end = (x.repeat_interleave(times, 1) for x in (self.start, self.end))
            self._repeated[counts] = Intervals(start, end)
        return self._repeated[counts]

    def of_heads(self, heads: int) -> Intervals:
        """One for each of ``heads`` query heads; itself where there is one for all."""
        groups = self.start.shape[1]
        return self.repeated((heads // groups,) * groups)

    @cached_property
    def pieces(self) -> list[list[list[Piece]]]:
        """``pieces[b][h]`` lists the dense rectangles, triangles and ragged tiles that make up the intervals.

        Where heads differ little ``pieces[b]`` has one list, for all of them.
        """
        found = []
        for start, end in zip(self.start.cpu(), self.end.cpu(), strict=True):
            each = [cut_into_pieces(s, e) for s, e in zip(start, end, strict=True)]
            joint = cut_jointly(start, end, each) if len(each) > 1 else None
            found.append(each if joint is None else [joint])
        return found

    @cached_property
    def plain(self) -> Piece | None:
        """The one rectangle or triangle that makes up the intervals of all batch rows and heads, or None."""
        return plain_piece(self.start[0, 0].cpu(), self.end[0, 0].cpu()) if self.start.shape[:2] == (1, 1) else None

    def queries_of_tiles(self, tile: int, keys: int) -> Tensor:
        """Which queries meet each tile of ``tile`` keys: int32 ``[B|1, G, ceil(keys / tile), 4]``, on its device.

        Queries ``first .. last - 1`` see some key of the tile, ``whole_first .. whole_last - 1`` see all of them.
        Found by bisection, where the intervals are: nothing is read back.
        """
        if (tile, keys) not in self._queries_of_tiles:
            low = torch.arange(0, keys, tile, dtype=torch.int32, device=self.start.device)
            low = low.expand(*self.start.shape[:2], -1).contiguous()
            start, end = self.start, self.end
            first = torch.searchsorted(end, low, right=True, out_int32=True)  # the first with end > low
            last = torch.searchsorted(start, low + tile, out_int32=True)  # the first with start >= low + tile
            whole_first = torch.searchsorted(end, low + tile, out_int32=True)
            whole_last = torch.searchsorted(start, low, right=True, out_int32=True)
            self._queries_of_tiles[tile, keys] = torch.stack([first, last, whole_first, whole_last], -1)
        return self._queries_of_tiles[tile, keys]


@dataclass
class Partial:
    """Attention over part of the keys: normalised ``out [B, Tq, H, Dv]`` and ``lse [B, H, Tq]``, in accumulator dtype.

    Partials over disjoint keys merge; ``out = 0, lse = -inf`` is the identity. A final one's out may be in q's dtype.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, q: Tensor, value_dim: int) -> Partial:
        """The identity of merging, for queries ``q`` and values of ``value_dim``."""
        batch, tokens, heads, _ = q.shape
        dtype = accumulator_dtype(q.dtype)
        return cls(
            q.new_zeros(batch, tokens, heads, value_dim, dtype=dtype),
            q.new_full((batch, heads, tokens), -torch.inf, dtype=dtype),
        )


def merge_(into: Partial, out: Tensor, lse: Tensor) -> None:
    """Merge the partial ``(out, lse)`` into ``into``, in place.

    Its weight is ``exp(lse) / (exp(lse) + exp(into.lse))``, as a sigmoid: no exponential overflows, the rounding of
    large sums of exponentials does not enter, and a side that saw no key has weight 0.
    """
    weight = torch.sigmoid(lse - into.lse).masked_fill_(lse == -torch.inf, 0.0)  # both empty: -inf - -inf
    into.out.lerp_(out.to(into.out.dtype), weight.transpose(1, 2).unsqueeze(-1))
    into.lse.copy_(torch.logaddexp(into.lse, lse))


@dataclass(eq=False)
class OutputGradient:
    """What a backward needs to know of the finished output: it, its global lse, and their gradients.

    ``out, dout [B, Tq, H, Dv]``; ``lse [B, H, Tq]`` over *all* keys; ``dlse`` likewise, None where lse has no gradient.
    """

    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None
    _delta: Tensor | None = None

    def delta(self, compute: Callable[[OutputGradient], Tensor] | None = None) -> Tensor:
        """``rowsum(out * dout) - dlse``, ``[B, H, Tq]``: the softmax backward's correction, once for all blocks.

        ``compute`` is a backend's own way to get it.
        """
        if self._delta is None:
            self._delta = (compute or _row_sums)(self)
        return self._delta


def _row_sums(grad: OutputGradient) -> Tensor:
    delta = (grad.out.to(grad.lse.dtype) * grad.dout).sum(-1).transpose(1, 2)
    return delta if grad.dlse is None else delta - grad.dlse


class Kernel(Protocol):
    """A backend of local attention."""

    name: str

    def check(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Intervals]) -> None:
        """Raise ValueError, naming what is supported, for inputs or blocks that this backend cannot take."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        intervals: Intervals,
        scale: float,
        carry: Partial | None,
        final: bool = False,
    ) -> Partial:
        """Attention of q over the keys in ``intervals``, continued from ``carry``, which may be overwritten.

        ``final``: nothing will be merged into the result, whose out may then be in q's dtype.
        """

    def backward(
        self,
        grad: OutputGradient,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        intervals: Intervals,
        scale: float,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Add this block's gradients to dq, dk, dv (accumulator dtype); exact for any block alone: lse is global."""
