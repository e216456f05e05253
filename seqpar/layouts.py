"""Layouts: which rank holds which tokens. Whatever the layout, a rank keeps its tokens sorted by global position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from numbers import Integral

import torch

from .balancing import balanced, default_chunk
from .masks import Causal, Documents, Mask
from .positions import Positions

LAYOUT_NAMES = ("contiguous", "zigzag", "striped", "balanced", "document_zigzag", "whole_documents")


_BY_DOCUMENT = ("document_zigzag", "whole_documents")


@dataclass(frozen=True)
class Layout:
    """The global positions that each rank holds: ``queries[rank]`` and ``keys[rank]``, the same in self-attention."""

    name: str
    queries: tuple[Positions, ...]
    keys: tuple[Positions, ...]

    @classmethod
    def explicit(cls, queries: Sequence, keys: Sequence | None = None) -> Layout:
        """From sorted positions, one sequence or 1-D tensor per rank; ``keys`` where they differ from the queries."""
        held = _positions_per_rank("queries", queries)
        return cls("explicit", held, held if keys is None else _positions_per_rank("keys", keys))

    @classmethod
    def balanced(
        cls,
        mask: Mask,
        *,
        length: int,
        world: int,
        chunk: int | None = None,
        kv_length: int | None = None,
        kv_heads: int | None = None,
    ) -> Layout:
        """Chunks dealt so that every rank has as many tokens (to one chunk), near-equal work, and little to fetch.

        For any mask, packed documents of mixed lengths above all. In cross-attention queries are dealt so, and keys in
        order.

        Args:
            mask, length, kv_length: as for :func:`seqpar.plan`.
            kv_heads: how many KV heads there are, for a mask by which they see different keys.
            world: the number of ranks.
            chunk: tokens of a chunk; about sixteen chunks for each rank by default.
        """
        kv_length = length if kv_length is None else kv_length
        _check_enough(length, kv_length, world)
        if chunk is not None and (not isinstance(chunk, Integral) or not 1 <= chunk <= length // world):
            raise ValueError(
                f"chunk: got {chunk!r}, expected 1 .. {length // world} tokens, so that each of {world} ranks gets one"
            )
        mask.check(length, kv_length, kv_heads)
        groups = mask.groups(kv_heads)
        queries = balanced(groups, length, kv_length, world, chunk or default_chunk(length, world))
        same = kv_length == length and (mask.documents is None or mask.documents.queries == mask.documents.keys)
        return cls("balanced", queries, queries if same else _contiguous(kv_length, world))

    @property
    def content(self) -> object:
        """Everything that tells this layout from another, as plain values."""
        return [[positions.content for positions in held] for held in (self.queries, self.keys)]

    def merged(self, ranks: int) -> Layout:
        """What every ``ranks`` consecutive ranks hold together."""
        return self if ranks == 1 else Layout(self.name, merged(self.queries, ranks), merged(self.keys, ranks))

    def __repr__(self) -> str:
        return f"Layout({self.name!r}, {len(self.queries)} ranks)"


@lru_cache(maxsize=32)
def merged(held: tuple[Positions, ...], ranks: int) -> tuple[Positions, ...]:
    """What every ``ranks`` consecutive ranks hold together."""
    blocks = (held[first : first + ranks] for first in range(0, len(held), ranks))
    return tuple(Positions.of(torch.cat([positions.tensor for positions in block]).sort().values) for block in blocks)


def resolve_layout(
    layout: str | Layout,
    mask: Mask,
    length: int,
    kv_length: int,
    world: int,
    kv_heads: int | None = None,
    replicated: bool = False,
) -> Layout:
    """The layout that the ``layout=`` of :func:`seqpar.plan` means; ValueError where it does not fit.

    ``replicated``: every rank holds all queries, and the layout deals the keys.
    """
    if replicated:
        return _replicated(layout, mask, length, kv_length, world, kv_heads)
    if isinstance(layout, str):
        if layout not in LAYOUT_NAMES:
            expected = f"one of {', '.join(LAYOUT_NAMES)}, auto, another plan's .layout, or positions per rank"
            raise ValueError(f"layout: got {layout!r}, expected {expected}")
        return _named(layout, mask, length, kv_length, world, kv_heads)
    _check_held("queries", layout.queries, length, world)
    _check_held("keys", layout.keys, kv_length, world)
    return layout


def _check_held(what: str, held: tuple[Positions, ...], total: int, world: int) -> None:
    if len(held) != world:
        raise ValueError(f"layout: got positions of {what} for {len(held)} ranks, expected {world}, the group's size")
    if not holds_each_once(held, total):
        everything = torch.cat([positions.tensor for positions in held])
        raise ValueError(
            f"layout: {what} hold {len(everything)} positions, {len(everything.unique())} of them distinct, "
            f"expected each of 0..{total - 1} on exactly one rank"
        )


def _replicated(
    layout: str | Layout, mask: Mask, length: int, kv_length: int, world: int, kv_heads: int | None
) -> Layout:
    """Keys as the layout deals them, in cross-attention as if of as many queries; and all queries everywhere."""
    if isinstance(layout, Layout):
        _check_held("keys", layout.keys, kv_length, world)
        name, keys = layout.name, layout.keys
    else:
        _check_enough(world, kv_length, world)  # of queries any number will do
        documents = mask.documents
        if length != kv_length and documents is not None:
            mask = Documents(documents.keys)
        elif length != kv_length:
            mask = Causal()
        name, keys = layout, resolve_layout(layout, mask, kv_length, kv_length, world, kv_heads).keys
    everything = Positions.runs([(0, length, 1)])
    return Layout(name, (everything,) * world, keys)


@lru_cache(maxsize=32)
def holds_each_once(held: tuple[Positions, ...], total: int) -> bool:
    """Whether each of ``0 .. total - 1`` is on exactly one rank."""
    if sum(map(len, held)) != total:
        return False
    found = torch.zeros(total, dtype=torch.bool)
    for positions in held:
        if len(positions) and int(positions.tensor[-1]) >= total:
            return False
        found[positions.tensor] = True
    return bool(found.all())


def _named(name: str, mask: Mask, length: int, kv_length: int, world: int, kv_heads: int | None) -> Layout:
    documents = mask.documents
    _check_enough(length, kv_length, world)
    if name == "balanced":
        return Layout.balanced(mask, length=length, kv_length=kv_length, world=world, kv_heads=kv_heads)
    if name not in _BY_DOCUMENT:
        deal = {"contiguous": _contiguous, "zigzag": _zigzag, "striped": _striped}[name]
        held = deal(length, world)
        return Layout(name, held, held if kv_length == length else deal(kv_length, world))
    if documents is None or len(documents.queries) != 1:
        rows = "no Documents" if documents is None else f"Documents of {len(documents.queries)} batch rows"
        raise ValueError(
            f"layout={name!r}: the mask has {rows}, expected Documents with one cu_seqlens for all rows; "
            "layout='zigzag' takes any mask"
        )
    queries, keys = documents.queries[0], documents.keys[0]
    if name == "whole_documents":
        return _whole_documents(queries, keys, world)
    held = _document_zigzag(queries, world)
    return Layout(name, held, held if keys == queries else _document_zigzag(keys, world))


def _check_enough(length: int, kv_length: int, world: int) -> None:
    for what, total in (("length", length), ("kv_length", kv_length)):
        if total < world:
            raise ValueError(
                f"{what}: got {total} tokens for {world} ranks, expected at least one each; use fewer ranks"
            )


def _contiguous(length: int, world: int) -> tuple[Positions, ...]:
    bounds = [rank * length // world for rank in range(world + 1)]
    return tuple(Positions.runs([(a, b - a, 1)]) for a, b in pairwise(bounds))


def _striped(length: int, world: int) -> tuple[Positions, ...]:
    return tuple(Positions.runs([(rank, len(range(rank, length, world)), world)]) for rank in range(world))


def _zigzag(length: int, world: int) -> tuple[Positions, ...]:
    return _document_zigzag((0, length), world)


def _document_zigzag(cu_seqlens: tuple[int, ...], world: int) -> tuple[Positions, ...]:
    """Each document in ``2 * world`` chunks, rank ``r`` holding chunks ``r`` and ``2 * world - 1 - r``.

    Tokens that remain when a document is divided evenly go to the ranks in turn, document after document.
    """
    chunks = 2 * world
    runs: list[list[tuple[int, int, int]]] = [[] for _ in range(world)]
    turn = 0
    for begin, end in pairwise(cu_seqlens):
        size, remaining = divmod(end - begin, chunks)
        sizes = [size] * chunks
        for slot in range(turn, turn + remaining):
            slot %= chunks
            # Each rank's first chunk gets one, then each rank's second.
            sizes[slot if slot < world else 3 * world - 1 - slot] += 1
        turn = (turn + remaining) % chunks
        for chunk, count in enumerate(sizes):
            runs[min(chunk, chunks - 1 - chunk)].append((begin, count, 1))
            begin += count
    return tuple(Positions.runs(run) for run in runs)


def _whole_documents(cu_seqlens: tuple[int, ...], cu_seqlens_k: tuple[int, ...], world: int) -> Layout:
    """Every document whole on one rank, so that nothing travels: the longest first, to the rank with fewest tokens."""
    lengths = [end - begin for begin, end in pairwise(cu_seqlens)]
    filled = sum(length > 0 for length in lengths)
    if filled < world:
        raise ValueError(
            f"layout='whole_documents': got {filled} documents for {world} ranks, expected at least one each; use "
            "fewer ranks, or layout='balanced'"
        )
    tokens: list[int] = [0] * world
    mine: list[list[int]] = [[] for _ in range(world)]
    for document in sorted(range(len(lengths)), key=lambda document: -lengths[document]):
        rank = min(range(world), key=tokens.__getitem__)
        tokens[rank] += lengths[document]
        mine[rank].append(document)

    def held(bounds: tuple[int, ...]) -> tuple[Positions, ...]:
        runs = [[(bounds[d], bounds[d + 1] - bounds[d], 1) for d in sorted(documents)] for documents in mine]
        return tuple(Positions.runs(run) for run in runs)

    queries = held(cu_seqlens)
    return Layout("whole_documents", queries, queries if cu_seqlens_k == cu_seqlens else held(cu_seqlens_k))


def as_layout(layout: str | Layout | Sequence) -> str | Layout:
    """A name or a layout as it is; positions per rank as an explicit layout."""
    if isinstance(layout, (str, Layout)):
        return layout
    if not isinstance(layout, Sequence):
        raise ValueError(f"layout: got {layout!r}, expected a name, another plan's .layout, or positions per rank")
    return Layout.explicit(layout)


def _positions_per_rank(what: str, given: Sequence) -> tuple[Positions, ...]:
    held = []
    for rank, positions in enumerate(given):
        try:
            tensor = torch.as_tensor(positions).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"layout: {what} of rank {rank} are {positions!r}, expected integers") from error
        integers = tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.dtype == torch.bool)
        if tensor.dim() != 1 or not integers or bool((tensor.diff() <= 0).any()) or bool((tensor < 0).any()):
            raise ValueError(f"layout: {what} of rank {rank} are not 1-D, integer, >= 0 and increasing; sort them")
        held.append(Positions.of(tensor.to(torch.int64)))
    return tuple(held)
