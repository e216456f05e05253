"""Layouts: every token on exactly one rank, in order, in even shares of tokens and of work."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar import Causal, Documents, Full, Layout, Mask
from seqpar.layouts import LAYOUT_NAMES, as_layout, resolve_layout
from support.strategies import boundaries

sizes = st.integers(1, 9).flatmap(lambda world: st.tuples(st.just(world), st.integers(world, 90)))
PLAIN = ["contiguous", "zigzag", "striped"]
BY_DOCUMENT = ["document_zigzag", "whole_documents"]


def deal(name: str, length: int, world: int, mask: Mask | None = None, kv_length: int | None = None) -> Layout:
    return resolve_layout(name, mask or Full(), length, kv_length or length, world)


def held(layout: Layout, of: str = "queries") -> list[list[int]]:
    return [positions.tensor.tolist() for positions in getattr(layout, of)]


def causal_work(layout: Layout, cu_seqlens: tuple[int, ...]) -> list[int]:
    """Query-key pairs per rank under causal packed documents."""
    bounds = torch.tensor(cu_seqlens)
    work = []
    for positions in layout.queries:
        tokens = positions.tensor
        first = bounds[torch.searchsorted(bounds, tokens, right=True) - 1]
        work.append(int((tokens - first + 1).sum()))
    return work


def test_every_name_is_one_of_these() -> None:
    assert {*PLAIN, *BY_DOCUMENT, "balanced"} == set(LAYOUT_NAMES)


@pytest.mark.parametrize("name", [*PLAIN, "document_zigzag", "balanced"])
def test_every_token_once_sorted_and_near_even(name: str) -> None:
    @given(sizes, st.data())
    def check(size: tuple[int, int], data: st.DataObject) -> None:
        world, length = size
        mask = Causal() & Documents(data.draw(boundaries(length)))
        ranks = held(deal(name, length, world, mask))
        assert len(ranks) == world
        assert sorted(token for tokens in ranks for token in tokens) == list(range(length))
        assert all(tokens == sorted(tokens) for tokens in ranks)
        counts = [len(tokens) for tokens in ranks]
        assert max(counts) - min(counts) <= 1

    check()


@pytest.mark.parametrize("name", [*PLAIN, "document_zigzag"])
def test_keys_are_dealt_alike(name: str) -> None:
    mask = Documents([0, 9, 20], [0, 30, 34])
    layout = deal(name, 20, 3, mask, kv_length=34)
    keys_alone = deal(name, 34, 3, Documents([0, 30, 34]))
    assert layout.keys == keys_alone.queries
    assert layout.queries != layout.keys
    self_attention = deal(name, 20, 3, Documents([0, 9, 20]))
    assert self_attention.keys == self_attention.queries == layout.queries


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_definitions_where_lengths_divide_evenly(world: int) -> None:
    chunk = 4
    length = 2 * world * chunk
    tokens = list(range(length))
    chunks = [tokens[i : i + chunk] for i in range(0, length, chunk)]
    expected = {
        "contiguous": [chunks[2 * rank] + chunks[2 * rank + 1] for rank in range(world)],
        "striped": [tokens[rank::world] for rank in range(world)],
        "zigzag": [chunks[rank] + chunks[2 * world - 1 - rank] for rank in range(world)],
    }
    for name in PLAIN:
        assert held(deal(name, length, world)) == expected[name], name


@given(sizes)
def test_zigzag_is_two_of_2p_near_even_chunks(size: tuple[int, int]) -> None:
    world, length = size
    ranks = held(deal("zigzag", length, world))
    owner = {token: rank for rank, tokens in enumerate(ranks) for token in tokens}
    # Walking along the sequence, the owners are 0 .. P-1, P-1 .. 0, each with length / 2P tokens, rounded either way.
    walk = [owner[token] for token in range(length)]
    top = walk.index(max(walk))
    there, back = walk[:top], walk[top:]
    assert there == sorted(there)
    assert back == sorted(back, reverse=True)
    even = length // (2 * world)
    for rank in range(max(walk)):
        assert {there.count(rank), back.count(rank)} <= {even, even + 1}


@given(st.integers(1, 8), st.integers(1, 12))
def test_zigzag_shares_causal_work_evenly(world: int, chunk: int) -> None:
    length = 2 * world * chunk
    work = causal_work(deal("zigzag", length, world), (0, length))
    assert len(set(work)) == 1


@given(sizes)
def test_zigzag_of_any_length_shares_causal_work_within_a_row_per_chunk(size: tuple[int, int]) -> None:
    world, length = size
    work = causal_work(deal("zigzag", length, world), (0, length))
    assert max(work) - min(work) <= 2 * length  # two chunks, each a token longer or shorter, each token at most a row


@given(st.integers(1, 6), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_document_zigzag_deals_each_document_as_a_zigzag(world: int, chunks: list[int]) -> None:
    lengths = [2 * world * chunk for chunk in chunks]
    cu_seqlens = [0]
    for n in lengths:
        cu_seqlens.append(cu_seqlens[-1] + n)
    ranks = held(deal("document_zigzag", cu_seqlens[-1], world, Documents(cu_seqlens)))
    for first, n in zip(cu_seqlens, lengths, strict=False):
        alone = held(deal("zigzag", n, world))
        inside = [[t - first for t in tokens if first <= t < first + n] for tokens in ranks]
        assert inside == alone


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_document_zigzag_balances_many_short_documents(world: int) -> None:
    lengths = torch.randint(1, 2 * world, (500,), generator=torch.Generator().manual_seed(world))
    cu_seqlens = (0, *lengths.cumsum(0).tolist())
    layout = deal("document_zigzag", cu_seqlens[-1], world, Documents(cu_seqlens))
    work = causal_work(layout, cu_seqlens)
    assert max(work) <= 1.03 * sum(work) / world


def test_explicit_positions_of_any_form_are_one_layout() -> None:
    lists = [[0, 3, 4], [1, 2]]
    layout = as_layout(lists)
    for given_as in (torch.tensor, tuple, partial(torch.tensor, dtype=torch.int32)):
        same = as_layout([given_as(x) for x in lists])
        assert same == layout == Layout.explicit(lists)
        assert same.content == layout.content
    assert as_layout(layout) is layout
    assert resolve_layout(layout, Full(), 5, 5, 2) is layout
    assert held(layout) == held(layout, "keys") == lists


def test_explicit_ranks_may_hold_nothing_and_keys_may_differ() -> None:
    layout = resolve_layout(Layout.explicit([[0, 1], []], [[2], [0, 1]]), Full(), 2, 3, 2)
    assert held(layout) == [[0, 1], []]
    assert held(layout, "keys") == [[2], [0, 1]]


@pytest.mark.parametrize(
    ("layout", "mask", "message"),
    [
        ("diagonal", Full(), "layout: got 'diagonal', expected one of contiguous, zigzag, striped, balanced, "),
        ("document_zigzag", Causal(), "the mask has no Documents, expected Documents with one cu_seqlens"),
        ("document_zigzag", Documents([[0, 6], [0, 2, 6]]), "the mask has Documents of 2 batch rows"),
        ("whole_documents", Causal(), "layout='whole_documents': the mask has no Documents, expected Documents with"),
        ("whole_documents", Documents([0, 6]), "got 1 documents for 2 ranks, expected at least one each; use fewer"),
        ([[0, 1, 2], [3, 4]], Full(), r"hold 5 positions, 5 of them distinct, expected each of 0\.\.5"),
        ([[0, 1, 2], [2, 3, 4]], Full(), "hold 6 positions, 5 of them distinct"),
        ([[0, 1, 2], [3, 4, 6]], Full(), "expected each of"),
        ([[0, 1, 2, 3, 4, 5]], Full(), "positions of queries for 1 ranks, expected 2"),
        ([[0, 1, 2], [5, 4, 3]], Full(), "queries of rank 1 are not 1-D, integer, >= 0 and increasing; sort them"),
        ([[0, 1, 2], [3, 4, 4, 5]], Full(), "rank 1 are not"),
        ([[-1, 1, 2], [3, 4, 5]], Full(), "rank 0 are not"),
        ([torch.tensor([[0, 1, 2]]), [3, 4, 5]], Full(), "rank 0 are not 1-D"),
        (["012", [3, 4, 5]], Full(), "queries of rank 0 are '012', expected integers"),
        (6, Full(), "layout: got 6, expected a name, another plan's .layout, or positions per rank"),
        ([torch.tensor([0.0, 1.0, 2.0]), [3, 4, 5]], Full(), "rank 0 are not 1-D, integer"),
    ],
)
def test_errors_say_what_is_wrong(layout: object, mask: Mask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_layout(as_layout(layout), mask, 6, 6, 2)


@pytest.mark.parametrize("name", [*PLAIN, "balanced"])
def test_fewer_tokens_than_ranks_are_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match="length: got 3 tokens for 4 ranks, expected at least one each; use fewer ranks"
    ):
        deal(name, 3, 4)
    with pytest.raises(ValueError, match="kv_length: got 3 tokens for 4 ranks"):
        deal(name, 4, 4, kv_length=3)
