"""Reach looks at few queries, and finds what looking at each of them finds."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar import Causal, Chunked, Documents, Mask, PrefixLM, SlidingWindow
from seqpar.layouts import resolve_layout
from seqpar.parts import Part
from seqpar.reach import reach


@st.composite
def masks(draw: st.DrawFn, length: int) -> Mask:
    """Masks whose bounds bend and jump often."""
    size = st.integers(1, 40)
    mask: Mask = draw(
        st.sampled_from([Causal(), PrefixLM(draw(size)), SlidingWindow(draw(size), draw(st.integers(0, 9)))])
    )
    if draw(st.booleans()):
        mask = mask & Chunked(draw(size))
    if draw(st.booleans()):
        cuts = draw(st.sets(st.integers(1, length - 1), max_size=6))
        mask = mask & Documents(sorted({0, *cuts, length}))
    return mask


@given(st.data())
def test_few_queries_tell_what_all_of_them_reach(data: st.DataObject) -> None:
    length = data.draw(st.integers(8, 200))
    mask = data.draw(masks(length))
    world = data.draw(st.integers(1, 5))
    layout = resolve_layout(
        data.draw(st.sampled_from(["contiguous", "zigzag", "striped"])), mask, length, length, world
    )
    segments, pairs = reach(Part(mask), layout.queries, length, length)
    for rank, queries in enumerate(layout.queries):
        lo, hi = mask.intervals(queries.tensor, length, length)
        seen = torch.zeros(length, dtype=torch.bool)
        for start, end in zip(lo[0].tolist(), hi[0].tolist(), strict=True):
            seen[start:end] = True
        found = torch.zeros(length, dtype=torch.int64)
        for start, end in segments[rank].tolist():
            found[start:end] += 1
        assert torch.equal(found, seen.long()), "some key is missing, not needed, or counted twice"
        assert int(pairs[rank]) == int((hi - lo).sum())
