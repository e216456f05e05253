"""The Triton kernels in Triton's interpreter, against the dense oracle. (Its bf16 products are wrong: fp32 and fp16.)

Scratch memory is full of NaN, so that reading what nothing was written to shows.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import seqpar
from seqpar.comm import World, run_loopback
from seqpar.kernels import Intervals, OutputGradient, Partial, kernel_named
from seqpar.kernels.triton import TritonKernel, backward, configurations, few_queries, forward, launching
from seqpar.kernels.triton.configurations import Tiles
from seqpar.kernels.triton.tiles import Columns
from support.blocks import BATCH, QUERIES, ROWS, Shape, assert_exact, generator, random_intervals, run_blocks
from support.cases import MASKS, tensors
from support.oracle import dense_attention, error

pytestmark = pytest.mark.skipif(not launching.interpreted(), reason="needs TRITON_INTERPRET=1: a GPU is at hand")
KERNELS = {"triton": TritonKernel(), "triton_atomic": TritonKernel(deterministic=False)}
BOTH = pytest.mark.parametrize("kernel", KERNELS)
SHAPES = {
    "mha": Shape(dim=16, value_dim=16),
    "gqa": Shape(heads=4, kv_heads=2, dim=16, value_dim=16),
    "mqa": Shape(heads=3, kv_heads=1, dim=8, value_dim=8),
    "narrow_v": Shape(heads=1, kv_heads=1, dim=48, value_dim=32),
    "wide_v": Shape(heads=1, kv_heads=1, dim=6, value_dim=80),
    "odd": Shape(heads=2, kv_heads=1, dim=23, value_dim=37),
}
BLOCKS = (23, 41)


@pytest.fixture(autouse=True)
def nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` of floating dtypes gives NaN."""
    plain = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        made = plain(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Small tiles in all kernels, so that small inputs have several; calling it chooses others."""

    def use(tiles: Tiles) -> None:
        for module in (forward, backward, few_queries):
            monkeypatch.setattr(module, "configured", lambda *args: tiles)
        monkeypatch.setattr(few_queries, "multiprocessors", lambda x: 5)

    use(Tiles(32, 16, 4, 1))
    return use


def plain(name: str, keys: int, queries: int = QUERIES) -> Intervals:
    """Blocks with whole tiles."""
    row = torch.arange(queries, dtype=torch.int32).view(1, 1, -1)
    start, end = torch.zeros_like(row), torch.full_like(row, keys)
    if name == "causal":
        end = (row + 1).clamp(max=keys)
    if name == "window":
        start, end = (row - 20).clamp(0, keys), (row + 1).clamp(max=keys)
    return Intervals(start, torch.maximum(start, end))


CASES = [("triton", "gqa", rows) for rows in ROWS] + [("triton", shape, "shared") for shape in SHAPES if shape != "gqa"]
CASES += [("triton_atomic", "gqa", "per_both"), ("triton_atomic", "odd", "shared")]


@pytest.mark.parametrize(("kernel", "shape", "rows"), CASES)
@pytest.mark.usefixtures("small_tiles")
def test_blocks_add_up_to_attention_over_all_keys(kernel: str, shape: str, rows: str) -> None:
    batch = 2 if "both" in rows or "batch" in rows else 1
    blocks = [random_intervals(SHAPES[shape], rows, n, seed=10 * i, batch=batch) for i, n in enumerate(BLOCKS)]
    run_blocks(KERNELS[kernel], torch.float32, SHAPES[shape], blocks, BLOCKS, 1e-5, "both", batch=batch)


@BOTH
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("name", ["full", "causal", "window"])
def test_blocks_with_whole_tiles(name: str, descriptors: bool, kernel: str, small_tiles: Callable[..., None]) -> None:
    small_tiles(Tiles(16, 16, 4, 1, descriptors))
    run_blocks(KERNELS[kernel], torch.float32, SHAPES["gqa"], [plain(name, 41)], (41,), 1e-5, "dout", batch=1)


@BOTH
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dims", [(80, 80), (96, 96), (192, 128), (128, 64), (160, 256)], ids=str)
def test_head_dims_in_two_parts(
    dims: tuple[int, int], descriptors: bool, kernel: str, small_tiles: Callable[..., None]
) -> None:
    small_tiles(Tiles(32, 16, 4, 1, descriptors))
    shape = Shape(heads=2, kv_heads=1, dim=dims[0], value_dim=dims[1])
    run_blocks(KERNELS[kernel], torch.float16, shape, [plain("causal", 41)], (41,), 2e-3, "both", scale=0.1, batch=1)


@pytest.mark.parametrize("dim", range(1, 257))
def test_columns_cover_the_head_dim(dim: int) -> None:
    first, second = Columns.of(dim)
    assert first + second >= max(dim, 16)
    assert all(width == 0 or width & (width - 1) == 0 for width in (first, second))
    assert first >= 16
    assert second == 0 or second >= 16
    assert first + second < dim + max(16, dim // 2)


@pytest.mark.parametrize("rows", ["shared", "per_both"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 100), (5, 100), (16, 100), (16, 3), (16, 0)])
def test_few_queries(queries: int, keys: int, rows: str, small_tiles: Callable[..., None]) -> None:
    """Their keys are split over programs; with 2 query heads on a KV head, 16 queries want several tiles too."""
    small_tiles(Tiles(16, 16, 4, 1))
    check_few(SHAPES["gqa"], rows, torch.float32, queries, keys, 1e-5)


@pytest.mark.parametrize("dims", [(80, 96), (192, 128)], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_few_queries_with_head_dims_in_two_parts(dims: tuple[int, int]) -> None:
    check_few(Shape(heads=2, kv_heads=1, dim=dims[0], value_dim=dims[1]), "shared", torch.float16, 3, 50, 2e-3)


def check_few(shape: Shape, rows: str, dtype: torch.dtype, queries: int, keys: int, bound: float) -> None:
    """Two blocks, the second continued from the first, against the reference kernel in fp64."""
    g, scale = generator(0), shape.dim**-0.5
    q = torch.randn(BATCH, queries, shape.heads, shape.dim, generator=g).to(dtype)
    partial, expected = None, None
    for seed, size in enumerate((keys, 41)):
        intervals = random_intervals(shape, rows, size, seed=seed, queries=queries)
        k, v = (
            torch.randn(BATCH, size, shape.kv_heads, d, generator=g).to(dtype) for d in (shape.dim, shape.value_dim)
        )
        partial = few_queries.few_queries(q, k, v, intervals, scale, partial)
        wide = (x.double() for x in (q, k, v))
        expected = kernel_named("reference").forward(*wide, intervals, scale, expected)
    assert_exact(partial.out, expected.out, bound)
    assert_exact(partial.lse, expected.lse, bound)


def shipped() -> dict[str, configurations.Row]:
    """One row for each size of tiles that a kernel ships with, with the smallest head dim that uses it."""
    rows: dict[str, configurations.Row] = {}
    for row in sorted(configurations.table(), key=lambda row: row.head_dim):
        tiles = row.tiles
        name = f"{row.kernel}-{row.bits}-{tiles.rows}x{tiles.keys}{'-descriptors' * tiles.descriptors}"
        rows.setdefault(name, row)
    return rows


@pytest.mark.parametrize("row", shipped().values(), ids=shipped())
def test_every_shipped_configuration(row: configurations.Row, small_tiles: Callable[..., None]) -> None:
    """More than two tiles of each side, one of them ragged."""
    small_tiles(row.tiles)
    queries = 16 if row.kernel == "few" else 2 * row.tiles.rows + 5
    keys = 2 * row.tiles.keys + 5
    heads = 4 if row.kernel == "few" else 2  # their rows fill a tile
    shape = Shape(heads=heads, kv_heads=1, dim=row.head_dim, value_dim=row.head_dim)
    dtype, bound = (torch.float16, 2e-3) if row.bits == 16 else (torch.float32, 1e-5)
    kernel = KERNELS["triton_atomic" if row.kernel == "dkv_atomic" else "triton"]
    run_blocks(
        kernel, dtype, shape, [plain("window", keys, queries)], (keys,), bound, "dout", row.head_dim**-0.5, batch=1
    )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("queries", [QUERIES, 3])
def test_scales_that_are_not_positive(scale: float, queries: int) -> None:
    blocks = [random_intervals(SHAPES["gqa"], "shared", 41, seed=3, queries=queries)]
    run_blocks(KERNELS["triton"], torch.float32, SHAPES["gqa"], blocks, (41,), 1e-5, "both", scale)
    q, k, v, out, lse = attend(blocks[0], scale, queries=queries)
    partial = KERNELS["triton"].forward(q, k, v, blocks[0], scale, None)
    assert_exact(partial.out, out, 1e-5)
    assert_exact(partial.lse, lse, 1e-5)


def attend(intervals: Intervals, scale: float, queries: int = QUERIES) -> tuple[Tensor, ...]:
    """q, k, v, and what the reference makes of them."""
    g = generator(0)
    q, k, v = (torch.randn(BATCH, n, h, 16, generator=g) for n, h in ((queries, 4), (41, 2), (41, 2)))
    expected = kernel_named("reference").forward(*(x.double() for x in (q, k, v)), intervals, scale, None)
    return q, k, v, expected.out, expected.lse


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("queries", [QUERIES, 3])
@pytest.mark.parametrize("carries", [False, True])
def test_a_final_result_is_in_the_dtype_of_the_inputs(carries: bool, queries: int) -> None:
    intervals = plain("causal", 41, queries)
    q, k, v, *_ = (x.half() for x in attend(intervals, 1.0, queries))
    kernel = KERNELS["triton"]
    carry = [kernel.forward(q, k, v, intervals, 1.0, None) if carries else None for _ in range(2)]
    partial = kernel.forward(q, k, v, intervals, 1.0, carry[0])
    final = kernel.forward(q, k, v, intervals, 1.0, carry[1], final=True)
    assert partial.out.dtype == torch.float32
    assert torch.equal(final.out, partial.out.half())
    assert torch.equal(final.lse, partial.lse)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("queries", [QUERIES, 3])
def test_a_block_without_pairs_leaves_the_carry_as_it_is(queries: int) -> None:
    nothing = Intervals(*(torch.full((1, 1, queries), 3, dtype=torch.int32) for _ in range(2)))
    q, k, v, *_ = attend(nothing, 1.0, queries)
    carry = Partial(torch.randn(BATCH, queries, 4, 16), torch.randn(BATCH, 4, queries))
    carry.lse[:, 0, 1], carry.out[:, 1, 0] = -torch.inf, 0.0
    out, lse = carry.out.clone(), carry.lse.clone()
    after = KERNELS["triton"].forward(q, k, v, nothing, 1.0, carry)
    assert torch.equal(after.out, out)
    assert torch.equal(after.lse, lse)


STRIDES = {
    "heads_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns_apart": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda x: torch.cat([x, x], -1)[..., 3 : 3 + x.shape[-1]].copy_(x),
    "expanded": lambda x: x[:1].expand_as(x),
}


@BOTH
@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(strides: str, kernel: str, small_tiles: Callable[..., None]) -> None:
    small_tiles(Tiles(16, 16, 4, 1, descriptors=True))  # where they can be had: not with all of these
    intervals, change = plain("causal", 41), STRIDES[strides]
    q, k, v, *_ = attend(intervals, 0.5)
    dout = torch.randn(q.shape, generator=generator(5))
    if strides == "expanded":
        q, k, v, dout = (x[:1].expand_as(x).contiguous() for x in (q, k, v, dout))
    results = []
    for arrange in (lambda x: x, change):
        tensors = [arrange(x) for x in (q, k, v)]
        partial = KERNELS[kernel].forward(*tensors, intervals, 0.5, None)
        grad = OutputGradient(arrange(partial.out), partial.lse, arrange(dout), None)
        grads = [torch.zeros(x.shape) for x in (q, k, v)]
        KERNELS[kernel].backward(grad, *tensors, intervals, 0.5, *grads)
        results.append([partial.out, partial.lse, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_beyond_32_bits(small_tiles: Callable[..., None]) -> None:
    """Rows 2**26 elements apart: from the 32nd on, their offsets want 64 bits. Only touched pages take memory."""
    small_tiles(Tiles(16, 16, 4, 1))
    stride, rows = (1 << 26) + 8, 37
    storage = torch.UntypedStorage(2 * (stride * rows + 16))
    far = torch.empty(0, dtype=torch.float16).set_(storage, 0, (1, rows, 1, 16), (stride * rows, stride, 16, 1))
    near = torch.randn(1, rows, 1, 16, generator=generator(0)).half()
    far.copy_(near)
    results = []
    for x in (near, far):
        intervals = plain("causal", rows, rows)
        partial = KERNELS["triton"].forward(x, x, x, intervals, 1.0, None)
        few = KERNELS["triton"].forward(x[:, -3:], x, x, plain("full", rows, 3), 1.0, None)
        grads = [torch.zeros(near.shape) for _ in range(3)]
        KERNELS["triton"].backward(OutputGradient(x, partial.lse, x, None), x, x, x, intervals, 1.0, *grads)
        results.append([partial.out, few.out, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@BOTH
@pytest.mark.parametrize("where", [slice(0, 6), slice(17, 40)], ids=["before", "after"])
@pytest.mark.usefixtures("small_tiles")
def test_no_key_outside_the_intervals_is_used(where: slice, kernel: str) -> None:
    """By pointers: rows before every start and after every end may hold anything (a cache's unused pages)."""
    q, kv = (torch.randn(1, n, 1, 16, generator=generator(n)) for n in (20, 40))
    kv[:, where] = torch.nan
    steps = torch.arange(20, dtype=torch.int32).view(1, 1, -1)
    intervals = Intervals((6 + steps // 2).clamp(max=16), (7 + steps).clamp(max=17))
    for queries in (20, 4):
        seen = Intervals(intervals.start[..., -queries:], intervals.end[..., -queries:])
        partial = KERNELS[kernel].forward(q[:, -queries:], kv, kv, seen, 1.0, None)
        assert partial.out.isfinite().all()
        assert partial.lse.isfinite().all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("queries", [QUERIES, 3])
def test_nan_is_not_hidden(queries: int) -> None:
    intervals = plain("causal", 41, queries)
    q, k, v, *_ = attend(intervals, 1.0, queries)
    q[:, 1] = torch.nan
    carry = KERNELS["triton"].forward(q, k, v, intervals, 1.0, None)
    partial = KERNELS["triton"].forward(q, k, v, intervals, 1.0, carry)
    assert partial.out[:, 1].isnan().all()
    assert partial.lse[:, :, 1].isnan().all()
    assert partial.out[:, 0].isfinite().all()
    assert partial.out[:, 2:].isfinite().all()


@BOTH
@pytest.mark.parametrize("scores", [(1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (-1e4, -1e4)], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_extreme_scores_do_not_overflow(scores: tuple[float, float], kernel: str) -> None:
    for queries in (QUERIES, 5):
        q = torch.ones(1, queries, 1, 1)
        k = [torch.randn(1, 4, 1, 1, generator=generator(i)) + score for i, score in enumerate(scores)]
        v = [torch.randn(1, 4, 1, 1, generator=generator(9 + i)) for i in range(2)]
        partial = None
        for keys, values in zip(k, v, strict=True):
            partial = KERNELS[kernel].forward(q, keys, values, plain("full", 4, queries), 1.0, partial)
        seen = torch.ones(1, queries, 8, dtype=torch.bool)
        out, lse = dense_attention(q.double(), torch.cat(k, 1).double(), torch.cat(v, 1).double(), seen, scale=1.0)
        assert_exact(partial.lse, lse, 1e-6)
        assert_exact(partial.out, out, 1e-3)  # scores of 1e4 are themselves rounded to 1e-3 in fp32


@pytest.mark.usefixtures("small_tiles")
def test_programs_share_the_heads_in_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections that do not divide the heads: every tile of every head is computed, once."""
    for section in (3, 5):
        for module in (forward, backward):
            monkeypatch.setattr(module, "heads_in_cache", lambda *args, section=section: section)
        run_blocks(KERNELS["triton"], torch.float32, SHAPES["gqa"], [plain("causal", 41)], (41,), 1e-5, "dout", batch=1)


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter patches Triton's modules while a kernel runs: ranks that are threads have to take turns."""
    turn = threading.RLock()

    def locked(method: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            with turn:
                return method(*args, **options)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(TritonKernel, name, locked(getattr(TritonKernel, name)))


@pytest.mark.parametrize(("mask", "kernel"), [*((mask, "triton") for mask in MASKS), ("documents", "triton_atomic")])
@pytest.mark.usefixtures("small_tiles", "one_at_a_time")
def test_attention_over_ranks(mask: str, kernel: str) -> None:
    """The whole of seqpar on two ranks: zigzag blocks of every mask, with sinks."""
    case = MASKS[mask]
    whole = tensors(case, (2, 1), torch.float32, batch=len(case.dense_of(2, 1)))

    def rank(world: World) -> list[Tensor]:
        plan = seqpar.plan(case.of(1), length=case.length, kv_length=case.kv_length, group=world, heads=(2, 1))
        q = plan.shard(whole["q"])
        k, v = (plan.shard(whole[name], of="keys") for name in ("k", "v"))
        sinks = whole["sinks"].clone()
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, sinks)]
        out, lse = seqpar.attention_with_lse(*leaves[:3], plan, sinks=leaves[3], kernel=kernel)
        upstream = [plan.shard(whole["dout"]), plan.shard(whole["dlse"], dim=2)]
        dq, dk, dv, dsinks = torch.autograd.grad([out, lse], leaves, upstream)
        gathered = [plan.unshard(x) for x in (out.detach(), dq)]
        return [*gathered, plan.unshard(dk, of="keys"), plan.unshard(dv, of="keys"), dsinks]

    results = run_loopback(2, rank)
    leaves = [whole[name].double().requires_grad_() for name in ("q", "k", "v", "sinks")]
    out, lse = dense_attention(*leaves[:3], case.dense_of(2, 1), sinks=leaves[3])
    expected = torch.autograd.grad([out, lse], leaves, [whole["dout"].double(), whole["dlse"].double()])
    for got in results:
        for x, y in zip(got[:-1], [out.detach(), *expected[:-1]], strict=True):
            assert error(x, y) <= 1e-5
    assert error(sum(got[-1] for got in results), expected[-1]) <= 1e-5


@pytest.mark.usefixtures("small_tiles")
def test_a_compiled_model_keeps_its_graph() -> None:
    plan = seqpar.plan(seqpar.Causal(), length=20)
    q, k, v = (torch.randn(1, 20, 2, 16, generator=generator(i)) for i in range(3))

    def model(q: Tensor) -> Tensor:
        return seqpar.attention(q * 2, k, v, plan, kernel="triton").sin()

    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        leaf = q.clone().requires_grad_()
        out = function(leaf)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Bad input.

REFUSED = {
    "dtype": (
        lambda: [torch.zeros(1, 3, 1, 16, dtype=torch.float64)] * 3,
        "got torch.float64, expected one of bfloat16",
    ),
    "head_dim": (lambda: [torch.zeros(1, 3, 1, 257)] * 3, "got head_dim 257 and 257, expected at most 256"),
    "value_dim": (lambda: [torch.zeros(1, 3, 1, 8)] * 2 + [torch.zeros(1, 3, 1, 300)], "got head_dim 8 and 300"),
    "device": (lambda: [torch.zeros(1, 3, 1, 8, device="meta")] * 3, "got tensors on meta, expected CUDA"),
}


@BOTH
@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_input_is_refused_before_anything_is_computed(case: str, kernel: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=rf"kernel='{kernel}': {message}"):
        KERNELS[kernel].check(*make(), [])
    if case != "device":
        with pytest.raises(ValueError, match=message):
            seqpar.attention(*make(), seqpar.plan(seqpar.Causal(), length=3), kernel=kernel)


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="got no triton, expected it installed; pip install triton"):
        KERNELS["triton"].check(*[torch.zeros(1, 3, 1, 8)] * 3, [])


BAD_OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]], str]] = {
    "dtype": (lambda q, k, v: (q.half(), k, v), "dq: got torch.float16"),
    "shape": (lambda q, k, v: (q, k[:, 1:], v), "dk: got torch.float32"),
    "columns": (lambda q, k, v: (q, k, v.transpose(2, 3).contiguous().transpose(2, 3)), "dv: got strides"),
    "expanded": (lambda q, k, v: (q[:, :1].expand_as(q), k, v), "dq: got strides"),
    "same": (lambda q, k, v: (q, k, k), "dv: got memory that dk uses too, expected its own"),
}


@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_outputs_that_would_be_written_wrongly_are_refused(case: str) -> None:
    change, message = BAD_OUTPUTS[case]
    intervals = plain("causal", 41)
    q, k, v, *_ = attend(intervals, 1.0)
    grad = OutputGradient(q, torch.zeros(BATCH, 4, QUERIES), q, None)
    outputs = change(*(torch.zeros(x.shape) for x in (q, k, v)))
    with pytest.raises(ValueError, match=message):
        KERNELS["triton"].backward(grad, q, k, v, intervals, 1.0, *outputs)
    with pytest.raises(ValueError, match="dq: got memory that q uses too"):
        KERNELS["triton"].backward(grad, q, k, v, intervals, 1.0, q, torch.zeros(k.shape), torch.zeros(v.shape))
    carry = Partial(q, torch.zeros(BATCH, 4, QUERIES))
    with pytest.raises(ValueError, match=r"carry.out: got memory that q uses too"):
        KERNELS["triton"].forward(q, k, v, intervals, 1.0, carry)


# The table.


def test_every_supported_input_has_a_configuration() -> None:
    for architecture, kernel, dtype, dim in itertools.product(
        set(configurations.ARCHITECTURES.values()), configurations.KERNELS, configurations.DTYPES, (1, 64, 80, 192, 256)
    ):
        assert configurations.tiles_for(architecture, kernel, dtype, dim, 1).rows >= 16
        assert configurations.tiles_for(architecture, kernel, dtype, 1, dim).rows >= 16


def test_the_table_is_written_as_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    configurations.write(configurations.table(), path)
    assert path.read_text() == configurations.TABLE.read_text()
    assert configurations.table(path) == configurations.table()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("architecture", "sm_70", "expected an architecture of"),
        ("kernel", "forwards", "a kernel of"),
        ("measured", "compiled, 3", "expected the columns architecture, kernel, bits"),
        ("keys", "129", "keys: got 129, expected a power of two"),
        ("stages", "", "invalid literal"),
    ],
)
def test_a_bad_table_names_its_line(column: str, value: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    header, row = (line.split(",") for line in configurations.TABLE.read_text().splitlines()[:2])
    row[[name.strip() for name in header].index(column)] = value
    path.write_text(",".join(header) + "\n" + ",".join(row) + "\n")
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        configurations.table(path)


def test_tiles_that_no_kernel_takes_are_refused() -> None:
    good = Tiles(64, 64, 4, 2)
    for change in ({"rows": 48}, {"keys": 8}, {"warps": 3}, {"stages": 0}):
        with pytest.raises(ValueError, match="expected"):
            replace(good, **change)
