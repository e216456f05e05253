"""Every kernel against the dense oracle, block by block, as rings call them; and how blocks are cut for PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import seqpar
from seqpar import Causal, Documents, Full, Mask, PrefixLM, Ring, SlidingWindow
from seqpar.itinerary import itinerary
from seqpar.kernels import Intervals, OutputGradient, Partial, kernel_named, merge_, pieces
from seqpar.kernels.pieces import cut_into_pieces
from support.blocks import BATCH, BLOCKS, QUERIES, ROWS, SHAPES, assert_exact, generator, random_intervals, run_blocks
from support.cases import MaskCase
from support.oracle import dense_attention
from support.strategies import mask_cases

KERNELS = pytest.mark.parametrize("kernel", ["reference", "cpu"])
layouts = st.sampled_from(["contiguous", "zigzag", "striped"])


@KERNELS
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_add_up_to_attention_over_all_keys(shape: str, rows: str, kernel: str) -> None:
    blocks = [random_intervals(SHAPES[shape], rows, n, seed=10 * i) for i, n in enumerate(BLOCKS)]
    for grads in ("dout", "both", "dlse"):
        run_blocks(kernel_named(kernel), torch.float64, SHAPES[shape], blocks, BLOCKS, 1e-10, grads)


@KERNELS
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
    ids=["fp32", "bf16", "fp16"],
)
def test_lower_precisions(dtype: torch.dtype, bound: float, kernel: str) -> None:
    for shape in ("gqa", "narrow_v"):
        blocks = [random_intervals(SHAPES[shape], "per_batch", n, seed=10 * i) for i, n in enumerate(BLOCKS)]
        run_blocks(kernel_named(kernel), dtype, SHAPES[shape], blocks, BLOCKS, bound, "both")


@KERNELS
@given(mask_cases(min_length=2), st.integers(1, 4), layouts, st.data())
def test_blocks_of_every_mask(kernel: str, case: MaskCase, world: int, layout: str, data: st.DataObject) -> None:
    world = min(world, case.length, case.kv_length)
    rank = data.draw(st.integers(0, world - 1))
    work = itinerary(case.mask, layout, Ring("direct"), case.length, case.kv_length, world, rank)
    queries = work.queries.tensor
    q, k, v = (
        torch.randn(len(case.dense()), length, 2, 4, generator=generator(length), dtype=torch.float64)
        for length in (case.length, case.kv_length, case.kv_length)
    )
    q = q[:, queries]
    partial = Partial.empty(q, 4)
    for block in work.blocks:
        keys, values = (x[:, block.keys.tensor] for x in (k, v))
        partial = kernel_named(kernel).forward(q, keys, values, block.intervals, 0.5, partial)
    out, lse = dense_attention(q, k, v, case.dense()[:, queries], scale=0.5)
    assert_exact(partial.out, out, 1e-10)
    assert_exact(partial.lse, lse, 1e-10)


@KERNELS
def test_queries_without_keys_give_nothing_and_take_nothing(kernel: str) -> None:
    nothing = Intervals(*(torch.full((1, 1, QUERIES), 3, dtype=torch.int32) for _ in range(2)))
    run_blocks(kernel_named(kernel), torch.float32, SHAPES["gqa"], [nothing], (9,), 0.0, "both")


@KERNELS
def test_a_block_without_pairs_leaves_the_carry_as_it_is(kernel: str) -> None:
    shape, g = SHAPES["mha"], generator(0)
    q, kv = (torch.randn(BATCH, n, 2, 8, generator=g) for n in (QUERIES, 9))
    carry = Partial(
        torch.randn(BATCH, QUERIES, 2, 8, generator=g), torch.randn(BATCH, shape.heads, QUERIES, generator=g)
    )
    out, lse = carry.out.clone(), carry.lse.clone()
    nothing = torch.zeros(1, 1, QUERIES, dtype=torch.int32)
    after = kernel_named(kernel).forward(q, kv, kv, Intervals(nothing, nothing), 1.0, carry)
    assert torch.equal(after.out, out)
    assert torch.equal(after.lse, lse)


@pytest.mark.parametrize("where", [slice(0, 6), slice(17, 20)], ids=["before", "after"])
def test_cpu_reads_no_key_outside_the_intervals(where: slice) -> None:
    """Rows before every start and after every end may hold anything; their gradients stay what they were."""
    q, kv = (torch.randn(1, n, 1, 8, generator=generator(n)) for n in (11, 20))
    kv[:, where] = torch.nan
    steps = torch.arange(11, dtype=torch.int32).view(1, 1, -1)
    intervals = Intervals(6 + steps // 2, (7 + steps).clamp(max=17))
    backend = kernel_named("cpu")
    partial = backend.forward(q, kv, kv, intervals, 1.0, None)
    grads = [torch.zeros_like(x) for x in (q, kv, kv)]
    grad = OutputGradient(partial.out, partial.lse, torch.ones_like(q), torch.ones_like(partial.lse))
    backend.backward(grad, q, kv, kv, intervals, 1.0, *grads)
    assert all(x.isfinite().all() for x in (partial.out, partial.lse, *grads))
    assert not grads[1][:, where].any()


@KERNELS
@pytest.mark.parametrize("scores", [(1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (-1e4, -1e4)], ids=str)
def test_extreme_scores_do_not_overflow(scores: tuple[float, float], kernel: str) -> None:
    """Two blocks whose scores are all about 1e4 or -1e4; without a maximum taken out, exp gives inf or 0 / 0."""
    q = torch.ones(1, 5, 1, 1)
    k = [(torch.randn(1, 4, 1, 1, generator=generator(i)) + score) for i, score in enumerate(scores)]
    v = [torch.randn(1, 4, 1, 1, generator=generator(9 + i)) for i in range(2)]
    everything = Intervals(torch.zeros(1, 1, 5, dtype=torch.int32), torch.full((1, 1, 5), 4, dtype=torch.int32))
    partial = None
    for keys, values in zip(k, v, strict=True):
        partial = kernel_named(kernel).forward(q, keys, values, everything, 1.0, partial)
    seen = torch.ones(1, 5, 8, dtype=torch.bool)
    out, lse = dense_attention(q.double(), torch.cat(k, 1).double(), torch.cat(v, 1).double(), seen, scale=1.0)
    assert_exact(partial.lse, lse, 1e-6)
    assert_exact(partial.out, out, 1e-3)  # scores of 1e4 are themselves rounded to 1e-3 in fp32


@KERNELS
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_gradcheck_in_one_rank(sinks: bool, kernel: str) -> None:
    plan = seqpar.plan(Causal() & Documents([0, 2, 5]), length=5)
    leaves = [torch.randn(1, 5, heads, 2, generator=generator(heads), dtype=torch.float64) for heads in (2, 1, 1)]
    leaves += [torch.randn(2, generator=generator(0), dtype=torch.float64)] * sinks

    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return seqpar.attention_with_lse(q, k, v, plan, sinks=sinks, kernel=kernel)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves])


# Merging.

lses = st.one_of(st.just(-torch.inf), st.floats(-5, 5), st.sampled_from([-1e4, 1e4]))
partials = st.tuples(lses, st.floats(-10, 10)).map(lambda p: (p[0], 0.0 if p[0] == -torch.inf else p[1]))


def partial_of(lse: float, out: float) -> Partial:
    """One query, one head, one dim."""
    return Partial(torch.full((1, 1, 1, 1), out, dtype=torch.float64), torch.full((1, 1, 1), lse, dtype=torch.float64))


def merged(one: Partial, other: Partial) -> Partial:
    into = Partial(one.out.clone(), one.lse.clone())
    merge_(into, other.out, other.lse)
    return into


def assert_same(one: Partial, other: Partial) -> None:
    assert not one.out.isnan().any()
    assert not one.lse.isnan().any()
    torch.testing.assert_close(one.out, other.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.lse, other.lse, rtol=1e-12, atol=1e-12)


@given(partials, partials, partials)
def test_merging_is_associative_and_commutative(
    one: tuple[float, float], two: tuple[float, float], three: tuple[float, float]
) -> None:
    a, b, c = (partial_of(*x) for x in (one, two, three))
    assert_same(merged(a, b), merged(b, a))
    assert_same(merged(merged(a, b), c), merged(a, merged(b, c)))


@given(partials)
def test_the_empty_partial_is_the_identity(one: tuple[float, float]) -> None:
    a, empty = partial_of(*one), partial_of(-torch.inf, 0.0)
    assert_same(merged(a, empty), a)
    assert_same(merged(empty, a), a)
    assert_same(merged(empty, empty), empty)


@given(st.lists(partials, min_size=1, max_size=6))
def test_merging_is_the_softmax_weighted_mean(several: list[tuple[float, float]]) -> None:
    lse, out = (torch.tensor(x, dtype=torch.float64) for x in zip(*several, strict=True))
    total = reduce(merged, (partial_of(*x) for x in several))
    if lse.isfinite().any():
        assert_same(total, partial_of(float(lse.logsumexp(0)), float((lse.softmax(0) * out).sum())))
    else:
        assert_same(total, partial_of(-torch.inf, 0.0))


# Cutting blocks into pieces.


def assert_pieces_cover(start: Tensor, end: Tensor) -> list[pieces.Piece]:
    """Every pair of the intervals is in exactly one piece, no other pair in any, and ``first`` is true."""
    keys = int(end.max()) + 1 if len(end) else 1
    inside = ((torch.arange(keys) >= start.unsqueeze(1)) & (torch.arange(keys) < end.unsqueeze(1))).int()
    covered = torch.zeros_like(inside)
    begun = np.zeros(len(start), dtype=bool)
    found = cut_into_pieces(start, end)
    for piece in found:
        assert 0 <= piece.rows.start < piece.rows.stop <= len(start)
        assert 0 <= piece.keys.start < piece.keys.stop <= keys
        part = covered[piece.rows, piece.keys]
        if piece.kind == "causal":
            assert part.shape[0] == part.shape[1]
            part += torch.ones_like(part).tril()
        else:
            part += 1 if piece.kind == "full" else inside[piece.rows, piece.keys]
        assert not (piece.first and begun[piece.rows].any()), "an earlier piece holds these rows"
        begun[piece.rows] = True
    assert torch.equal(covered, inside)
    return found


@pytest.fixture(
    params=[(256, 1024, 1 << 20), (4, 8, 1 << 20), (5, 3, 12), (1, 1, 1), (8, 0, 0)],
    ids=["real", "small_tiles", "small_masks", "ones", "no_masks"],
)
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thresholds of cutting: small ones reach every branch with small blocks."""
    for name, value in zip(("TILE_ROWS", "CALL_PAIRS", "MASKED_PAIRS"), request.param, strict=True):
        monkeypatch.setattr(pieces, name, value)


bounds = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=24)
slopes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 8)), min_size=1, max_size=6)


@pytest.mark.usefixtures("sizes")
def test_pieces_cover_any_intervals_once() -> None:
    @given(bounds)
    def check(rows: list[tuple[int, int]]) -> None:
        start, end = (torch.tensor(sorted(bound), dtype=torch.int32) for bound in zip(*rows, strict=True))
        assert_pieces_cover(start, torch.maximum(start, end))

    check()


@pytest.mark.usefixtures("sizes")
def test_pieces_cover_piecewise_linear_intervals_once() -> None:
    @given(slopes, st.integers(0, 9))
    def check(runs: list[tuple[int, int, int]], width: int) -> None:
        steps = torch.tensor([[a, b] for a, b, n in runs for _ in range(n)]).cumsum(0).to(torch.int32)
        start = steps[:, 0].contiguous()
        assert_pieces_cover(start, torch.maximum(start, steps[:, 1] + width))

    check()


@pytest.mark.usefixtures("sizes")
def test_pieces_cover_the_blocks_of_every_mask_once() -> None:
    @given(
        mask_cases(min_length=4, max_length=40), st.sampled_from(["contiguous", "zigzag", "striped"]), st.integers(0, 2)
    )
    def check(case: MaskCase, layout: str, rank: int) -> None:
        work = itinerary(case.mask, layout, Ring("direct"), case.length, case.kv_length, 3, rank)
        for block in work.blocks:
            for start, end in zip(block.intervals.start[:, 0], block.intervals.end[:, 0], strict=True):
                if len(start):
                    assert_pieces_cover(start, end)

    check()


@pytest.mark.usefixtures("sizes")
def test_pieces_of_heads_together_cover_each_head_s_intervals_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "JOINTLY", 1e9)  # whatever it costs

    @given(st.lists(bounds, min_size=2, max_size=4), st.integers(1, 12))
    def check(heads: list[list[tuple[int, int]]], queries: int) -> None:
        both = [zip(*(head * queries)[:queries], strict=True) for head in heads]
        lo, hi = zip(*[[torch.tensor(sorted(x), dtype=torch.int32) for x in head] for head in both], strict=True)
        start, end = torch.stack(lo), torch.maximum(torch.stack(lo), torch.stack(hi))
        apart = [cut_into_pieces(*head) for head in zip(start, end, strict=True)]
        found = pieces.cut_jointly(start, end, apart)
        if found is None:
            return
        key = torch.arange(int(end.max()))
        for one_start, one_end in zip(start, end, strict=True):
            inside = ((key >= one_start.unsqueeze(1)) & (key < one_end.unsqueeze(1))).int()
            covered, begun = torch.zeros_like(inside), np.zeros(len(inside), dtype=bool)
            for piece in found:
                covered[piece.rows, piece.keys] += 1 if piece.kind == "full" else inside[piece.rows, piece.keys]
                assert not (piece.first and begun[piece.rows].any()), "an earlier piece holds these rows"
                begun[piece.rows] = True
            assert torch.equal(covered, inside)

    check()


def test_stripes_of_all_heads_are_cut_together() -> None:
    """Thirty calls for sixteen heads, where each by itself would take as many."""
    work = itinerary(seqpar.SparselySharded(64, 16, 16), "contiguous", Ring(), 16_384, 16_384, 1, 0, 16)
    band, stripes = work.blocks[0].sections
    assert len(stripes.intervals.pieces[0]) == 1
    assert len(stripes.intervals.pieces[0][0]) < 40
    assert max(p.rows.stop - p.rows.start for p in band.intervals.pieces[0][0][1:]) == pieces.TILE_ROWS


def every_piece(mask: Mask, length: int, layout: str = "zigzag", world: int = 4) -> list[pieces.Piece]:
    """The pieces of every block of every rank."""
    ranks = [itinerary(mask, layout, Ring(), length, length, world, rank) for rank in range(world)]
    intervals = [block.intervals for work in ranks for block in work.blocks]
    return [piece for x in intervals for heads in x.pieces for found in heads for piece in found]


def area(piece: pieces.Piece) -> int:
    return (piece.rows.stop - piece.rows.start) * (piece.keys.stop - piece.keys.start)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    "mask",
    [Full(), Causal(), PrefixLM(500), Causal() & Documents([0, 1000, 1300, 4096]), Documents([0, 1000, 1300, 4096])],
    ids=str,
)
def test_what_is_plain_has_no_mask(mask: Mask, layout: str) -> None:
    assert {piece.kind for piece in every_piece(mask, 4096, layout)} <= {"full", "causal"}


def test_plain_causal_is_one_triangle_and_full_one_rectangle() -> None:
    assert [piece.kind for piece in every_piece(Causal(), 4096, world=1)] == ["causal"]
    assert [piece.kind for piece in every_piece(Full(), 4096, world=1)] == ["full"]


def test_a_wide_window_has_small_masks_only() -> None:
    found = every_piece(SlidingWindow(8191), 32_768, world=1)
    masks = [area(piece) for piece in found if piece.kind == "masked"]
    assert max(masks) <= pieces.MASKED_PAIRS
    assert sum(masks) < 0.1 * (32_768 * 8192 - 8191 * 8192 // 2)


def test_many_short_documents_are_joined() -> None:
    lengths = [3] * 1000
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    found = every_piece(Causal() & Documents(cu_seqlens), 3000, world=1)
    assert len(found) < 100
    assert sum(map(area, found)) < 2 * pieces.CALL_PAIRS * len(lengths)


def test_pieces_are_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(start: Tensor, end: Tensor, cut: Callable = cut_into_pieces) -> list[pieces.Piece]:
        calls.append(1)
        return cut(start, end)

    monkeypatch.setattr("seqpar.kernels.contract.cut_into_pieces", counted)
    plan = seqpar.plan(Causal() & Documents([0, 11, 19]), length=19)
    q = torch.randn(1, 19, 2, 4, requires_grad=True)
    for _ in range(3):  # layers
        seqpar.attention(q, q, q, plan).sum().backward()
    assert len(calls) == 1


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel: got 'cuda', expected one of auto, reference, cpu"):
        kernel_named("cuda")
    meta = torch.empty(1, 2, 1, 4, device="meta")
    with pytest.raises(ValueError, match="kernel='cpu': got tensors on meta, expected the CPU; use kernel='auto'"):
        kernel_named("cpu").check(meta, meta, meta, [])
