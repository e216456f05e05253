"""Attention over key intervals by flash attention that knows only "full" and "causal", called on pieces of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from .contract import Intervals, OutputGradient, Partial, merge_
from .pieces import Piece

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


class Shape(NamedTuple):
    """The tensors of a call, as far as it decides who can take them."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Shape:
        """From q ``[B, Tq, H, D]``, k ``[B, Tk, Hkv, D]`` and v ``[B, Tk, Hkv, Dv]``."""
        return cls(q.device, q.dtype, q.shape[0], q.shape[2], k.shape[2], q.shape[3], v.shape[3])


class FlashLibrary(Protocol):
    """Somebody's flash attention: q, out, dout ``[B, Tq, H, D]``, k, v ``[B, Tk, Hkv, D]``, lse ``[B, H, Tq]``.

    It gets what :meth:`prepared` returned, padded to :meth:`head_dims`, and a positive scale.
    """

    def refusal(self, shape: Shape, kinds: Sequence[Piece]) -> str:
        """``got, expected`` for what it cannot take, and nothing otherwise; of each kind of piece the smallest."""

    def repeats(self, direction: Direction) -> bool:
        """Whether the same inputs give bitwise the same results, as PyTorch's settings are now."""

    def head_dims(self, shape: Shape) -> tuple[int, int]:
        """The head dims of q and v to which inputs of this shape are padded."""

    def prepared(self, x: Tensor) -> Tensor:
        """``x`` in the dtype and strides that it computes with."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """out and lse. ``mask [Tq, Tk]``, or ``[1, H, Tq, Tk]``, is added to the scaled scores."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv, where out and lse are of all keys, of which k holds some."""


class FlashKernel:
    """Dense pieces of a block by the first of some libraries that takes them all; see the kernel contract."""

    def __init__(self, name: str, *libraries: FlashLibrary) -> None:
        self.name, self._libraries = name, libraries

    def check(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Intervals]) -> None:
        """Raise ValueError, with the reasons, for tensors or blocks that none of the libraries takes."""
        some: Sequence[Intervals | None] = blocks or [None]
        for intervals in some:
            self._library(Shape.of(q, k, v), intervals)

    def refusal(self, shape: Shape, intervals: Intervals | None) -> str:
        """Why no library takes a block, as ``got, expected``; nothing where one does."""
        kinds = [] if intervals is None else _smallest_of_each_kind(intervals)
        refusals = [library.refusal(shape, kinds) for library in self._libraries]
        return "; ".join(dict.fromkeys(refusals)) if all(refusals) else ""

    def repeats(self, direction: Direction) -> bool:
        """Whether the same inputs give bitwise the same results, as PyTorch's settings are now."""
        return all(library.repeats(direction) for library in self._libraries)

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
        """See :class:`~seqpar.kernels.contract.Kernel`."""
        shape, partial, whole, value_dim = Shape.of(q, k, v), carry, q, v.shape[-1]
        library = self._library(shape, intervals)
        padded, padded_value = library.head_dims(shape)
        q, scale, _ = _positive_scale(q, scale)
        q, k, v = (library.prepared(_pad_to(dim, x)) for dim, x in ((padded, q), (padded, k), (padded_value, v)))
        calls = list(_calls(intervals, shape))
        for call in calls:
            batch, heads, kv_heads, piece = call[:4]
            mask = _additive_mask(intervals, call, shape.heads, q.dtype)
            key, value = (x[batch, piece.keys, kv_heads] for x in (k, v))
            out, lse = library.forward(q[batch, piece.rows, heads], key, value, piece.kind == "causal", scale, mask)
            if mask is not None:  # PyTorch reports an lse of 0 for rows without keys
                lse = lse.masked_fill(_empty_rows(intervals, call, shape.heads), -torch.inf)
            out = out[..., :value_dim]
            if partial is None:
                if out.shape[:3] == whole.shape[:3]:
                    dtype = whole.dtype if final and len(calls) == 1 else lse.dtype
                    partial = Partial(out.to(dtype).contiguous(), lse.contiguous())
                    continue
                partial = Partial.empty(whole, value_dim)
            into = Partial(partial.out[batch, piece.rows, heads], partial.lse[batch, heads, piece.rows])
            if carry is None and piece.first:
                into.out.copy_(out)
                into.lse.copy_(lse)
            else:
                merge_(into, out, lse)
        return Partial.empty(whole, value_dim) if partial is None else partial

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
        """See :class:`~seqpar.kernels.contract.Kernel`.

        No library knows dlse, whose part of dS is ``P * dlse``: what attention to values ``(1, 0, ...)`` with ``dout =
        (dlse, 0, ...)`` and ``out = 0`` gives. So it takes a second call, whose dV is the gradient of nothing.
        """
        shape, head_dim, value_dim = Shape.of(q, k, v), q.shape[-1], v.shape[-1]
        library = self._library(shape, intervals)
        padded, padded_value = library.head_dims(shape)
        q, scale, sign = _positive_scale(q, scale)
        q, k = (library.prepared(_pad_to(padded, x)) for x in (q, k))
        v, out, dout = (library.prepared(_pad_to(padded_value, x)) for x in (v, grad.out, grad.dout))
        lse = grad.lse.masked_fill(grad.lse == -torch.inf, 0.0)  # an empty row's scores are all -inf: exp gives 0
        terms = [(v, out, dout)]
        if grad.dlse is not None:
            ones, nothing, column = (torch.zeros_like(x) for x in terms[0])
            ones[..., 0] = 1.0
            column[..., 0] = grad.dlse.transpose(1, 2)
            terms.append((ones, nothing, column))
        for call in _calls(intervals, shape):
            batch, heads, kv_heads, piece = call[:4]
            mask = _additive_mask(intervals, call, shape.heads, q.dtype)
            rows, keys = (batch, piece.rows, heads), (batch, piece.keys, kv_heads)
            for values, outs, douts in terms:
                gq, gk, gv = library.backward(
                    douts[rows], q[rows], k[keys], values[keys], outs[rows], lse[batch, heads, piece.rows],
                    piece.kind == "causal", scale, mask,
                )  # fmt: skip
                dq[rows].add_(gq[..., :head_dim], alpha=sign)
                dk[keys] += gk[..., :head_dim]
                if values is v:
                    dv[keys] += gv[..., :value_dim]

    def _library(self, shape: Shape, intervals: Intervals | None) -> FlashLibrary:
        kinds = [] if intervals is None else _smallest_of_each_kind(intervals)
        for library in self._libraries:
            if not library.refusal(shape, kinds):
                return library
        raise ValueError(f"kernel={self.name!r}: got {self.refusal(shape, intervals)}; use kernel='auto'")


class _Call(NamedTuple):
    """A piece of ``pieces[b][h]``, and the batch rows, query heads and KV heads that it holds for."""

    batch: slice
    heads: slice
    kv_heads: slice
    piece: Piece
    b: int
    h: int


def _calls(intervals: Intervals, shape: Shape) -> Iterator[_Call]:
    everything, group = slice(None), shape.heads // shape.kv_heads
    together = shape.heads // intervals.start.shape[1]
    for b, row in enumerate(intervals.pieces):
        batch = everything if len(intervals.pieces) == 1 else slice(b, b + 1)
        for h, pieces in enumerate(row):
            first, last = h * together, (h + 1) * together
            heads = everything if len(row) == 1 else slice(first, last)
            kv_heads = everything if len(row) == 1 else slice(first // group, -(-last // group))
            yield from (_Call(batch, heads, kv_heads, piece, b, h) for piece in pieces)


def _smallest_of_each_kind(intervals: Intervals) -> list[Piece]:
    """Of full, causal and masked pieces each the one with the fewest keys."""
    smallest: dict[str, Piece] = {}
    for row in intervals.pieces:
        for pieces in row:
            for piece in pieces:
                known = smallest.setdefault(piece.kind, piece)
                if piece.keys.stop - piece.keys.start < known.keys.stop - known.keys.start:
                    smallest[piece.kind] = piece
    return list(smallest.values())


def _positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """``sign * q`` and a positive scale, and sign, with the same scores: the maximum is taken before scaling."""
    if scale > 0:
        return q, scale, 1.0
    sign = -1.0 if scale < 0 else 0.0
    return q * sign, -scale or 1.0, sign


def _pad_to(dim: int, x: Tensor) -> Tensor:
    return x if x.shape[-1] == dim else pad(x, (0, dim - x.shape[-1]))


def _additive_mask(intervals: Intervals, call: _Call, heads: int, dtype: torch.dtype) -> Tensor | None:
    """0 for the pairs of a masked piece that are in the intervals, ``-inf`` for the others.

    ``[rows, keys]``, or ``[1, H, rows, keys]`` where heads differ.
    """
    piece = call.piece
    if piece.kind != "masked":
        return None
    bounds = (x - piece.keys.start for x in _bounds(intervals, call))
    start, end = (bound.numpy().tobytes() for bound in bounds)
    mask = _mask_of(start, end, piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start, dtype)
    return mask[0] if len(mask) == 1 else mask.repeat_interleave(heads // len(mask), 0).unsqueeze(0)


def _empty_rows(intervals: Intervals, call: _Call, heads: int) -> Tensor:
    """The rows of a masked piece that see none of its keys, ``[H|1, rows]``."""
    piece = call.piece
    start, end = (x.repeat_interleave(heads // len(x), 0) if len(x) > 1 else x for x in _bounds(intervals, call))
    return end.clamp(max=piece.keys.stop) <= start.clamp(min=piece.keys.start)


def _bounds(intervals: Intervals, call: _Call) -> tuple[Tensor, Tensor]:
    """The intervals ``[G, rows]`` of a call's rows: of its heads, or of all where their pieces were cut jointly."""
    together = len(intervals.pieces[call.b]) == 1
    heads = slice(None) if together else slice(call.h, call.h + 1)
    start, end = (x[call.b, heads, call.piece.rows] for x in (intervals.start, intervals.end))
    return start, end


@lru_cache(maxsize=8)
def _mask_of(start: bytes, end: bytes, rows: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    """``[G, rows, keys]``. The tiles along a window have all the same mask, which takes longer to build than to use."""
    low, high = (torch.frombuffer(bytearray(x), dtype=torch.int32).view(-1, rows, 1) for x in (start, end))
    key = torch.arange(num_keys, dtype=torch.int32)
    hidden = (key < low) | (key >= high)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
