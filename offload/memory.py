"""Keys and values of growing texts on attention workers: where a cache's memory is when it is not here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from seqpar.kernels import AUTO, Kernel, Partial, accumulator_dtype
from seqpar.shards import Step

from .calls import Call
from .dialect import DTYPES, cut
from .errors import NoRoomThere, WorkerLost
from .frames import Kind
from .mask_text import to_text
from .parts import Part, Shape
from .placement import LOCAL, Held, Placement, assign
from .workers import Member, Workers

_TRIES = 8
_WORK = 1 << 37
"""Multiplications to a call, at most: seconds of one core, well within a deadline."""


class RemoteMemory:
    """A :class:`seqpar.shards.Memory` whose parts are on workers, and some perhaps here."""

    def __init__(self, shape: Shape, workers: Workers, placement: Placement) -> None:
        self.shape, self.workers = shape, workers
        cuts = placement.cuts(shape.heads[1], len(workers.alive))
        rooms = {each: shape.rooms(each) for each in cuts}
        group = shape.heads[0] // shape.heads[1]
        self.parts = [
            Part(row, each, rooms[each], slice(each.heads.start * group, each.heads.stop * group), LOCAL)
            for row in range(shape.batch)
            for each in cuts
        ]
        self._is_partial, self._is_torn = placement.segments > 1, False
        self._is_released = False
        self._by_member: list[tuple[Member, list[Part]]] | None = None
        stay = [part for part in self.parts if cuts.index(part.cut) < placement.local]
        for part in stay:
            part.here = self.shape.shard(part.rooms)
        self.place([part for part in self.parts if part not in stay])
        self._check_frames()

    @property
    def nbytes(self) -> int:
        """What this rank holds itself."""
        return sum(part.here.nbytes for part in self.parts if part.here is not None)

    def place(self, parts: Sequence[Part]) -> None:
        """Find workers for these parts, and open them there, empty: where memory is free, all of them or none.

        Again where another rank was faster. Raises NoRoom, and :class:`WorkerLost`.
        """
        for _ in range(_TRIES):
            with suppress(NoRoomThere):
                self._open(self._found(parts), length=0)
                return
        self._open(self._found(parts), length=0)

    def _found(self, parts: Sequence[Part]) -> list[tuple[Part, int]]:
        free, found = self.workers.free(), list[tuple[Part, int]]()
        for row in dict.fromkeys(part.row for part in parts):
            mine = [part for part in parts if part.row == row]
            others = [part.holder for part in self.parts if part.row == row and part not in mine]
            taken = {number: others.count(number) for number in free}
            for part, number in zip(mine, assign([self.size(p) for p in mine], free, taken), strict=True):
                free[number] -= self.size(part)
                found.append((part, number))
        return found

    def _open(self, found: Sequence[tuple[Part, int]], length: int) -> None:
        opened = list[tuple[Member, list[int]]]()
        try:
            for number in dict.fromkeys(number for _, number in found):
                member, mine = self.workers.alive[number], [part for part, n in found if n == number]
                ids = range(member.next_shard, member.next_shard + len(mine))
                member.next_shard = ids.stop
                member.ask(Kind.OPEN, text=self._told(mine, ids, length))
                opened.append((member, list(ids)))
        except Exception:
            for member, numbers in opened:
                self._free(member, numbers)
            raise
        for member, numbers in opened:
            for part, shard in zip([part for part, n in found if n == member.number], numbers, strict=True):
                part.holder, part.shard, part.here = member.number, shard, None
                member.held.setdefault(self, set()).add(part.row)
        self._by_member = None

    def _told(self, parts: Sequence[Part], ids: Iterable[int], length: int) -> dict[str, Any]:
        shape = self.shape
        return {
            "mask": to_text(shape.mask),
            "heads": shape.heads,
            "head_dim": shape.head_dim,
            "dtype": DTYPES[shape.dtype],
            "capacity": shape.capacity,
            "chunk": shape.chunk,
            "page": parts[0].rooms.page,
            "layers": shape.layers,
            "length": length,
            "shards": [
                [shard, part.cut.heads.start, part.cut.heads.stop, part.cut.segment, part.cut.segments]
                for part, shard in zip(parts, ids, strict=True)
            ],
        }

    def take(
        self, layer: int, step: Step, q: Tensor | None, k: Tensor, v: Tensor, *, scale: float, kernel: Kernel,
        sinks: Tensor | None,
    ) -> Partial | None:  # fmt: skip
        """See :meth:`seqpar.shards.Memory.take`.

        Queries leave first: workers attend to older keys while the new ones are on their way.
        """
        self.check_whole()
        if kernel is not AUTO:
            raise ValueError(f"kernel: got {kernel.name!r}, expected 'auto': workers choose theirs; leave it out")
        members, here, found = self.by_member(), [part for part in self.parts if part.here is not None], None
        if q is not None:
            found = Partial.empty(q, v.shape[3])
            if sinks is not None:
                found.lse.copy_(sinks.view(1, -1, 1).expand_as(found.lse))
        self._is_torn = True
        longest = max(row.length for row in step.appended)
        for new, appended in cut(step.appended, step.tokens, self._most(q is not None, longest)):
            queries = None if q is None else q[:, new]
            into = None if found is None else Partial(found.out[:, new], found.lse[:, :, new])
            call = Call(
                self.shape.dtype, members, here, layer, appended, new.stop - new.start,
                wants_lse=self._is_partial or sinks is not None,
            )  # fmt: skip
            call.run(queries, k[:, new], v[:, new], scale, kernel, into)
        self._is_torn = False
        return found

    def truncate(self, lengths: Sequence[int | None]) -> None:
        """See :meth:`seqpar.shards.Memory.truncate`. What is left of a call that failed half-way is gone then.

        Lost workers are passed over: the next call tells of them.
        """
        for member, parts in self.by_member():
            chosen = [part for part in parts if lengths[part.row] is not None]
            if chosen and member.lost is None:
                with suppress(WorkerLost):
                    member.ask(
                        Kind.TRUNCATE,
                        text={"shards": [p.shard for p in chosen], "lengths": [lengths[p.row] for p in chosen]},
                    )
        self._is_torn &= None in lengths

    def reorder(self, rows: Sequence[int], sources: Sequence[int]) -> None:
        """Refused: what is on workers stays with its sequence."""
        if rows:
            raise ValueError(
                f"offloaded cache: got rows {list(rows)} that are to continue those of {list(sources)}, expected each "
                "to continue its own text, as in greedy search and sampling; use one beam"
            )

    def by_member(self) -> list[tuple[Member, list[Part]]]:
        """The workers that hold something, each with its parts in the order of rosters."""
        if self._by_member is None:
            self._by_member = self._grouped()
        return self._by_member

    def _grouped(self) -> list[tuple[Member, list[Part]]]:
        found: dict[int, list[Part]] = {}
        for part in self.parts:
            if part.holder != LOCAL:
                found.setdefault(part.holder, []).append(part)
        return [(self.workers.members[number], parts) for number, parts in found.items()]

    def ledger(self, lengths: Sequence[int]) -> list[Held]:
        """Who holds what, of texts that are so long."""
        shape, found = self.shape, list[Held]()
        for part in self.parts:
            name = "here" if part.holder == LOCAL else f"worker {self.workers.members[part.holder].name}"
            length, cut = lengths[part.row], part.cut
            tokens = len(part.rooms.used(length)) // max(1, len(cut.heads))
            size = shape.bytes_of(part.rooms)
            found.append(Held(part.row, shape.layers, cut.heads, cut.segment, cut.segments, name, tokens, size))
        return found

    def move(self, part: Part, to: int, length: int) -> None:
        """Give a part of a text of so many tokens to another holder: it is there in full, or where it was."""
        self.check_whole()
        before = Part(**vars(part))
        moved = Part(**vars(part))
        if to == LOCAL:
            moved.holder, moved.shard, moved.here = LOCAL, -1, self.shape.shard(part.rooms)
        else:
            self._open([(moved, to)], length)
        try:
            self._copy(before, moved, length)
        except Exception:
            if to != LOCAL:
                self._free(self.workers.members[to], [moved.shard])
            self._count_holds()
            raise
        part.holder, part.shard, part.here = moved.holder, moved.shard, moved.here
        if before.holder != LOCAL:
            self._free(self.workers.members[before.holder], [before.shard])
        self._count_holds()

    @staticmethod
    def _free(member: Member, shards: list[int]) -> None:
        """Have a worker free shards, unless it is lost, or has left as it should: they are free then."""
        if member.lost is None:
            with suppress(WorkerLost):
                member.ask(Kind.FREE, text={"shards": shards})

    def _copy(self, before: Part, moved: Part, length: int) -> None:
        rows = before.rooms.used(length)
        size = max(1, self._limit([before, moved]) // (sum(self.shape.head_dim) * self.shape.dtype.itemsize))
        for layer in range(self.shape.layers):
            for first in range(0, len(rows), size):
                some = rows[first : first + size]
                self._write(moved, layer, first, some, *self._read(before, layer, first, some))
        if moved.holder != LOCAL:
            self.workers.members[moved.holder].ask(Kind.SYNC)  # it has them all

    def release(self) -> None:
        """Have living workers free everything."""
        for member, parts in self.by_member():
            self._free(member, [part.shard for part in parts])
        self.parts, self._is_released = [], True
        self._by_member = None
        for member in self.workers.members.values():
            member.held.pop(self, None)

    def _read(self, part: Part, layer: int, first: int, rows: Tensor) -> list[Tensor]:
        if part.here is not None:
            return [x[layer][0, :, 0].index_select(0, rows.to(x[layer].device)) for x in (part.here.k, part.here.v)]
        member = self.workers.members[part.holder]
        member.drain()
        member.send(Kind.FETCH, layer=layer, tokens=len(rows), roster=part.shard, argument=first, replies=True)
        return member.answer(Kind.RESULT, self.shape.dtype, [(len(rows), dim) for dim in self.shape.head_dim])

    def _write(self, part: Part, layer: int, first: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        if part.here is not None:
            for x, new in ((part.here.k, k), (part.here.v, v)):
                x[layer][0, :, 0].index_copy_(0, rows.to(x[layer].device), new.to(x[layer].device))
            return
        member = self.workers.members[part.holder]
        member.send(Kind.STORE, k, v, layer=layer, tokens=len(rows), roster=part.shard, argument=first)

    def check_whole(self) -> None:
        """Nothing is sent to some of the workers where others are lost, or have another step behind them."""
        if self._is_released:
            raise ValueError("offloaded cache: got a call after release(), expected none; make another cache")
        for member, _ in self.by_member():
            member.check()
        if self._is_torn:
            raise ValueError(
                "offloaded cache: got a call after one that failed half-way, expected truncate(lengths) first, to "
                "what every layer has, or free()"
            )

    def _check_frames(self) -> None:
        """A token's frames must be within the limit, whichever way they go."""
        for member, token in self._token_bytes(with_queries=True):
            if token > member.channel.limit:
                self.release()
                raise ValueError(
                    f"offloaded cache: got {token:,} bytes to a token for worker {member.name}, expected at most "
                    f"{member.channel.limit:,}, its limit of a frame; use more workers or a smaller batch"
                )

    def _count_holds(self) -> None:
        self._by_member = None
        for member in self.workers.members.values():
            member.held[self] = {part.row for part in self.parts if part.holder == member.number}

    def size(self, part: Part) -> int:
        """Bytes that a part takes, of all layers."""
        return self.shape.bytes_of(part.rooms)

    def _limit(self, parts: Sequence[Part]) -> int:
        """The most bytes to a frame, of those that hold these parts."""
        members = [self.workers.members[part.holder] for part in parts if part.holder != LOCAL]
        return min((member.channel.limit for member in members), default=1 << 30)

    def _most(self, with_queries: bool, length: int) -> int:
        """Tokens whose frames are within the limit, whichever way they go, and whose attention is done in time."""
        every = [member.channel.limit // token for member, token in self._token_bytes(with_queries)]
        if with_queries:
            products = self.shape.batch * self.shape.heads[0] * sum(self.shape.head_dim) * length
            every.append(_WORK // max(1, products))
        return max(1, min(every, default=1 << 30))

    def _token_bytes(self, with_queries: bool) -> Iterator[tuple[Member, int]]:
        """The largest frame of one token, to or from each worker."""
        (dim, value_dim), size = self.shape.head_dim, self.shape.dtype.itemsize
        out = value_dim * size + accumulator_dtype(self.shape.dtype).itemsize
        for member, parts in self.by_member():
            keys = sum(len(part.cut.heads) for part in parts) * (dim + value_dim) * size
            queries = sum(part.queries.stop - part.queries.start for part in parts) * max(out, dim * size)
            yield member, max(keys, queries) if with_queries else keys
