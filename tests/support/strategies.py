"""Random masks and where they hold, for hypothesis: every mask, alone and combined, over every kind of documents."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import and_

from hypothesis import strategies as st

from seqpar import Causal, Chunked, Documents, Full, Mask, PrefixLM, SlidingWindow

from .cases import MaskCase
from .oracle import Sees

Term = tuple[Mask, Sees]


def _window(left: int, right: int) -> Term:
    def sees(i: int, j: int, n: int, m: int) -> bool:
        after = j - (i + m - n)
        return (left < 0 or -after <= left) and (right < 0 or after <= right)

    return SlidingWindow(left, right), sees


def _prefix(prefix: int) -> Term:
    return PrefixLM(prefix), lambda i, j, n, m: j < prefix or j <= i + m - n


def _chunked(size: int) -> Term:
    return Chunked(size), lambda i, j, n, m: j // size == (i + m - n) // size


TERMS: dict[str, st.SearchStrategy[Term]] = {
    "full": st.just((Full(), lambda i, j, n, m: True)),
    "causal": st.just((Causal(), lambda i, j, n, m: j <= i + m - n)),
    "window": st.builds(_window, st.integers(-1, 9), st.integers(-1, 5)),
    "prefix": st.builds(_prefix, st.integers(0, 9)),
    "chunked": st.builds(_chunked, st.integers(1, 9)),
}
terms = st.one_of(*TERMS.values())


@st.composite
def boundaries(
    draw: Callable, length: int, documents: int | None = None, *, may_be_empty: bool = False
) -> tuple[int, ...]:
    """cu_seqlens ``(0, ..., length)``, of ``documents`` documents if given."""
    if may_be_empty:
        inner = st.lists(st.integers(0, length), min_size=documents - 1, max_size=documents - 1)
    else:
        inner = st.lists(st.integers(1, length - 1), max_size=5, unique=True) if length > 1 else st.just([])
    return (0, *sorted(draw(inner)), length)


@st.composite
def mask_cases(draw: Callable, min_length: int = 1, max_length: int = 20) -> MaskCase:
    """One to three masks in any order, over one sequence, packed documents, batch rows of them, or cross-attention."""
    parts = draw(st.lists(terms, min_size=1, max_size=3))
    lengths = st.integers(min_length, max_length)
    length = kv_length = draw(lengths)
    cu_q: tuple[tuple[int, ...], ...] = ()
    cu_k: tuple[tuple[int, ...], ...] = ()
    kind = draw(st.sampled_from(["whole", "cross", "documents", "rows", "cross_documents", "cross_rows"]))
    if kind.startswith("cross"):
        kv_length = draw(lengths)
    if kind in ("documents", "rows"):
        rows = 1 if kind == "documents" else draw(st.integers(1, 3))
        cu_q = tuple(draw(boundaries(length)) for _ in range(rows))
    elif kind in ("cross_documents", "cross_rows"):
        rows = 1 if kind == "cross_documents" else draw(st.integers(1, 3))
        counts = [draw(st.integers(1, 4)) for _ in range(rows)]
        cu_q = tuple(draw(boundaries(length, count, may_be_empty=True)) for count in counts)
        cu_k = tuple(draw(boundaries(kv_length, count, may_be_empty=True)) for count in counts)
    masks = [mask for mask, _ in parts]
    if cu_q:
        one = len(cu_q) == 1 and draw(st.booleans())  # a single cu_seqlens may be given bare
        given = (cu[0] if one else list(cu) for cu in ((cu_q, cu_k) if cu_k else (cu_q,)))
        masks.insert(draw(st.integers(0, len(masks))), Documents(*given))

    def sees(i: int, j: int, n: int, m: int) -> bool:
        return all(allowed(i, j, n, m) for _, allowed in parts)

    return MaskCase(reduce(and_, masks), sees, length, kv_length, cu_q, cu_k)
