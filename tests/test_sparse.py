"""Masks that differ by head, S2 attention above all, against brute force: results, need sets, bytes, work, refusals."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import seqpar
from seqpar import (
    Causal,
    Chunked,
    Documents,
    Full,
    Mask,
    PerHead,
    PrefixLM,
    Ring,
    SinkWindow,
    SlidingWindow,
    SparselySharded,
)
from seqpar.choosing import work_of
from seqpar.comm import World, run_loopback
from seqpar.costs import Call, cost
from seqpar.itinerary import Itinerary, itinerary
from seqpar.layouts import resolve_layout
from seqpar.sections import Block, Section
from seqpar.selections import Consecutive, Picked
from support.cases import MASKS, SCHEDULES, MaskCase, s2, tensors
from support.jobs import attend
from support.oracle import HeadSees, dense_attention, error

LENGTH = 203
DOCUMENTS = [0, 61, 64, 150, 203]
BATCH_DOCUMENTS = [[0, 203], [0, 50, 51, 177, 203]]
HEADS = (8, 4)


def both(one: tuple[Mask, HeadSees], mask: Mask, sees: Any) -> tuple[Mask, HeadSees]:
    return one[0] & mask, lambda i, j, n, m, h, kv: one[1](i, j, n, m, h, kv) and sees(i, j)


def rows(*documents: list[int]) -> dict[str, Any]:
    return {"length": LENGTH, "kv_length": LENGTH, "cu_q": tuple(map(tuple, documents))}


def packed(one: tuple[Mask, HeadSees], *documents: list[int]) -> MaskCase:
    return MaskCase(one[0] & Documents(list(documents)), one[1], **rows(*documents))


def whole(one: tuple[Mask, HeadSees], length: int = LENGTH) -> MaskCase:
    return MaskCase(*one, length=length, kv_length=LENGTH)


def a_few_masks(head: int) -> Mask:
    return (Causal(), SlidingWindow(20), SinkWindow(5, 30), SinkWindow(5, 30))[head % 4]


def sees_a_few(i: int, j: int, n: int, m: int, head: int, kv_heads: int) -> bool:
    return j <= i and (True, i - j <= 20, j < 5 or i - j < 30, j < 5 or i - j < 30)[head % 4]


CASES = {
    "two local blocks": whole(s2(16, 2, 4)),
    "one local block": whole(s2(32, 1, 3)),
    "all blocks local": whole(s2(16, 20, 4)),
    "stride 1": whole(s2(16, 2, 1)),
    "a dense head": whole(s2(16, 3, 3, dense=1)),
    "dense heads alone": whole(s2(16, 3, 3, dense=4)),
    "offsets": whole(s2(16, 1, 4, offsets=(3, 0, 2, 2))),
    "offsets and a dense head": whole(s2(16, 1, 4, dense=1, offsets=(3, 0, 2))),
    "documents": packed(s2(16, 2, 4), DOCUMENTS),
    "documents by row": packed(s2(16, 1, 3), *BATCH_DOCUMENTS),
    "within a window": whole(both(s2(16, 1, 2), SlidingWindow(100), lambda i, j: i - j <= 100)),
    "within chunks": whole(both(s2(16, 1, 2), Chunked(90), lambda i, j: i // 90 == j // 90)),
    "the last queries": whole(s2(16, 2, 4), length=9),
    "a mask per head": packed((PerHead([a_few_masks(h) for h in range(4)]), sees_a_few), DOCUMENTS),
    "within sinks": whole(both(s2(16, 1, 2), SinkWindow(20, 40), lambda i, j: j < 20 or i - j < 40)),
}
WAYS = [
    *(("direct", layout, world) for layout in ("zigzag", "explicit") for world in (1, 2, 3, 4)),
    *(
        (schedule, layout, world)
        for schedule, layout in (("forward", "striped"), ("ulysses", "balanced"))
        for world in (2, 3)
    ),
    ("hybrid", "contiguous", 4),
]


@pytest.mark.parametrize(("schedule", "layout", "world"), WAYS)
@pytest.mark.parametrize("name", CASES)
def test_exact(name: str, schedule: str, layout: str, world: int) -> None:
    """Outputs, lse and every gradient, sinks among them; fp64, and fp32 for the direct exchange."""
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5))[: 1 + (schedule == "direct")]:
        assert_exact(CASES[name], HEADS, schedule, layout, world, dtype, bound)


@pytest.mark.parametrize("heads", [(4, 4), (5, 5), (12, 2), (7, 1), (15, 5)], ids=str)
@pytest.mark.parametrize(("schedule", "world"), [("direct", 3), ("ulysses", 2), ("ulysses", 3), ("hybrid", 4)])
def test_heads_dealt_unevenly_keep_their_stripes(schedule: str, world: int, heads: tuple[int, int]) -> None:
    """In Ulysses a rank has some of the heads, some more than once for kernels: their residues are global."""
    case = whole(s2(16, 1, 3, dense=1))
    assert_exact(case, heads, schedule, "zigzag", world, torch.float64, 1e-10)


@pytest.mark.parametrize("schedule", ["ulysses", "hybrid"])
@pytest.mark.parametrize("heads", [(8, 2), (15, 5)], ids=str)
def test_repeated_heads_of_several_calls(heads: tuple[int, int], schedule: str) -> None:
    """A window and its sinks read the same rows in two calls, whose gradients add up."""
    case = MaskCase(SinkWindow(30, 40), lambda i, j, n, m: j <= i and (j < 30 or i - j < 40), LENGTH, LENGTH)
    assert_exact(case, heads, schedule, "contiguous", {"ulysses": 3, "hybrid": 4}[schedule], torch.float64, 1e-10)


def assert_exact(
    case: MaskCase, heads: tuple[int, int], schedule: str, layout: str, world: int, dtype: torch.dtype, bound: float
) -> None:
    inputs = tensors(case, heads, dtype, value_dim=8)
    leaves = {name: inputs[name].double().requires_grad_() for name in ("q", "k", "v", "sinks")}
    out, lse = dense_attention(*list(leaves.values())[:3], case.dense_of(*heads), leaves["sinks"])
    objective = (out * inputs["dout"]).sum() + (lse * inputs["dlse"]).sum()
    expected = dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))
    expected |= {"out": out.detach(), "lse": lse.detach()}
    with patch.dict(MASKS, case=case):
        job = partial(attend, schedule=SCHEDULES[schedule], sinks=True, lse=True)
        for result in run_loopback(world, job, "case", layout, inputs):
            errors = {name: error(result[name], x) for name, x in expected.items()}
            assert max(errors.values()) <= bound, errors


def works(case: MaskCase, schedule: Any, layout: str, world: int, heads: tuple[int, int] = HEADS) -> list[Itinerary]:
    mask = case.of(heads[1])
    held = resolve_layout(layout, mask, case.length, case.kv_length, world, heads[1])
    return [work_of(schedule, mask, held, case.length, case.kv_length, world, rank, heads) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("schedule", ["direct", "allgather"])
@pytest.mark.parametrize("name", CASES)
def test_all_ranks_together_compute_every_pair_once(name: str, schedule: str, world: int) -> None:
    dense = CASES[name].dense_of(4, 4)
    computed = torch.zeros(dense.shape, dtype=torch.int64)
    ranks = works(CASES[name], SCHEDULES[schedule], "zigzag", world)
    for work in ranks:
        for block in work.blocks:
            there = head_of_each_row(ranks, work, block).expand(len(dense), -1, -1, -1)
            for section in block.sections:
                compute(computed, work, section, section.keys.take(there).long())
        sections = [section for block in work.blocks for section in block.sections]
        mine = int(dense[:, :, work.queries.tensor].sum())
        assert sum(section.pairs for section in sections) == int(work.pairs[work.rank]) == mine
        assert sum(section.final for section in sections) <= len(work.groups)
    assert torch.equal(computed, dense.long())


def head_of_each_row(ranks: list[Itinerary], work: Itinerary, block: Block) -> Tensor:
    """``[1, rows, heads, (key, head)]``: what arrives, of all heads in every row or of one."""
    if block.keys is not None:
        pairs = torch.meshgrid(block.keys.tensor, torch.arange(4), indexing="ij")
        return torch.stack(pairs, -1)[None].double()
    assert block.source is not None
    rows = ranks[block.source].sent_rows[work.rank]
    assert rows is not None
    return torch.stack([ranks[block.source].keys.tensor[rows // 4], rows % 4], -1).view(1, -1, 1, 2).double()


def compute(computed: Tensor, work: Itinerary, section: Section, taken: Tensor) -> None:
    """Count the pairs of a kernel call in ``computed [rows, heads, queries, keys]``; ``taken [rows, R, n, 2]``."""
    heads = work.groups[section.group].heads
    assert heads is not None
    for row in range(len(computed)):
        bounds = [
            x[row % len(x)].expand(len(heads), -1).tolist() for x in (section.intervals.start, section.intervals.end)
        ]
        for n, (head, starts, ends) in enumerate(zip(heads, *bounds, strict=True)):
            for query, start, end in zip(work.queries.tensor.tolist(), starts, ends, strict=True):
                keys, of_head = taken[row, start:end, n].unbind(-1)
                assert (of_head == head).all()
                computed[row, head, query, keys] += 1


@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
@pytest.mark.parametrize("name", CASES)
def test_a_direct_exchange_sends_each_head_only_what_some_query_of_the_receiver_sees(name: str, layout: str) -> None:
    """Where batch rows have stripes of their own, the keys between the first and the last of them."""
    case = CASES[name]
    ranks = works(case, Ring("direct"), layout, 3)
    exact = len(case.cu_q) <= 1
    for reader in ranks:
        for block in reader.blocks[1:]:
            sender = ranks[block.source]
            sent = sender.sent_rows[reader.rank]
            assert sent is not None
            seen = case.dense_of(4, 4).any(0)[:, reader.queries.tensor].any(1)[:, sender.keys.tensor]  # [heads, keys]
            needed = torch.cat([row.nonzero().squeeze(1) * 4 + head for head, row in enumerate(seen)])
            assert block.rows == len(sent) == int(reader.needed[reader.rank, sender.rank])
            assert torch.equal(sent, needed) if exact else set(needed.tolist()) <= set(sent.tolist())


@st.composite
def sparse_cases(draw: st.DrawFn) -> MaskCase:
    """Any S2 mask over any documents, alone or within a window."""
    length = draw(st.integers(20, 150))
    stride, dense = draw(st.integers(1, 5)), draw(st.integers(0, 2))
    offsets = draw(st.none() | st.tuples(*[st.integers(0, stride - 1)] * (4 - dense)))
    one = s2(16, draw(st.integers(1, 4)), stride, dense, offsets)
    if draw(st.booleans()):
        left = draw(st.integers(0, 120))
        one = both(one, SlidingWindow(left), lambda i, j: i - j <= left)
    cuts = draw(st.lists(st.sets(st.integers(1, length - 1), max_size=4), min_size=1, max_size=2))
    documents = tuple((0, *sorted(cut), length) for cut in cuts)
    return MaskCase(one[0] & Documents(list(documents)), one[1], length, length, documents)


@given(sparse_cases(), st.integers(1, 4), st.sampled_from(["zigzag", "striped", "contiguous"]))
def test_few_queries_tell_what_all_reach(case: MaskCase, world: int, layout: str) -> None:
    dense = case.dense_of(4, 4)
    ranks = works(case, Ring("direct"), layout, world)
    for work in ranks:
        assert work.pairs.tolist() == [int(dense[:, :, w.queries.tensor].sum()) for w in ranks]
        for owner in ranks:
            seen = dense.any(0)[:, work.queries.tensor].any(1)[:, owner.keys.tensor]
            needed = int(work.needed[work.rank, owner.rank])
            assert needed == int(seen.sum()) if len(case.cu_q) == 1 else needed >= int(seen.sum())


def test_stripes_alone_are_used_where_they_arrive() -> None:
    """From ranks far away come stripes alone, in order: no copy; from the neighbour the band's rows too."""
    mask, length = SparselySharded(16, 2, 4), 16 * 4 * 8 * 2
    work = itinerary(mask, "contiguous", Ring("direct"), length, length, 8, 7, 4)
    selections = {b.source: [type(s.keys) for s in b.sections] for b in work.blocks[1:]}
    assert selections.pop(6) == [Picked, Picked]
    assert list(selections.values()) == [[Consecutive]] * 6


@pytest.mark.parametrize("schedule", ["direct", "forward", "allgather", "double_ring"])
def test_a_shard_with_a_single_striped_key(schedule: str) -> None:
    """Rows of all heads are no rows of one head, also where consecutive numbers are those of one key's heads."""
    case = MaskCase(*s2(16, 1, 3, offsets=(2, 2)), length=80, kv_length=80)
    held = [[0, 32, 48], [*range(1, 32)], [*range(33, 48)], [*range(49, 80)]]
    inputs = tensors(case, (2, 2), torch.float64, value_dim=8)
    leaves = [inputs[name].requires_grad_() for name in "qkv"]
    out, _ = dense_attention(*leaves, case.dense_of(2, 2))
    expected = [out.detach(), *torch.autograd.grad(out, leaves, inputs["dout"])]

    def job(w: World) -> list[Tensor]:
        plan = seqpar.plan(case.of(2), length=80, group=w, layout=held, schedule=SCHEDULES[schedule], heads=2)
        whole = [inputs[name].detach().clone().requires_grad_() for name in "qkv"]
        got = plan.unshard(seqpar.attention(*(plan.shard(x) for x in whole), plan))
        return [got.detach(), *torch.autograd.grad(got, whole, inputs["dout"])]

    for results in run_loopback(4, job):
        assert max(error(x, y) for x, y in zip(results, expected, strict=True)) <= 1e-10


@pytest.mark.parametrize("inner", [Ring("direct"), Ring("forward"), seqpar.AllGather()], ids=str)
def test_ranks_that_are_dealt_no_heads(inner: Any) -> None:
    case = whole(s2(16, 1, 2))
    with patch.dict(SCHEDULES, few=seqpar.Ulysses(inner, degree=4)):
        assert_exact(case, (2, 2), "few", "zigzag", 8, torch.float64, 1e-10)


def test_auto_chooses_for_masks_that_differ_by_head() -> None:
    rates = seqpar.Rates(
        forward=6e14, backward=5e14, call=1e-5, backward_call=2e-5, copy=1e12, bandwidth=1e9, latency=1e-5, overlap=1.0
    )
    case = packed(s2(16, 2, 4), DOCUMENTS)
    with patch.dict(SCHEDULES, auto=seqpar.Auto(rates)):
        inputs = tensors(case, HEADS, torch.float64)
        out, _ = dense_attention(*(inputs[name] for name in "qkv"), case.dense_of(*HEADS))

        def job(w: World) -> tuple[Tensor, str]:
            plan = seqpar.plan(
                case.of(4), length=LENGTH, group=w, schedule=SCHEDULES["auto"], layout="auto", heads=HEADS, head_dim=16,
                dtype=torch.float64,
            )  # fmt: skip
            local = seqpar.attention(*(plan.shard(inputs[name]) for name in "qkv"), plan)
            return plan.unshard(local), plan.explain()

        for got, text in run_loopback(3, job):
            assert error(got, out) <= 1e-10
            assert "rows of one KV head each" in text


def test_explain_counts_rows_of_one_head() -> None:
    """The same unit in every step: this rank's 32 tokens have 4 heads each; of the others' some are needed."""

    def job(w: World) -> tuple[str, int]:
        plan = seqpar.plan(SparselySharded(16, 1, 4), length=64, group=w, layout="contiguous", heads=4)
        return plan.explain(), int(plan.work.needed[1, 0])

    text, needed = run_loopback(2, job)[1]
    header, own, other = text.splitlines()[-3:]
    assert header.endswith("pairs, rows of one KV head each")
    assert own.split()[:3] == ["0", "1", "128"]
    assert other.split()[:3] == ["1", "0", str(needed)]


def test_the_predicted_cost_of_memory_by_hand() -> None:
    """Rows that arrive are of one head each, this rank's own of all: where copying alone takes time."""
    rates = seqpar.Rates(
        forward=1e30,
        backward=1e30,
        call=1e-30,
        backward_call=1e-30,
        copy=1.0,
        bandwidth=1e30,
        latency=1e-30,
        overlap=1.0,
    )
    mask, schedule = SparselySharded(16, 1, 4), Ring("direct")
    held = resolve_layout("contiguous", mask, 64, 64, 2, 4)
    work = work_of(schedule, mask, held, 64, 64, 2, 1, (4, 4))
    predicted = cost(schedule, held, work, Call(4, 4, 8, 8, torch.float32, "cuda"), rates, 1)
    row, arriving = (8 + 8) * 4, int(work.needed[1, 0])
    assert 0 < arriving < 32 * 4
    assert predicted.forward == pytest.approx(2 * arriving * row)
    assert predicted.backward == pytest.approx(2 * arriving * row + 3 * (32 * 4 + arriving) * row + 2 * arriving * row)


def test_traffic_of_other_heads_than_the_plan_was_told_is_refused() -> None:
    plan = seqpar.plan(SparselySharded(16, 1, 4), length=64, heads=4)
    with pytest.raises(
        ValueError, match=r"heads: got \(8, 8\), expected \(4, 4\), which the plan was told, since heads"
    ):
        plan.traffic(1, 8, 16, torch.float32)


def busiest_share(mask: Mask, length: int, world: int, layout: str = "zigzag", heads: int = 16) -> float:
    """Rows that the busiest rank sends or receives, over those of dense ring attention."""
    needed = itinerary(mask, layout, Ring("direct"), length, length, world, 0, heads).needed
    moved = needed - needed.diagonal().diag()
    most = int(torch.maximum(moved.sum(0), moved.sum(1)).max())
    return most / ((world - 1) * heads * (length // world))


def bound(mask: SparselySharded, length: int, world: int, chunks: int, heads: int = 16) -> float:
    """``f_d + (1 - f_d) [1/v + c(L-1)B(1-1/v)P/((P-1)N)]``."""
    dense, stride = mask.dense_heads / heads, mask.stride
    halo = chunks * (mask.local_blocks - 1) * mask.block * (1 - 1 / stride) * world / ((world - 1) * length)
    return dense + (1 - dense) * (1 / stride + halo)


@pytest.mark.parametrize(("layout", "chunks"), [("zigzag", 2), ("contiguous", 1)])
@pytest.mark.parametrize("dense", [0, 2])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_busiest_rank_moves_little(world: int, dense: int, layout: str, chunks: int) -> None:
    mask = SparselySharded(64, 16, 16 - dense, dense)
    for length in (16_384, 131_072):
        assert busiest_share(mask, length, world, layout) <= bound(mask, length, world, chunks) * (1 + 1e-12)
    if (world, dense, layout) == (8, 0, "zigzag"):
        share = busiest_share(mask, 131_072, world)
        print(f"131,072 tokens, P=8: {share:.2%} of dense ring's bytes, bound {bound(mask, 131_072, 8, 2):.2%}")
        assert share <= 0.078


@pytest.mark.parametrize("world", [2, 4])
def test_what_is_sent_is_a_small_share_of_dense_ring_attention(world: int) -> None:
    """Measured: K and V forward."""
    length, heads, mask = 2048 * world, 4, SparselySharded(16, 4, 4)

    def job(w: World) -> dict[str, int]:
        x = torch.randn(1, length, heads, 8, generator=torch.Generator().manual_seed(0))
        sent = {}
        for name, each, schedule in (("s2", mask, "ring"), ("dense", Causal(), Ring("forward"))):
            plan = seqpar.plan(each, length=length, group=w, schedule=schedule, heads=heads)
            w.meter.reset()
            local = plan.shard(x)
            seqpar.attention(local, local, local, plan)
            sent[name] = w.meter.by_kind["kv"].bytes
            assert sent[name] == plan.traffic(1, heads, 8, torch.float32)["forward"].bytes
        return sent

    results = run_loopback(world, job)
    share = max(sent["s2"] for sent in results) / results[0]["dense"]
    assert share <= bound(mask, length, world, 2, heads)


@pytest.mark.parametrize("world", [8, 64])
def test_work_is_even_with_zigzag(world: int) -> None:
    work = itinerary(SparselySharded(64, 16, 16), "zigzag", Ring("direct"), 131_072, 131_072, world, 0, 16)
    imbalance = float(work.pairs.max() / work.pairs.double().mean())
    print(f"131,072 tokens, P={world}: busiest / mean {imbalance:.4f}")
    assert imbalance <= 1.01


def test_density_is_the_formula() -> None:
    blocks, local, stride = 256, 16, 16
    work = itinerary(SparselySharded(64, local, stride), "contiguous", Ring(), 64 * blocks, 64 * blocks, 1, 0, 16)
    share = int(work.pairs.sum()) / (16 * 64 * blocks * (64 * blocks + 1) / 2)
    assert share == pytest.approx(1 - (1 - 1 / stride) * (1 - local / blocks) ** 2, abs=0.006)


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("layout", ["zigzag", "explicit"])
def test_kernels_and_strided_inputs(kernel: str, layout: str) -> None:
    """Inputs as models give them, ``[B, H, T, D]`` in memory."""
    case = whole(s2(16, 2, 4))
    inputs = tensors(case, HEADS, torch.float64)
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    out, _ = dense_attention(*(inputs[name] for name in "qkv"), case.dense_of(*HEADS))
    with patch.dict(MASKS, case=case):
        for result in run_loopback(3, partial(attend, kernel=kernel), "case", layout, inputs):
            assert error(result["out"], out) <= 1e-10


def test_layers_with_masks_of_their_own_share_a_layout() -> None:
    dense = seqpar.plan(Causal(), length=64, heads=4)
    sparse = seqpar.plan(SparselySharded(16, 1, 4), length=64, heads=4, layout=dense.layout)
    assert sparse.layout == dense.layout
    assert "SparselySharded" in sparse.explain()


def refusal(mask: Any, heads: Any = 4, length: int = 64, kv_length: int | None = None) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what is looked at
        run_loopback(2, lambda w: seqpar.plan(mask(), length=length, kv_length=kv_length, heads=heads, group=w))
    return str(caught.value)


S2 = partial(SparselySharded, 16, 1)


@pytest.mark.parametrize(
    ("mask", "options", "words"),
    [
        (lambda: SparselySharded(block=48), {}, "block=): got 48, expected a power of two"),
        (lambda: SparselySharded(block=8), {}, "block=): got 8, expected an integer >= 16"),
        (lambda: SparselySharded(local_blocks=0), {}, "local_blocks=): got 0, expected an integer >= 1"),
        (lambda: SparselySharded(stride=0), {}, "stride=): got 0, expected an integer >= 1"),
        (lambda: SparselySharded(dense_heads=-1), {}, "dense_heads=): got -1, expected an integer >= 0"),
        (lambda: S2(4, offsets=(0, 1, 4, 2)), {}, "offsets=): got 4, expected 0 .. 3"),
        (lambda: S2(4, offsets=3), {}, "offsets=): got 3, expected a residue per KV head"),
        (lambda: S2(4, offsets=(0, 1, 2)), {}, "got 3 offsets for 4 KV heads of which 0 are dense, expected 4"),
        (lambda: S2(4, 1, offsets=(0, 1, 2, 3)), {}, "got 4 offsets for 4 KV heads of which 1 are dense, expected 3"),
        (lambda: S2(4, 5), {}, "dense_heads=): got 5 for 4 KV heads, expected at most so many"),
        (lambda: S2(6), {}, "no head sees older blocks of residue 4, 5, expected every block"),
        (lambda: S2(6), {}, "use stride=4 or less, offsets that differ, dense_heads=1, or allow_incomplete=True"),
        (lambda: S2(4, offsets=(0, 0, 1, 2)), {}, "no head sees older blocks of residue 3"),
        (lambda: S2(4) & PrefixLM(3), {}, "later keys, expected causal ones; S2 attention is causal"),
        (lambda: S2(4) & PerHead([PrefixLM(3)] * 4), {}, "later keys, expected causal ones; S2 attention is causal"),
        (lambda: S2(4) & SlidingWindow(3, 3), {}, "later keys, expected causal ones; S2 attention is causal"),
        (lambda: S2(4) & SparselySharded(32), {}, "got two of them, expected one"),
        (lambda: S2(4), {"kv_length": 60}, "got 64 queries over 60 keys, expected at least as many keys"),
        (lambda: S2(4), {"heads": None}, "the plan knows no heads, expected their numbers; give it heads=("),
        (lambda: PerHead([Causal()] * 3), {}, "PerHead: got 3 masks for 4 KV heads, expected one for each"),
        (lambda: PerHead([]), {}, "PerHead: got [], expected a list with a mask for each KV head"),
        (lambda: PerHead([Causal(), 3]), {}, "got 3 for KV head 1, expected a mask"),
        (lambda: PerHead([Documents([0, 64])]), {}, "got documents for KV head 0, expected them to be the same"),
        (lambda: PerHead([S2(4)]), {}, "which differs by head itself"),
        (lambda: SinkWindow(0, 4), {}, "SinkWindow(sink=): got 0, expected an integer >= 1"),
        (lambda: SinkWindow(4, 0), {}, "SinkWindow(window=): got 0, expected an integer >= 1"),
    ],
)
def test_refusals(mask: Any, options: dict[str, Any], words: str) -> None:
    assert words in refusal(mask, **options)


def test_what_is_complete_is_not_refused() -> None:
    for mask in (S2(4), S2(9, dense_heads=1), S2(9, allow_incomplete=True), S2(2, offsets=(1, 1, 0, 1)), S2(3)):
        seqpar.plan(mask & Full() & Causal(), length=64, heads=4)


def test_attention_refuses_other_heads_than_the_plan_was_told() -> None:
    plan = seqpar.plan(S2(4), length=64, heads=4)
    q: Tensor = torch.zeros(1, 64, 8, 4)
    with pytest.raises(ValueError, match=r"heads: got \(8, 8\), expected \(4, 4\), which the plan was told"):
        seqpar.attention(q, q, q, plan)
