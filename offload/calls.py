"""Attention over what workers hold: queries out, then the new keys and values, then outputs back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar.kernels import Kernel, Partial, accumulator_dtype, merge_
from seqpar.shards import Shard
from seqpar.stores import Appended

from .dialect import STREAMS, WANTS_LSE, bits_of
from .errors import WorkerLost
from .frames import Kind
from .parts import Part
from .workers import Member


class Call:
    """Attention of some new tokens in one layer, over all parts of all sequences."""

    def __init__(
        self, dtype: torch.dtype, members: Sequence[tuple[Member, Sequence[Part]]], here: Sequence[Part], layer: int,
        appended: tuple[Appended, ...], tokens: int, *, wants_lse: bool,
    ) -> None:  # fmt: skip
        """``members``: with the parts that each has; ``here``: those of this rank. ``wants_lse``: of each output."""
        self.dtype, self.members, self.here, self.layer = dtype, members, here, layer
        self.appended, self.tokens, self.wants_lse = appended, tokens, wants_lse
        counts = tuple(row.new for row in appended)
        self._uniform = all(count == tokens for count in counts)

    def run(
        self, q: Tensor | None, k: Tensor, v: Tensor, scale: float, kernel: Kernel, into: Partial | None
    ) -> None:  # fmt: skip
        """q ``[B, T, H, D]``, k and v ``[B, T, Hkv, D]``; what queries find is merged into ``into``."""
        for member, _ in self.members:
            member.drain()  # of a call that failed half-way, of another cache perhaps
        self._began = time.monotonic()
        # Who has queries must get keys too, or would wait for them: a loss is told when all have all.
        losses: list[WorkerLost] = []
        if q is not None:
            flags = WANTS_LSE if self.wants_lse else 0
            for member, parts in self.members:
                pieces = [q[part.row, :, part.queries] for part in parts]
                fields = {"replies": True, "flags": flags, "argument": bits_of(scale)}
                self._try_send(losses, member, parts, Kind.ATTEND, pieces, **fields)
        flags = STREAMS if q is None else 0
        for member, parts in self.members:
            pieces = [self._kept(part, x) for x in (k, v) for part in parts]
            self._try_send(losses, member, parts, Kind.APPEND, pieces, flags=flags)
        if losses:
            raise losses[0]
        for part in self.here:
            if part.here is not None:
                self._attend_here(part, part.here, q, k, v, scale, kernel, into)
        if into is not None:
            for member, parts in self.members:
                self._receive(member, parts, v.shape[3], into)

    def _try_send(self, losses: list[WorkerLost], *args: Any, **fields: Any) -> None:
        try:
            self._send(*args, **fields)
        except WorkerLost as loss:
            losses.append(loss)

    def _send(
        self, member: Member, parts: Sequence[Part], kind: Kind, pieces: Sequence[Tensor], **fields: Any
    ) -> None:  # fmt: skip
        counts = None if self._uniform else tuple(self.appended[part.row].new for part in parts)
        roster = member.roster(tuple(part.shard for part in parts), counts)
        member.send(
            kind, *pieces, layer=self.layer, tokens=self.tokens, roster=roster, dtype=self.dtype,
            deadline=self._left(member), **fields,
        )  # fmt: skip

    def _left(self, member: Member) -> float:
        """Seconds of this call's deadline, which all its members share."""
        return max(0.05, member.channel.deadline - (time.monotonic() - self._began))

    def _kept(self, part: Part, x: Tensor) -> Tensor:
        """The new tokens' rows ``[N, D]`` that are kept in a part, of one head each."""
        appended = self.appended[part.row]
        heads = slice(part.cut.heads.start, part.cut.heads.stop)
        rows = x[part.row, self.tokens - appended.new :, heads].reshape(-1, x.shape[3])
        kept = part.rooms.kept(appended)
        return rows if len(kept) == len(rows) else rows.index_select(0, kept.to(x.device))

    def _attend_here(
        self, part: Part, shard: Shard, q: Tensor | None, k: Tensor, v: Tensor, scale: float, kernel: Kernel,
        into: Partial | None,
    ) -> None:  # fmt: skip
        row, heads = slice(part.row, part.row + 1), slice(part.cut.heads.start, part.cut.heads.stop)
        step = part.rooms.step((self.appended[part.row],), self.tokens)
        queries = None if q is None else q[row, :, part.queries]
        mine = (x[row, :, heads] for x in (k, v))
        found = shard.take(self.layer, step, queries, *mine, scale=scale, kernel=kernel, sinks=None)
        if found is not None and into is not None:
            merge_(_view(into, part), found.out, found.lse)

    def _receive(self, member: Member, parts: Sequence[Part], value_dim: int, into: Partial) -> None:
        heads, dtype = [part.queries.stop - part.queries.start for part in parts], self.dtype
        shapes: list[tuple[int, ...]] = [(self.tokens, n, value_dim) for n in heads]
        accumulator = accumulator_dtype(dtype)
        if self.wants_lse:
            shapes += [(n, self.tokens * accumulator.itemsize // dtype.itemsize) for n in heads]
        found = [x.to(into.out.device) for x in member.answer(Kind.RESULT, dtype, shapes, self._left(member))]
        for number, part in enumerate(parts):
            view = _view(into, part)
            if self.wants_lse:
                lse = found[len(parts) + number].clone().view(accumulator)  # a copy, where accumulators may stand
                merge_(view, found[number].unsqueeze(0), lse.unsqueeze(0))
            else:
                view.out.copy_(found[number])


def _view(into: Partial, part: Part) -> Partial:
    row = slice(part.row, part.row + 1)
    return Partial(into.out[row, :, part.queries], into.lse[row, part.queries])
