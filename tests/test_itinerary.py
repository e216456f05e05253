"""What every rank computes, receives and sends, worked out without any ranks, against the dense mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import seqpar
from seqpar import AllGather, Causal, Documents, DoubleRing, Full, Mask, Ring, SlidingWindow
from seqpar.itinerary import Itinerary, itinerary, ring_order
from support.cases import MaskCase
from support.strategies import mask_cases

LAYOUTS = ("contiguous", "zigzag", "striped", "document_zigzag", "explicit")
EXCHANGES = ("forward", "direct", "gather")


class Case(NamedTuple):
    """A mask over ranks, and every rank's itinerary."""

    mask: MaskCase
    ranks: list[Itinerary]

    @property
    def world(self) -> int:
        return len(self.ranks)


def itineraries(
    mask: Mask,
    layout: str | seqpar.Layout,
    world: int,
    length: int,
    kv_length: int | None = None,
    exchange: str = "auto",
) -> list[Itinerary]:
    schedule = AllGather() if exchange == "gather" else Ring(exchange)
    return [itinerary(mask, layout, schedule, length, kv_length or length, world, rank) for rank in range(world)]


@st.composite
def cases(draw: Callable, exchange: str) -> Case:
    """Any mask over any layout; explicit ones deal tokens at random, unevenly, to some ranks perhaps none."""
    world = draw(st.integers(1, 5))
    case = draw(mask_cases(min_length=world))
    documents = case.mask.documents
    names = [n for n in LAYOUTS if n != "document_zigzag" or (documents is not None and len(documents.queries) == 1)]
    layout = draw(st.sampled_from(names))
    if layout == "explicit":

        def deal(total: int) -> list[list[int]]:
            owners = draw(st.lists(st.integers(0, world - 1), min_size=total, max_size=total))
            return [[token for token, owner in enumerate(owners) if owner == rank] for rank in range(world)]

        layout = seqpar.Layout.explicit(deal(case.length), deal(case.kv_length))
    return Case(case, itineraries(case.mask, layout, world, case.length, case.kv_length, exchange))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_all_ranks_together_compute_every_pair_once(exchange: str) -> None:
    @given(cases(exchange))
    def check(case: Case) -> None:
        computed = torch.zeros(case.mask.dense().shape, dtype=torch.int64)
        for work in case.ranks:
            sources = [(work.rank - t) % case.world for t in range(case.world)]
            together = [work.rank, *([None] if case.world > 1 else [])]
            assert [block.source for block in work.blocks] == (together if exchange == "gather" else sources)
            for block in work.blocks:
                start, end = (bound.squeeze(1) for bound in (block.intervals.start, block.intervals.end))
                assert start.dtype == end.dtype == torch.int32
                assert (start >= 0).all()
                assert (end <= len(block.keys)).all()
                assert (start.diff(dim=1) >= 0).all()
                assert (end.diff(dim=1) >= 0).all()
                key = torch.arange(len(block.keys))
                local = (key >= start.unsqueeze(-1)) & (key < end.unsqueeze(-1))
                computed[:, work.queries.tensor.unsqueeze(1), block.keys.tensor] += local
                assert block.pairs == local.sum()
        assert torch.equal(computed, case.mask.dense().long())

    check()


def needed_keys(case: Case, reader: int, owner: int) -> list[int]:
    """The global keys of ``owner`` that some query of ``reader`` sees, in some batch row."""
    seen = case.mask.dense().any(0)[case.ranks[reader].queries.tensor].any(0)
    return [key for key in case.ranks[owner].keys.tensor.tolist() if seen[key]]


@given(cases("direct"))
def test_direct_sends_what_arrives_and_only_what_is_seen(case: Case) -> None:
    for reader in case.ranks:
        for block in reader.blocks[1:]:
            sender = case.ranks[block.source]
            rows = sender.sent_rows[reader.rank]
            sent = sender.keys.tensor if rows is None else sender.keys.tensor[rows]
            assert block.keys.tensor.tolist() == sent.tolist() == needed_keys(case, reader.rank, block.source)
        assert reader.blocks[0].keys == reader.keys


@given(cases("gather"))
def test_gathering_brings_all_others_in_order(case: Case) -> None:
    for reader in case.ranks:
        for block in reader.blocks[1:]:
            gathered = torch.full((len(block.keys),), -1)
            for owner in case.ranks:
                if owner is not reader:
                    gathered[reader.places[owner.rank]] = owner.keys.tensor
            assert torch.equal(gathered, block.keys.tensor)


@given(cases("forward"))
def test_forward_brings_every_shard_whole(case: Case) -> None:
    for reader in case.ranks:
        assert [block.keys for block in reader.blocks] == [case.ranks[block.source].keys for block in reader.blocks]


def test_a_double_ring_goes_around_each_node_before_the_next() -> None:
    assert ring_order(4, world=6, inside=3) == [4, 3, 5, 1, 0, 2]
    assert ring_order(3, world=6, inside=2) == [3, 2, 1, 0, 5, 4]
    assert ring_order(2, world=4, inside=4) == ring_order(2, world=4, inside=1) == [2, 1, 0, 3]


@pytest.mark.parametrize(("world", "inside"), [(6, 3), (6, 2), (8, 4), (4, 1)])
def test_a_double_ring_sends_as_much_as_a_ring_and_little_of_it_between_nodes(world: int, inside: int) -> None:
    ranks = [itinerary(Causal(), "zigzag", DoubleRing(inside), 97, 97, world, rank) for rank in range(world)]
    for rank, work in enumerate(ranks):
        near, far = ranks[rank - rank % inside + (rank + 1) % inside], ranks[(rank + inside) % world]
        arriving = [len(block.keys) for n, block in enumerate(near.blocks) if n % inside]
        arriving += [len(block.keys) for n, block in enumerate(far.blocks) if n and n % inside == 0]
        assert work.messages(rank, grads=False) == arriving
        assert len(arriving) == world - 1
        assert work.messages(rank, grads=True) == [len(block.keys) for block in work.blocks[1:]]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_totals_of_all_ranks_are_known_to_each(exchange: str) -> None:
    @given(cases(exchange))
    def check(case: Case) -> None:
        ranks = range(case.world)
        needed = [[len(needed_keys(case, reader, owner)) for owner in ranks] for reader in ranks]
        pairs = [int(case.mask.dense()[:, work.queries.tensor].sum()) for work in case.ranks]
        for work in case.ranks:
            assert work.needed.tolist() == needed
            assert work.pairs.tolist() == pairs

    check()


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_messages_are_the_blocks_that_travel(exchange: str) -> None:
    @given(cases(exchange))
    def check(case: Case) -> None:
        def rows(blocks) -> list[int]:  # type: ignore[no-untyped-def]
            return [len(block.keys) for block in blocks if len(block.keys)]

        for rank, work in enumerate(case.ranks):
            others = [case.ranks[(rank - t) % case.world] for t in range(1, case.world)]
            sent, returned = [], work.blocks[1:]
            if exchange == "forward":
                sent = case.ranks[(rank + 1) % case.world].blocks[1:]  # all that the next rank gets comes from here
            elif exchange == "direct":
                sent = [case.ranks[(rank + t) % case.world].blocks[t] for t in range(1, case.world)]
                returned = [case.ranks[rank].blocks[case.world - t] for t in range(1, case.world)]
            else:
                sent, returned = [work] * (case.world - 1), others
            for known_to in case.ranks:
                assert known_to.messages(rank, grads=False) == rows(sent)
                assert known_to.messages(rank, grads=True) == rows(returned)

    check()


def rows_moved(ranks: list[Itinerary]) -> list[int]:
    """Rows that each rank sends in a forward pass."""
    return [sum(ranks[0].messages(rank, grads=False)) for rank in range(len(ranks))]


def busiest(ranks: list[Itinerary]) -> int:
    """The most rows that a rank sends, or receives."""
    received = [sum(len(block.keys) for block in work.blocks[1:]) for work in ranks]
    return max(*received, *rows_moved(ranks))


def test_a_sliding_window_moves_only_its_halo() -> None:
    world, length, window = 4, 32_768, 1_024
    mask = SlidingWindow(window - 1)  # of 1,024 tokens, the query's own among them

    contiguous = itineraries(mask, "contiguous", world, length)
    assert contiguous[0].exchange == "direct"
    assert rows_moved(contiguous) == [window - 1] * (world - 1) + [0]
    for work in contiguous[1:]:
        first = int(work.queries.tensor[0])
        assert work.blocks[1].keys.tensor.tolist() == list(range(first - window + 1, first))

    zigzag = itineraries(mask, "zigzag", world, length)
    assert zigzag[0].exchange == "direct"
    # Of the 2P - 1 borders between chunks, the middle one lies inside the last rank.
    assert sum(rows_moved(zigzag)) == (2 * world - 2) * (window - 1)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("grads", [False, True], ids=["kv", "grads"])
def test_direct_moves_a_quarter_less_on_causal_zigzag(world: int, grads: bool) -> None:
    length = 2 * world * 16
    forward, direct = (itineraries(Causal(), "zigzag", world, length, exchange=e)[0] for e in ("forward", "direct"))
    ring, less = (sum(sum(work.messages(rank, grads=grads)) for rank in range(world)) for work in (forward, direct))
    assert ring == (world - 1) * length
    assert 4 * less == 3 * ring


@pytest.mark.parametrize(
    ("mask", "layout", "world", "expected"),
    [
        pytest.param(Full(), "contiguous", 1, "direct", id="one-rank"),
        pytest.param(Full(), "zigzag", 2, "direct", id="two-ranks-one-wire"),
        pytest.param(Full(), "zigzag", 3, "forward", id="full-needs-everything"),
        pytest.param(Causal(), "zigzag", 4, "forward", id="causal-zigzag-busiest-rank-alike"),
        pytest.param(Causal(), "contiguous", 4, "forward", id="causal-contiguous-last-rank-needs-all"),
        pytest.param(SlidingWindow(8), "contiguous", 4, "direct", id="window-halo"),
        pytest.param(SlidingWindow(8), "striped", 4, "forward", id="window-striped-needs-all"),
        pytest.param(Causal() & Documents([0, 16, 32, 48, 64]), "contiguous", 4, "direct", id="documents-one-a-rank"),
    ],
)
def test_auto_spares_the_busiest_rank(mask: Mask, layout: str, world: int, expected: str) -> None:
    assert {work.exchange for work in itineraries(mask, layout, world, length=64)} == {expected}
    if world > 2:
        moved = (itineraries(mask, layout, world, length=64, exchange=e) for e in ("forward", "direct"))
        forward, direct = map(busiest, moved)
        assert expected == ("direct" if direct < forward else "forward")


def test_documents_on_a_rank_each_send_nothing() -> None:
    ranks = itineraries(Causal() & Documents([0, 16, 32, 48, 64]), "contiguous", 4, 64)
    assert rows_moved(ranks) == [0] * 4
    assert [block.pairs for block in ranks[2].blocks] == [16 * 17 // 2, 0, 0, 0]


def test_worked_out_once_for_equal_arguments() -> None:
    def ask(mask: Mask, rank: int = 0) -> Itinerary:
        return itinerary(mask, "zigzag", Ring(), 20, 20, 2, rank)

    assert ask(Causal() & Documents([0, 5, 20])) is ask(Causal() & Documents(torch.tensor([0, 5, 20])))
    assert ask(Causal()) is not ask(Causal(), rank=1)
    assert ask(Causal()) is not ask(Causal() & Documents([0, 5, 20]))


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="batch row 0 ends at 9, expected 10"):
        itineraries(Documents([0, 9]), "zigzag", 2, 10)
