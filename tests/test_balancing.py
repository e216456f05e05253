"""Layouts that follow the work: equal tokens, near-equal pairs, little to fetch; and documents that stay whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import seqpar
from seqpar import Causal, Documents, Full, Layout, Mask, PrefixLM, SlidingWindow
from seqpar.comm import Traffic, World, run_loopback
from seqpar.itinerary import Itinerary, itinerary
from seqpar.reach import busiest_rows
from support.strategies import mask_cases

TOKENS = 131_072


def log_normal_documents(count: int, length: int, seed: int, spread: float = 1.0) -> Documents:
    drawn = np.random.default_rng(seed).lognormal(0.0, spread, count)
    sizes = np.maximum(1, (drawn / drawn.sum() * length).astype(int))
    sizes[-1] += length - sizes.sum()
    return Documents([0, *np.cumsum(sizes).tolist()])


def plan_of(mask: Mask, layout: str | Layout, world: int, length: int = TOKENS) -> Itinerary:
    return itinerary(mask, layout, seqpar.Ring("direct"), length, length, world, 0)


def imbalance(work: Itinerary) -> float:
    """The busiest rank's pairs over the mean."""
    return float(work.pairs.max() / work.pairs.double().mean())


@given(st.integers(1, 6).flatmap(lambda world: st.tuples(st.just(world), mask_cases(min_length=world))), st.data())
def test_any_mask_is_dealt_once_and_evenly_to_one_chunk(case: tuple, data: st.DataObject) -> None:
    world, mask = case
    chunk = data.draw(st.integers(1, mask.length // world))
    if mask.kv_length < world:
        return
    layout = Layout.balanced(mask.mask, length=mask.length, kv_length=mask.kv_length, world=world, chunk=chunk)
    for held, total in ((layout.queries, mask.length), (layout.keys, mask.kv_length)):
        ranks = [positions.tensor for positions in held]
        assert torch.equal(torch.cat(ranks).sort().values, torch.arange(total))
        assert all((tokens.diff() > 0).all() for tokens in ranks)
    counts = [len(positions) for positions in layout.queries]
    assert max(counts) - min(counts) <= chunk
    assert min(counts) > 0


@pytest.mark.parametrize("seed", range(5))
def test_packed_documents_of_log_normal_lengths(seed: int) -> None:
    mask = Causal() & log_normal_documents(64, TOKENS, seed)
    balanced, zigzag, by_document = (plan_of(mask, layout, 8) for layout in ("balanced", "zigzag", "document_zigzag"))
    print(f"64 documents over 8 ranks: balanced {imbalance(balanced):.3f}, zigzag {imbalance(zigzag):.3f}")
    assert imbalance(balanced) <= 1.03 < imbalance(zigzag)
    assert busiest_rows(balanced.needed) < 0.6 * busiest_rows(by_document.needed)


@pytest.mark.parametrize("world", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("layout", ["zigzag", "balanced"])
def test_causal_work_is_even(layout: str, world: int) -> None:
    for length in (TOKENS, TOKENS - 77):
        assert imbalance(plan_of(Causal(), layout, world, length)) <= 1.02


@pytest.mark.parametrize(
    "mask",
    [
        PrefixLM(40_000),
        Full() & log_normal_documents(64, TOKENS, 0),
        Causal() & log_normal_documents(7, TOKENS, 0, 2.0),
    ],
    ids=["prefix", "full documents", "few documents"],
)
def test_other_masks_are_even_too(mask: Mask) -> None:
    assert imbalance(plan_of(mask, "balanced", 8)) <= 1.03 < imbalance(plan_of(mask, "zigzag", 8))


def test_what_is_even_already_stays_in_order() -> None:
    """A window: every rank fetches one halo, not the two of zigzag."""
    layout = plan_of(SlidingWindow(4095), "balanced", 8).layout
    assert layout.queries == plan_of(SlidingWindow(4095), "contiguous", 8).layout.queries


@pytest.mark.parametrize("chunk", [0, 5, "many", 2.5])
def test_chunks_that_do_not_fit_are_refused(chunk: object) -> None:
    with pytest.raises(ValueError, match=r"chunk: got .*, expected 1 \.\. 4 tokens, so that each of 2 ranks gets one"):
        Layout.balanced(Causal(), length=9, world=2, chunk=chunk)  # type: ignore[arg-type]


def test_whole_documents_send_nothing() -> None:
    """The longest first, to the rank with the fewest tokens; and attention is right, with nothing to fetch."""
    documents = Documents([0, 20, 31, 45, 61])
    q, k, v = (torch.randn(1, 61, 2, 8, dtype=torch.float64) for _ in range(3))
    alone = seqpar.attention(q, k, v, seqpar.plan(Causal() & documents, length=61))

    def job(world: World) -> tuple[dict[str, Traffic], torch.Tensor, int]:
        plan = seqpar.plan(Causal() & documents, length=61, group=world, layout="whole_documents")
        world.meter.reset()
        leaves = [plan.shard(x).requires_grad_() for x in (q, k, v)]
        out = seqpar.attention(*leaves, plan)
        out.sum().backward()
        return dict(world.meter.by_kind), plan.unshard(out.detach()), len(plan.queries)

    results = run_loopback(3, job)
    assert [count for *_, count in results] == [20, 16, 25]
    for sent, out, _ in results:
        assert set(sent) == {"agree"}
        torch.testing.assert_close(out, alone, rtol=1e-12, atol=1e-12)
