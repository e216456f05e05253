"""A worker's side of one connection: the shards that a model rank keeps here, and the answers to its frames."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqpar.kernels import Kernel, Partial, compile_ahead, kernel_named
from seqpar.masks import check_int
from seqpar.shards import Rooms, Shard, Step
from seqpar.validation import check_scale

from .budget import Budget
from .channel import Channel, Frame
from .dialect import DTYPES, LEAVING, MOST, PAGES, ROSTERS, SHARDS, STREAMS, WANTS_LSE, as_dtype, float_of, size_of
from .errors import NoRoom
from .frames import FrameError, Kind
from .mask_text import from_text
from .rosters import Kept, Roster

LONGEST = 1 << 31


@dataclass
class Common:
    """What all connections of a worker share: memory, the device, and who computes now."""

    budget: Budget
    device: torch.device

    def __post_init__(self) -> None:
        self.computes = threading.Lock()  # one call at a time has all cores
        self.busy = 0.0  # seconds
        self.leaving = False
        self.sessions: set[Session] = set()


class Session:
    """Serves one connection until it ends; what it kept is free then."""

    def __init__(self, channel: Channel, common: Common) -> None:
        self.channel, self.common = channel, common
        self.shards: dict[int, Kept] = {}
        self._rosters: dict[int, Roster] = {}
        self._wrong: str | None = None  # in a frame that is not answered; the next answer says so
        self._answers: dict[Kind, Callable[[Frame], None]] = {
            Kind.HELLO: self._done,
            Kind.OPEN: self._open,
            Kind.FREE: self._free,
            Kind.ROSTER: self._name,
            Kind.ATTEND: self._attend,
            Kind.APPEND: self._stream,
            Kind.TRUNCATE: self._truncate,
            Kind.FETCH: self._fetch,
            Kind.STORE: self._store,
            Kind.STATUS: self._status,
            Kind.SYNC: self._done,
        }

    def serve(self, lease: float) -> None:
        """Answer frames until the peer leaves, is gone, or is silent for ``lease`` seconds.

        Raises:
            Lost: the peer is gone, or was silent for too long.
            FrameError: it sent what is no frame of ours.
        """
        try:
            with torch.inference_mode():
                while True:
                    frame = self.channel.receive(lease)
                    if frame.header.kind is Kind.BYE:
                        return
                    self._handle(frame)
        finally:
            self.end()

    def end(self) -> None:
        """Close the connection and free everything. Again does no harm."""
        self.channel.close()
        self._drop(list(self.shards))

    def _handle(self, frame: Frame) -> None:
        kind = frame.header.kind
        if kind not in self._answers:
            raise FrameError("kind", kind.name, "a request")
        streams = kind in (Kind.ROSTER, Kind.STORE) or (kind is Kind.APPEND and frame.header.flags & STREAMS)
        try:
            if self._wrong is not None and not streams and kind is not Kind.FREE:  # which only cleans up
                reason, self._wrong = self._wrong, None
                if kind is Kind.ATTEND:
                    self._skip_keys()
                raise ValueError(reason)
            self._answers[kind](frame)
        except FrameError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError, ArithmeticError, MemoryError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            if streams:
                self._wrong = self._wrong or reason
            else:
                self._refuse(reason, is_memory=isinstance(error, NoRoom | MemoryError))

    def _answer(self, kind: Kind, *tensors: Tensor, **fields: Any) -> None:
        flags = LEAVING if self.common.leaving else 0
        self.channel.send(kind, *tensors, flags=flags, **fields)

    def _refuse(self, reason: str, *, is_memory: bool) -> None:
        text = {"error": reason[:2000], "memory": is_memory}
        self.channel.send(Kind.REFUSED, text=text, flags=LEAVING if self.common.leaving else 0)

    def _done(self, frame: Frame) -> None:
        self._answer(Kind.DONE, text={})

    def _status(self, frame: Frame) -> None:
        common = self.common
        text = {
            "free": common.budget.free,
            "memory": common.budget.total,
            "connections": len(common.sessions),
            "shards": sum(len(session.shards) for session in list(common.sessions)),
            "busy": common.busy,
        }
        self._answer(Kind.DONE, text=text)

    def _open(self, frame: Frame) -> None:
        text = frame.text()
        mask, dtype = from_text(text["mask"]), _dtype(text["dtype"])
        (heads, kv_heads), (dim, value_dim) = (_ints(text[name], 2, most=MOST[name]) for name in ("heads", "head_dim"))
        capacity, chunk, page, layers = (
            _ints([text[name]], 1, most=MOST[name])[0] for name in ("capacity", "chunk", "page", "layers")
        )
        (length,) = _ints([text["length"]], 1, least=0, most=capacity)
        if heads % kv_heads or capacity > page * PAGES:
            raise ValueError(f"open: got {heads} heads over {kv_heads}, pages of {page} tokens of {capacity}")
        wanted = [_ints(each, 5, least=0) for each in text["shards"]]
        if len({each[0] for each in wanted} | set(self.shards)) != len(wanted) + len(self.shards):
            raise ValueError("open: got a shard's number twice, expected new ones")
        if len(wanted) + len(self.shards) > SHARDS:
            raise ValueError(f"open: got {len(wanted)} shards, expected at most {SHARDS} to a connection")
        opened, taken = dict[int, Kept](), 0
        try:
            for number, first, last, segment, segments in wanted:
                if not first < last <= kv_heads or segment >= segments:
                    raise ValueError(f"open: got heads {first} to {last}, segment {segment} of {segments}")
                rooms = Rooms(
                    mask, kv_heads, heads=range(first, last), place=(segment, segments), capacity=capacity, chunk=chunk,
                    page=page,
                )  # fmt: skip
                size = size_of(rooms, (dim, value_dim), dtype, layers)
                self.common.budget.take(size)
                taken += size
                shard = Shard(
                    rooms, head_dim=(dim, value_dim), batch=1, layers=layers, dtype=dtype, device=self.common.device
                )
                queries = (last - first) * (heads // kv_heads)
                opened[number] = Kept(shard, [length] * layers, queries, capacity, (dim, value_dim), dtype, size)
            if self.common.device.type == "cpu":
                compile_ahead(dtype, max((kept.shard.rooms.rows * dim for kept in opened.values()), default=0))
        except BaseException:
            self.common.budget.give_back(taken)
            raise
        self.shards.update(opened)
        self._answer(Kind.DONE, text={})

    def _free(self, frame: Frame) -> None:
        self._drop(self._numbers(frame.text()["shards"]))
        self._answer(Kind.DONE, text={})

    def _drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            kept = self.shards.pop(number, None)
            if kept is not None:
                self.common.budget.give_back(kept.size)
        left = set(map(id, list(self.shards.values())))
        for key, roster in list(self._rosters.items()):
            if any(id(kept) not in left for kept in roster.shards):
                self._rosters.pop(key, None)  # the thread that ends this session may have

    def _name(self, frame: Frame) -> None:
        text = frame.text()
        shards = [self.shards[number] for number in self._numbers(text["shards"])]
        counts = None if text["counts"] is None else _ints(text["counts"], len(shards), least=0)
        if not shards or len({kept.dtype for kept in shards}) > 1:
            raise ValueError("roster: got none or several dtypes, expected shards of one dtype")
        while len(self._rosters) >= ROSTERS:
            del self._rosters[next(iter(self._rosters))]
        self._rosters[frame.header.roster] = Roster(shards, counts)

    def _roster(self, frame: Frame) -> Roster:
        header = frame.header
        roster = self._rosters.get(header.roster)
        if roster is None:
            raise ValueError(f"roster: got {header.roster}, expected one of those that were named")
        if header.tokens > 1 and header.tokens * roster.token_bytes > self.channel.limit:
            raise ValueError(
                f"tokens: got {header.tokens}, expected at most {self.channel.limit // roster.token_bytes}, whose keys "
                "and values fill a frame"
            )
        if header.dtype is not roster.dtype:
            raise ValueError(f"dtype: got {header.dtype}, expected {roster.dtype}, of the shards")
        return roster

    def _attend(self, frame: Frame) -> None:
        """Older keys first, while the new ones are on their way."""
        header = frame.header
        call = header.layer, header.tokens, header.roster
        self.channel.expect()
        try:
            roster, scale = self._roster(frame), float_of(header.argument)
            if header.tokens * roster.answer_bytes > self.channel.limit:
                raise ValueError(f"tokens: got {header.tokens}, expected fewer, whose output fits a frame")
            check_scale(scale)
            steps = roster.steps(header.layer, header.tokens)
            queries = self._tensors(frame, roster.queries_shapes(header.tokens))
            found = self._compute(functools.partial(roster.older, header.layer, steps, queries, scale))
        except FrameError:
            raise
        except Exception:
            self._skip_keys()
            raise
        keys = self.channel.receive()
        if keys.header.kind is not Kind.APPEND or (keys.header.layer, keys.header.tokens, keys.header.roster) != call:
            raise FrameError("append", str(keys.header), f"keys of layer, tokens and roster {call}")
        rows = self._write(keys, roster, steps)
        merge = functools.partial(roster.newer, header.layer, steps, queries, rows, found, scale)
        # A token's own key is soon done: it does not wait for another connection's many.
        found = self._compute(merge) if header.tokens > 1 else merge(_kernel())
        outs = [x.out[0].to(roster.dtype) for x in found]
        lses = [as_dtype(x.lse[0], roster.dtype) for x in found] if header.flags & WANTS_LSE else []
        self._answer(Kind.RESULT, *outs, *lses, layer=header.layer, tokens=header.tokens, dtype=roster.dtype)

    def _skip_keys(self) -> None:
        """Of a call that is refused."""
        keys = self.channel.receive()
        if keys.header.kind is not Kind.APPEND:
            raise FrameError("kind", keys.header.kind.name, "the keys that follow queries")

    def _stream(self, frame: Frame) -> None:
        """Keys and values without queries, as in a prompt that the model rank attends to itself."""
        if not frame.header.flags & STREAMS:
            raise FrameError("append", "keys without queries", "a call's, or the flag of those that stream")
        roster = self._roster(frame)
        self._write(frame, roster, roster.steps(frame.header.layer, frame.header.tokens))

    def _write(self, frame: Frame, roster: Roster, steps: Sequence[Step]) -> list[Tensor]:
        rows = self._tensors(frame, roster.keys_shapes(steps))
        roster.write(frame.header.layer, steps, rows)
        return rows

    def _truncate(self, frame: Frame) -> None:
        text = frame.text()
        numbers = self._numbers(text["shards"])
        lengths = _ints(text["lengths"], len(numbers), least=0)
        for number, length in zip(numbers, lengths, strict=True):
            if length > min(self.shards[number].lengths):
                raise ValueError(f"truncate: got {length}, expected at most {min(self.shards[number].lengths)} tokens")
        for number, length in zip(numbers, lengths, strict=True):
            self.shards[number].lengths[:] = [length] * len(self.shards[number].lengths)
        self._answer(Kind.DONE, text={})

    def _fetch(self, frame: Frame) -> None:
        kept, layer, rows = self._rows(frame)
        found = [x[layer][0, :, 0].index_select(0, rows) for x in (kept.shard.k, kept.shard.v)]
        self._answer(Kind.RESULT, *found, dtype=kept.dtype)

    def _store(self, frame: Frame) -> None:
        kept, layer, rows = self._rows(frame)
        if frame.header.dtype is not kept.dtype:
            raise ValueError(f"dtype: got {frame.header.dtype}, expected {kept.dtype}, of the shard")
        new = self._tensors(frame, [(len(rows), dim) for dim in kept.head_dim])
        for into, x in zip((kept.shard.k, kept.shard.v), new, strict=True):
            into[layer][0, :, 0].index_copy_(0, rows, x)

    def _rows(self, frame: Frame) -> tuple[Kept, int, Tensor]:
        """The shard, the layer and the rows of memory in use that a frame speaks of."""
        header = frame.header
        kept = self.shards[header.roster]
        if header.layer >= len(kept.lengths):
            raise ValueError(f"layer: got {header.layer}, expected one below {len(kept.lengths)}")
        rows = kept.shard.rooms.used(kept.lengths[header.layer])
        some = rows[header.argument : header.argument + header.tokens]
        if header.argument < 0 or len(some) != header.tokens:
            raise ValueError(f"rows: got {header.argument} and {header.tokens} more, expected such among {len(rows)}")
        return kept, header.layer, some.to(self.common.device)

    def _tensors(self, frame: Frame, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        return [x.to(self.common.device) for x in frame.tensors(*shapes)]

    def _numbers(self, given: Any) -> list[int]:
        numbers = _ints(given, None, least=0)
        unknown = [number for number in numbers if number not in self.shards]
        if unknown:
            raise ValueError(f"shards: got {unknown[:8]}, expected those of this connection")
        return numbers

    def _compute(self, work: Callable[[Kernel], list[Partial]]) -> list[Partial]:
        with self.common.computes:
            began = time.perf_counter()
            found = work(_kernel())
            self.common.busy += time.perf_counter() - began
        return found


def _kernel() -> Kernel:
    return kernel_named("auto")


def _ints(given: Any, count: int | None, least: int = 1, most: int = LONGEST) -> list[int]:
    """Checked numbers."""
    if not isinstance(given, list) or (count is not None and len(given) != count):
        raise ValueError(f"numbers: got {str(given)[:80]}, expected a list of {count or 'them'}")
    for number in given:
        check_int("number", number, least=least, remedy="it is a count")
        if number > most:
            raise ValueError(f"number: got {number}, expected at most {most}")
    return list(given)


def _dtype(name: Any) -> torch.dtype:
    found = {value: dtype for dtype, value in DTYPES.items()}.get(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"dtype: got {str(name)[:40]!r}, expected one of {', '.join(DTYPES.values())}")
    return found
