"""A shard of growing texts' keys and values: some KV heads' pages that are one holder's, and attention over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy
import torch
from torch import Tensor

from seqpar.kernels import Kernel, Partial, merge_

from .masks import Mask, check_int
from .parts import dealt
from .ring import attend
from .sections import Section
from .stores import Among, Appended, Store, limits

PAGE = 64


class Rooms:
    """Which rows of memory a shard's keys lie in, and which of them queries see: no memory, pure functions of lengths.

    Args:
        mask: causal and without documents.
        kv_heads: all there are.
        heads: which of them are in this shard; all by default.
        place: which of how many holders that take the text's pages in turn.
        capacity: tokens that a text may have.
        chunk: the most tokens appended at once where the mask forgets keys.
        page: tokens of a page; the mask's block where it has stripes.
        remembers: so many steps of each kind.

    Attributes:
        groups, stores: heads counted from the shard's first.
        rows: of one head each, in all, to a batch row and layer.
        page: tokens of a page.
        forgets: whether the mask lets keys go.
        sees_itself: whether a token whose key is kept here sees it here.
    """

    def __init__(
        self, mask: Mask, kv_heads: int, *, capacity: int, chunk: int, heads: range | None = None,
        place: tuple[int, int] = (0, 1), page: int | None = None, remembers: int = 8,
    ) -> None:  # fmt: skip
        if mask.documents is not None:
            raise ValueError(f"KVCache: got {mask!r}, expected a mask without documents; give each its own cache")
        mask.check(1, 1, kv_heads)
        every = range(kv_heads) if heads is None else heads
        self.heads = len(every)
        self.groups = dealt([group.among(range(kv_heads)) for group in mask.groups(kv_heads)], every)
        self.page = _page(self.groups, page)
        self.rows, last = 0, torch.tensor(capacity - 1)
        stores = []
        for number, group in enumerate(self.groups):
            for part in group.parts:
                if int(limits(part, torch.tensor(0))[1]) > 1:
                    raise ValueError(
                        f"KVCache: got {mask!r}, under which queries see later keys, expected a causal mask; write "
                        "mask & seqpar.Causal()"
                    )
                store = Store.of(number, group, part, self.page, place, (capacity, min(chunk, capacity)), self.rows)
                if store.rows:
                    stores.append(store)
                    self.rows += store.rows * len(store.heads)
        self.stores = tuple(stores)
        # Where one holder keeps a key for later, in its stripe, another may have it now, in the band.
        stripes = any(part.stripes is not None for group in self.groups for part in group.parts)
        self.sees_itself = place[1] == 1 or not stripes
        self.forgets = any(int(limits(part, last)[0]) > 0 for group in self.groups for part in group.parts)
        self.step = lru_cache(maxsize=remembers)(self._step)  # all layers take the same
        self.kept = lru_cache(maxsize=remembers)(self._kept)

    def _step(self, appended: tuple[Appended, ...], tokens: int) -> Step:
        """What every layer does with new tokens, each batch row's the last of ``tokens``."""
        taken, put = [], []
        for number, row in enumerate(appended):
            for store in self.stores:
                token, head, into = store.writes(row)
                first = number * tokens + tokens - row.new
                taken.append((first + token) * self.heads + head)
                put.append(number * self.rows + into)
        none = torch.zeros(0, dtype=torch.int64)
        return Step(self, appended, tokens, torch.cat([none, *taken]), torch.cat([none, *put]))

    def _kept(self, appended: Appended) -> Tensor:
        """Which of a batch row's new tokens are kept here, of which head: rows of ``[new tokens x heads]``, int64."""
        kept = torch.zeros(appended.new, self.heads, dtype=torch.bool)
        for store in self.stores:
            token, head, _ = store.writes(appended)
            kept[token, head] = True
        return kept.flatten().nonzero().squeeze(1)

    def used(self, length: int) -> Tensor:
        """The rows that hold something of a text of ``length`` tokens, int64."""
        found = [torch.zeros(0, dtype=torch.int64)]
        for store in self.stores:
            seen = store.mine.count_in_one(torch.tensor(min(length, store.last))).clamp(max=store.rows).tolist()
            firsts = range(store.first, store.first + store.rows * len(store.heads), store.rows)
            found += [torch.arange(first, first + count) for first, count in zip(firsts, seen, strict=True)]
        return torch.cat(found)


class Step:
    """What every layer does with new tokens: which rows of k and v go where, and the kernel calls."""

    def __init__(
        self, rooms: Rooms, appended: tuple[Appended, ...], tokens: int, taken: Tensor, put: Tensor
    ) -> None:  # fmt: skip
        self.appended, self.tokens = appended, tokens
        self.rooms, self._moves = rooms, {taken.device: (taken, put)}
        self._sections: dict[Among, tuple[Section, ...]] = {}

    def sections(self, among: Among = "all") -> tuple[Section, ...]:
        """The kernel calls of the new tokens' queries over all keys, or over those before them, or among themselves."""
        if among not in self._sections:
            stores = self.rooms.stores
            found = [x for store in stores for x in store.sections(self.appended, self.tokens, among)]
            self._sections[among] = tuple(found)
        return self._sections[among]

    def moves_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows of one head each: of all new tokens, and of the memory; int64."""
        if device not in self._moves:
            taken, put = self._moves[torch.device("cpu")]
            self._moves[device] = taken.to(device), put.to(device)
        return self._moves[device]


class Memory(Protocol):
    """Where a cache's keys and values are: here (:class:`Shard`), or elsewhere."""

    @property
    def nbytes(self) -> int:
        """What this process holds, of all layers and batch rows."""

    def take(
        self, layer: int, step: Step, q: Tensor | None, k: Tensor, v: Tensor, *, scale: float, kernel: Kernel,
        sinks: Tensor | None,
    ) -> Partial | None:  # fmt: skip
        """Keep the new tokens' ``k [B, T, Hkv, D]`` and ``v``, and attend with their ``q [B, T, H, D]``, if any."""

    def truncate(self, lengths: Sequence[int | None]) -> None:
        """Each row's text is so long now (None: as before); what follows will be written again."""

    def reorder(self, rows: Sequence[int], sources: Sequence[int]) -> None:
        """Give each of these rows what another has."""


class Shard:
    """The memory of :class:`Rooms`, for some layers and batch rows, and attention over what is in it.

    All of it is taken at the start: no append can fail for lack of memory. On a CPU the system gives it page by page,
    as it is written.
    """

    def __init__(
        self, rooms: Rooms, *, head_dim: tuple[int, int], batch: int, layers: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.rooms = rooms
        self.k, self.v = (
            [_zeros((batch, rooms.rows, 1, dim), dtype, device) for _ in range(layers)] for dim in head_dim
        )

    @property
    def nbytes(self) -> int:
        """Of all layers and batch rows."""
        return sum(x.nbytes for x in (*self.k, *self.v))

    def take(
        self, layer: int, step: Step, q: Tensor | None, k: Tensor, v: Tensor, *, scale: float, kernel: Kernel,
        sinks: Tensor | None,
    ) -> Partial | None:  # fmt: skip
        """See :meth:`Memory.take`."""
        self.write(layer, step, k, v)
        return None if q is None else self.attend(layer, step, q, scale=scale, kernel=kernel, sinks=sinks)

    def truncate(self, lengths: Sequence[int | None]) -> None:
        """Nothing: a step says how long texts are."""

    def reorder(self, rows: Sequence[int], sources: Sequence[int]) -> None:
        """See :meth:`Memory.reorder`."""
        for x in (*self.k, *self.v):
            x[rows] = x[sources]

    def write(self, layer: int, step: Step, k: Tensor, v: Tensor) -> None:
        """Put the new tokens' ``k [B, T, heads, D]`` and ``v`` where they belong; what isn't kept here is not read."""
        for into, x in ((self.k[layer], k), (self.v[layer], v)):
            taken, put = step.moves_on(x.device)
            into.view(-1, x.shape[3]).index_copy_(0, put, x.reshape(-1, x.shape[3]).index_select(0, taken))

    def attend(
        self, layer: int, step: Step, q: Tensor, *, scale: float, kernel: Kernel, sinks: Tensor | None = None,
        among: Among = "all",
    ) -> Partial:  # fmt: skip
        """Attention of the new tokens' ``q [B, T, H, D]``, of the heads that share this shard's, over what is here."""
        memory = self.k[layer], self.v[layer]
        there = [(step.sections(among), memory)]
        return attend(self.rooms.groups, there, q, self.rooms.heads, memory[1].shape[3], sinks, scale, kernel)

    def meet(self, layer: int, step: Step, found: Partial, q: Tensor, *, scale: float, kernel: Kernel) -> Partial:
        """``found`` over the older keys, and the new ones, that have been written since."""
        if step.sections("new"):
            new = self.attend(layer, step, q, scale=scale, kernel=kernel, among="new")
            merge_(found, new.out, new.lse)
        return found


def meet_itself(found: Partial, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    """``found`` of one token's ``q [1, 1, H, D]`` over older keys, and its own ``k [heads, D]``, ``v [heads, Dv]``.

    As :meth:`Shard.meet`, without a kernel: of one key the output is its value, and the lse its score.
    """
    queries, keys = (x.to(found.lse.dtype) for x in (q.view(len(k), -1, k.shape[1]), k.unsqueeze(1)))
    scores = (queries * keys).sum(-1).mul_(scale)
    out = v.unsqueeze(1).expand(-1, scores.shape[1], -1)
    merge_(found, out.reshape(found.out.shape), scores.view_as(found.lse))
    return found


def joined(partials: Sequence[Partial]) -> Partial:
    """Of tokens one after another."""
    if len(partials) == 1:
        return partials[0]
    return Partial(torch.cat([p.out for p in partials], 1), torch.cat([p.lse for p in partials], -1))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, for kernels read rows that they then mask. numpy's come from the system untouched, torch's are written."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(numpy.zeros(math.prod(shape) * dtype.itemsize, numpy.uint8)).view(dtype).view(shape)


def _page(groups: Sequence, page: int | None) -> int:
    blocks = {part.stripes.block for group in groups for part in group.parts if part.stripes is not None}
    (found,) = blocks or {PAGE if page is None else page}
    if page is not None and page != found:
        raise ValueError(f"page: got {page}, expected {found}, the mask's block; leave it out")
    check_int("page", found, least=1, remedy="it is a number of tokens")
    return found
