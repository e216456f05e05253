"""Masks: which keys each query sees, as one interval ``lo <= key < hi`` of global positions per query, or a few.

An interval mask's own rule is written for a single document of ``num_queries`` queries and ``num_keys`` keys. ``&``
intersects rules, and :class:`Documents` applies them to each document in that document's own coordinates: packed
documents attend exactly as each does alone. Where queries and keys differ in number, their ends are aligned per
document: query ``i`` stands at key position ``i + num_keys - num_queries``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from .parts import HeadGroup, Part, intersections


class Span(NamedTuple):
    """The document of each query: its queries' and keys' first global position and number, tensors like the queries."""

    first_query: Tensor
    num_queries: Tensor
    first_key: Tensor
    num_keys: Tensor


class Mask:
    """Who attends to whom. Immutable and hashable; combine with ``&``."""

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Intersection((*self.terms, *other.terms))

    @property
    def terms(self) -> tuple[Mask, ...]:
        """The masks that are intersected: this one alone, or an intersection's."""
        return (self,)

    @property
    def by_head(self) -> bool:
        """Whether heads see different keys; a plan must then know how many there are."""
        return any(term.by_head for term in self.terms if term is not self)

    def groups(self, kv_heads: int | None) -> tuple[HeadGroup, ...]:
        """What the KV heads see, as disjoint parts: one, of all heads, where the mask is an interval."""
        return (HeadGroup(None, (Part(self),)),)

    def rule(self, query: Tensor, num_queries: Tensor, num_keys: Tensor) -> tuple[Tensor | int, Tensor]:
        """``lo, hi`` of each ``query`` in its document's coordinates, not yet clipped to its keys; ``lo`` may be 0."""
        raise AssertionError(f"{self!r} is more than one interval: see its groups")

    @property
    def documents(self) -> Documents | None:
        """The document boundaries, where the mask has them."""
        return None

    def jumps_within(self, num_queries: int, num_keys: int) -> range:
        """Queries of one document at which the rule's bounds may jump; elsewhere they stay or grow by 1 per query."""
        return range(0)

    def jumps(self, length: int, kv_length: int) -> Tensor:
        """Sorted global positions of queries at which the intervals' bounds may jump, int64."""
        documents = self.documents_within(length, kv_length)
        found = {first for row in documents.queries for first in row[:-1]}
        for row, key_row in zip(documents.queries, documents.keys, strict=True):
            for (first, end), (first_key, end_key) in zip(pairwise(row), pairwise(key_row), strict=True):
                for term in self.terms:
                    found.update(first + query for query in term.jumps_within(end - first, end_key - first_key))
        return torch.tensor(sorted(found))

    def documents_within(self, length: int, kv_length: int) -> Documents:
        """The documents, or the whole sequence as one."""
        return self.documents or Documents([0, length], [0, kv_length])

    @property
    def content(self) -> object:
        """Everything that tells this mask from another, as plain values."""
        return [(type(term).__name__, vars(term)) for term in self.terms]

    def check(self, length: int, kv_length: int, kv_heads: int | None = None) -> None:
        """Raise ValueError where the mask does not fit ``length`` queries, ``kv_length`` keys, or the KV heads."""
        if self.documents is not None:
            self.documents.check_covers(length, kv_length)
        if self.by_head and kv_heads is None:
            raise ValueError(
                f"{self!r}: heads see different keys, and the plan knows no heads, expected their numbers; give it "
                "heads=(query heads, KV heads), and Layout.balanced kv_heads="
            )
        for term in self.terms:
            term.check_among(self.terms, self.documents_within(length, kv_length), kv_heads)

    def check_among(self, terms: tuple[Mask, ...], documents: Documents, kv_heads: int | None) -> None:
        """Raise ValueError where this mask can't be combined with the others, or not over these documents or heads."""

    def intervals(self, query: Tensor, length: int, kv_length: int) -> tuple[Tensor, Tensor]:
        """``lo, hi``, int64 ``[rows, T]``: the keys that each of the sorted global positions ``query [T]`` sees.

        ``rows`` is 1, or the batch size where rows have documents of their own. Both bounds are non-decreasing; a query
        that sees nothing repeats the previous ``hi``.
        """
        spans = self.documents_within(length, kv_length).spans(query)
        bounds = [self._row_intervals(query, span) for span in spans]
        lo, hi = (torch.stack(bound) for bound in zip(*bounds, strict=True))
        return lo, hi

    def _row_intervals(self, query: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        local = query - span.first_query
        lo, hi = torch.zeros_like(query), span.num_keys
        for term in self.terms:
            term_lo, term_hi = term.rule(local, span.num_queries, span.num_keys)
            lo = lo if isinstance(term_lo, int) else torch.maximum(lo, term_lo)
            hi = torch.minimum(hi, term_hi)
        empty = hi <= lo
        lo, hi = lo + span.first_key, hi + span.first_key
        if bool(empty.any()):
            hi = hi.masked_fill(empty, 0).cummax(0).values
            lo = torch.where(empty, hi, lo)
        return lo, hi


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def rule(self, query: Tensor, num_queries: Tensor, num_keys: Tensor) -> tuple[Tensor | int, Tensor]:
        """See :meth:`Mask.rule`."""
        return 0, num_keys


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees the keys up to its own position."""

    def rule(self, query: Tensor, num_queries: Tensor, num_keys: Tensor) -> tuple[Tensor | int, Tensor]:
        """See :meth:`Mask.rule`."""
        return 0, query + (num_keys - num_queries) + 1


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """Query ``i`` sees keys ``i - left .. i + right`` inclusive, FlashAttention's convention; -1 is unlimited.

    ``right=0`` is causal. A model that "attends to the last W tokens, itself included" has ``left = W - 1``.
    """

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            check_int(f"SlidingWindow({name}=)", getattr(self, name), least=-1, remedy="-1 means unlimited")

    def rule(self, query: Tensor, num_queries: Tensor, num_keys: Tensor) -> tuple[Tensor | int, Tensor]:
        """See :meth:`Mask.rule`."""
        key = query + (num_keys - num_queries)
        return (0 if self.left < 0 else key - self.left), (num_keys if self.right < 0 else key + self.right + 1)


@dataclass(frozen=True)
class PrefixLM(Mask):
    """Every query sees the first ``prefix`` keys (of its document), and is causal after them."""

    prefix: int

    def __post_init__(self) -> None:
        check_int("PrefixLM(prefix=)", self.prefix, least=0, remedy="0 is plain causal")

    def rule(self, query: Tensor, num_queries: Tensor, num_keys: Tensor) -> tuple[Tensor | int, Tensor]:
        """See :meth:`Mask.rule`."""
        return 0, (query + (num_keys - num_queries) + 1).clamp(min=self.prefix)


@dataclass(frozen=True)
class Chunked(Mask):
    """Block-diagonal: a query sees the keys of its own chunk of ``size`` positions (with Causal, as in Llama 4)."""

    size: int

    def __post_init__(self) -> None:
        check_int("Chunked(size=)", self.size, least=1, remedy="size is in tokens")

    def rule(self, query: Tensor, num_queries: Tensor, num_keys: Tensor) -> tuple[Tensor | int, Tensor]:
        """See :meth:`Mask.rule`."""
        key = query + (num_keys - num_queries)
        chunk = key.div(self.size, rounding_mode="floor") * self.size
        return chunk, chunk + self.size

    def jumps_within(self, num_queries: int, num_keys: int) -> range:
        """Every query that opens a chunk."""
        return range((num_queries - num_keys) % self.size, num_queries, self.size)


Boundaries = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, init=False)
class Documents(Mask):
    """Packed documents: a query sees the keys of its own document. Combine with :class:`Causal` for language models.

    Args:
        cu_seqlens: cumulative lengths ``[0, ..., length]``, increasing, of the documents; or a list of them, one per
            batch row. Integers, a list or a tensor.
        cu_seqlens_k: the keys' boundaries, where they differ from the queries' (cross-attention); as many documents in
            each row. Documents may then be empty.
    """

    queries: Boundaries
    keys: Boundaries

    def __init__(self, cu_seqlens: Sequence | Tensor, cu_seqlens_k: Sequence | Tensor | None = None) -> None:
        may_be_empty = cu_seqlens_k is not None
        queries = _boundaries("cu_seqlens", cu_seqlens, may_be_empty)
        keys = queries if cu_seqlens_k is None else _boundaries("cu_seqlens_k", cu_seqlens_k, may_be_empty)
        if [len(row) for row in queries] != [len(row) for row in keys]:
            raise ValueError(
                f"Documents: got {[len(row) - 1 for row in queries]} documents of queries and "
                f"{[len(row) - 1 for row in keys]} of keys per batch row, expected as many of each; "
                "give a document without keys the same boundary twice"
            )
        object.__setattr__(self, "queries", queries)
        object.__setattr__(self, "keys", keys)

    def __repr__(self) -> str:
        rows = [f"{len(row) - 1} of {row[-1]}" for row in self.queries]
        return f"Documents({', '.join(rows[:4])}{', ...' if len(rows) > 4 else ''} tokens)"

    def rule(self, query: Tensor, num_queries: Tensor, num_keys: Tensor) -> tuple[Tensor | int, Tensor]:
        """See :meth:`Mask.rule`."""
        return 0, num_keys

    @property
    def documents(self) -> Documents:
        """Itself."""
        return self

    def check_covers(self, length: int, kv_length: int) -> None:
        """Raise ValueError unless every row ends at the number of tokens."""
        for name, rows, expected in (("cu_seqlens", self.queries, length), ("cu_seqlens_k", self.keys, kv_length)):
            for index, row in enumerate(rows):
                if row[-1] != expected:
                    raise ValueError(
                        f"Documents: {name} of batch row {index} ends at {row[-1]}, expected {expected}, the plan's "
                        "number of tokens; give padding a document of its own"
                    )

    def spans(self, query: Tensor) -> Iterator[Span]:
        """Per batch row, the document of each global position ``query [T]``."""
        for row, key_row in zip(self.queries, self.keys, strict=True):
            if len(row) == 2:
                first, count, first_key, num_keys = (torch.tensor(x) for x in (0, row[1], 0, key_row[1]))
                yield Span(first, count, first_key, num_keys.expand_as(query))
                continue
            bounds, key_bounds = torch.tensor(row), torch.tensor(key_row)
            queries_each = torch.searchsorted(query, bounds).diff()  # of these queries: they are sorted
            each = torch.stack([bounds[:-1], bounds.diff(), key_bounds[:-1], key_bounds.diff()])
            yield Span(*each.repeat_interleave(queries_each, 1))

    def refine(self, other: Documents) -> Documents:
        """Documents bounded wherever either's are."""
        if self.queries != self.keys or other.queries != other.keys:
            raise ValueError("Documents & Documents: expected self-attention boundaries (no cu_seqlens_k) in both")
        mine, theirs = self.queries, other.queries
        if len(mine) != len(theirs) and 1 not in (len(mine), len(theirs)):
            raise ValueError(f"Documents & Documents: got {len(mine)} and {len(theirs)} batch rows, expected as many")
        rows = max(len(mine), len(theirs))
        return Documents([sorted({*mine[i % len(mine)], *theirs[i % len(theirs)]}) for i in range(rows)])


@dataclass(frozen=True)
class Intersection(Mask):
    """What ``&`` makes: a query sees the keys that every term lets it see. Write ``a & b``.

    Where a term has several parts, so has the intersection: each of them within all other terms.
    """

    parts: tuple[Mask, ...]

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts))

    @property
    def terms(self) -> tuple[Mask, ...]:
        """The masks that are intersected."""
        return self.parts

    @cached_property
    def documents(self) -> Documents | None:
        """The terms' document boundaries, taken together."""
        merged: Documents | None = None
        for term in self.parts:
            if isinstance(term, Documents):
                merged = term if merged is None else merged.refine(term)
        return merged

    def groups(self, kv_heads: int | None) -> tuple[HeadGroup, ...]:
        """What the KV heads see, as disjoint parts."""
        combined, *others = (term.groups(kv_heads) for term in self.parts)
        for theirs in others:
            combined = tuple(
                HeadGroup(mine.heads, tuple(Part(a & b, s or t) for a, s in mine.parts for b, t in other.parts))
                for mine, other in intersections(combined, theirs)
            )
        return combined


def check_int(what: str, value: object, *, least: int, remedy: str) -> None:
    """Raise ValueError, with what is wrong with ``what``, unless the value is an integer and at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{what}: got {value!r}, expected an integer >= {least}; {remedy}")


def _boundaries(name: str, given: Sequence | Tensor, may_be_empty: bool) -> Boundaries:
    """Checked boundaries of every batch row; a single list of them stands for all rows."""
    rows = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise ValueError(f"Documents: got {name}={rows!r}, expected [0, ..., length], or a list of such for batch rows")
    rows = [x.tolist() if isinstance(x, Tensor) and x.dim() else x for x in rows]
    if not any(isinstance(row, Sequence) for row in rows):
        rows = [rows]
    for index, row in enumerate(rows):
        where = f"Documents: {name} of batch row {index}"
        if not isinstance(row, Sequence) or len(row) < 2 or not all(isinstance(x, Integral) for x in row) or row[0]:
            raise ValueError(f"{where} is {_short(row)}, expected integers that start at 0 and end at the length")
        for left, right in pairwise(row):
            if right < left or (right == left and not may_be_empty):
                raise ValueError(f"{where} goes from {left} to {right}, expected increasing cumulative lengths")
    return tuple(tuple(int(x) for x in row) for row in rows)


def _short(row: object) -> str:
    if not isinstance(row, Sequence) or len(row) <= 6:
        return repr(row)
    return f"[{', '.join(map(repr, row[:3]))}, ..., {row[-1]!r}]"
