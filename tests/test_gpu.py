"""The kernels on a real GPU, against the oracle and against PyTorch's own attention. ``pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import seqpar
from seqpar.kernels import Intervals, OutputGradient, kernel_named
from seqpar.kernels.triton import configurations, launching
from support.blocks import Shape, generator, random_intervals, run_blocks
from support.oracle import error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DEVICE = "cuda"
BOUNDS = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5}
KEYS = (300, 1, 517)
QUERIES = 333
BOTH = pytest.mark.parametrize("kernel", ["triton", "triton_atomic"])


@pytest.fixture
def nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` of floating dtypes gives NaN."""
    plain = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        made = plain(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", empty)


def normal(*size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=generator(seed)).to(DEVICE, dtype)


def intervals_of(mask: seqpar.Mask, queries: int, keys: int | None = None) -> Intervals:
    """Of a plan, on the CPU."""
    return seqpar.plan(mask, length=queries, kv_length=keys or queries).work.blocks[0].intervals


def relative(got: Tensor, expected: Tensor) -> float:
    """As the oracle's ``error``, on the CPU."""
    return error(got.detach().cpu(), expected.detach().cpu())


# Every configuration.


def configured() -> dict[str, tuple[str, torch.dtype, int]]:
    """What uses each row of this GPU's table: a kernel (``few``: of few queries), a dtype and a head dim."""
    uses = {"dkv_atomic": "triton_atomic", "few": "few"}
    found = {}
    for row in configurations.table():
        if row.architecture == launching.architecture():
            for dtype in (dtype for dtype, bits in configurations.DTYPES.items() if bits == row.bits):
                use = uses.get(row.kernel, "triton")
                found[f"{use}-{str(dtype).removeprefix('torch.')}-{row.head_dim}"] = use, dtype, row.head_dim
    return found


CONFIGURED = configured()


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("rows", ["shared", "per_both"])
@pytest.mark.parametrize("name", CONFIGURED)
def test_every_configuration(name: str, rows: str) -> None:
    """Ragged intervals with empty rows, continued from block to block, with dlse, and several heads on a KV head."""
    use, dtype, dim = CONFIGURED[name]
    heads = 12 if use == "few" else 4  # its queries fill a tile with all the heads of a KV head
    check(use, dtype, Shape(heads=heads, kv_heads=2, dim=dim, value_dim=dim), rows)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(80, 80), (96, 96), (192, 128), (64, 128), (23, 37)], ids=str)
@pytest.mark.parametrize("use", ["triton", "triton_atomic", "few"])
def test_head_dims(use: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    check(use, dtype, Shape(heads=3, kv_heads=1, dim=dims[0], value_dim=dims[1]), "shared")


def check(use: str, dtype: torch.dtype, shape: Shape, rows: str) -> None:
    """Random intervals, forward and backward."""
    queries, kernel = (13, "triton") if use == "few" else (QUERIES, use)
    blocks = [random_intervals(shape, rows, keys, seed=10 * i, queries=queries) for i, keys in enumerate(KEYS)]
    scale = shape.dim**-0.5
    run_blocks(kernel_named(kernel), dtype, shape, blocks, KEYS, BOUNDS[dtype], "both", scale, device=DEVICE)


MASKS = {
    "full": seqpar.Full(),
    "causal": seqpar.Causal(),
    "window": seqpar.SlidingWindow(200),
    "documents": seqpar.Causal() & seqpar.Documents([0, 7, 300, 301, 900, 1003]),
}


@BOTH
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_plans(mask: str, kernel: str) -> None:
    """Blocks with many whole tiles."""
    shape = Shape(heads=4, kv_heads=1, dim=128, value_dim=128)
    blocks, scale = [intervals_of(MASKS[mask], 1003)], 128**-0.5
    run_blocks(kernel_named(kernel), torch.bfloat16, shape, blocks, (1003,), 1.5e-2, "both", scale, device=DEVICE)


@BOTH
@pytest.mark.parametrize(
    "mask",
    [seqpar.SparselySharded(64, 2, 4), seqpar.SparselySharded(64, 1, 3, dense_heads=1), seqpar.SinkWindow(20, 100)],
    ids=str,
)
def test_masks_of_several_parts(mask: seqpar.Mask, kernel: str) -> None:
    """Band and stripes, one continuing the other, against the reference kernel in fp64."""
    q, dout = (normal(2, 1003, 8, 128, seed=seed) for seed in (0, 3))
    k, v = (normal(2, 1003, 4, 128, seed=seed) for seed in (1, 2))
    plan, results = seqpar.plan(mask, length=1003, heads=(8, 4)), {}
    for name, dtype in ((kernel, torch.bfloat16), ("reference", torch.float64)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        out = seqpar.attention(*leaves, plan, kernel=name)
        results[name] = [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]
    for got, right in zip(results[kernel], results["reference"], strict=True):
        assert relative(got, right) <= 1.5e-2


@BOTH
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_bf16_is_as_accurate_as_pytorchs(mask: str, heads: tuple[int, int], kernel: str) -> None:
    """At most twice the error of PyTorch's own attention, three times in gradients."""
    q, dout = (normal(2, 1003, heads[0], 128, seed=seed) for seed in (0, 3))
    k, v = (normal(2, 1003, heads[1], 128, seed=seed) for seed in (1, 2))

    def pytorchs(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.transpose(1, 2).detach().requires_grad_() for x in tensors]
        out = scaled_dot_product_attention(*leaves, is_causal=mask == "causal", enable_gqa=heads[0] != heads[1])
        grads = torch.autograd.grad(out, leaves, dout.transpose(1, 2).to(out.dtype))
        return [x.transpose(1, 2) for x in (out, *grads)]

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    ours = seqpar.attention(*leaves, seqpar.plan(MASKS[mask], length=1003), kernel=kernel)
    grads = torch.autograd.grad(ours, leaves, dout)
    exact, theirs = pytorchs(q.double(), k.double(), v.double()), pytorchs(q, k, v)
    for name, got, other, right in zip(("out", "dq", "dk", "dv"), (ours, *grads), theirs, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert relative(got, right) <= (2 if name == "out" else 3) * relative(other, right), name


@pytest.mark.parametrize("kernel", ["auto", "library:cudnn", "library:flash"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_libraries(heads: tuple[int, int], kernel: str) -> None:
    """A triangle, and a rectangle continued from it."""
    shape = Shape(*heads, dim=128, value_dim=128)
    blocks = [intervals_of(seqpar.Causal(), QUERIES), intervals_of(seqpar.Full(), QUERIES, 256)]
    some = torch.empty(2, QUERIES, heads[0], 128, dtype=torch.bfloat16, device=DEVICE)
    try:
        kernel_named(kernel).check(some, some[:, :, : heads[1]], some[:, :, : heads[1]], blocks)
    except ValueError as error:
        pytest.skip(f"needs a GPU and PyTorch that have it: {error}")
    sizes = QUERIES, 256
    run_blocks(kernel_named(kernel), torch.bfloat16, shape, blocks, sizes, 1.5e-2, "both", 128**-0.5, device=DEVICE)


# What else is promised.


def call(kernel: str, tensors: list[Tensor], intervals: Intervals) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    q, k, v, dout = tensors
    scale, backend = q.shape[-1] ** -0.5, kernel_named(kernel)
    partial = backend.forward(q, k, v, intervals, scale, None, final=True)
    grads = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v)]
    grad = OutputGradient(partial.out.to(q.dtype), partial.lse, dout, None)
    backend.backward(grad, q, k, v, intervals, scale, *grads)
    return [partial.out, partial.lse, *grads]


def inputs(queries: int, keys: int, heads: tuple[int, int] = (8, 2), dim: int = 128) -> list[Tensor]:
    """q, k, v, dout."""
    sizes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]), (queries, heads[0]))
    return [normal(2, n, h, dim, seed=seed) for seed, (n, h) in enumerate(sizes)]


@pytest.mark.parametrize(
    ("queries", "keys", "mask"),
    [(4096, 4096, "causal"), (4096, 4096, "window"), (4, 65_536, "full"), (16, 20_000, "full")],
)
def test_results_repeat_bitwise(queries: int, keys: int, mask: str) -> None:
    tensors, intervals = inputs(queries, keys, (32, 8)), intervals_of(MASKS[mask], queries, keys)
    first, second = (call("triton", tensors, intervals) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "heads_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns_apart": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda x: torch.cat([x, x], -1)[..., 3 : 3 + x.shape[-1]].copy_(x),
    "packed": lambda x: torch.stack([x, x, x], 3)[:, :, :, 1],
}


@BOTH
@pytest.mark.parametrize("queries", [QUERIES, 5])
@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(strides: str, queries: int, kernel: str) -> None:
    tensors, intervals = inputs(queries, 400, dim=64), intervals_of(seqpar.Causal(), queries, 400)
    arranged = [STRIDES[strides](x) for x in tensors]
    assert all(torch.equal(a, b) for a, b in zip(arranged, tensors, strict=True))
    for got, expected in zip(call(kernel, arranged, intervals), exactly(tensors, intervals), strict=True):
        assert relative(got, expected) <= 1.5e-2


def exactly(tensors: list[Tensor], intervals: Intervals) -> list[Tensor]:
    """The reference in fp64."""
    q, k, v, dout = (x.double() for x in tensors)
    scale, backend = q.shape[-1] ** -0.5, kernel_named("reference")
    partial = backend.forward(q, k, v, intervals, scale, None)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    backend.backward(OutputGradient(partial.out, partial.lse, dout, None), q, k, v, intervals, scale, *grads)
    return [partial.out, partial.lse, *grads]


@BOTH
def test_a_million_tokens(kernel: str) -> None:
    """More than 2**31 elements in each tensor, so that the last tokens want offsets of 64 bits: they are compared."""
    tokens, tail, last, width = 1_100_000, 300, 200, 64
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free GPU memory")
    tensors = [torch.randn(1, tokens, 16, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    assert tensors[0].numel() > 1 << 31
    end = torch.arange(1, tokens + 1, dtype=torch.int32, device=DEVICE).view(1, 1, -1)
    intervals = Intervals((end - width).clamp(min=0), end)
    few = Intervals(*(x[..., -4:].contiguous() for x in (intervals.start, intervals.end)))
    q, k, v, _ = tensors
    decoded = kernel_named(kernel).forward(q[:, -4:], k, v, few, 128**-0.5, None, final=True)
    got = [x[:, :, -last:] if x.dim() == 3 else x[:, -last:] for x in call(kernel, tensors, intervals)]
    # A query of the last 200 sees keys of the last 300, and the last 200 keys are seen by the last 200 queries alone.
    first = tokens - tail
    here = Intervals(*((x[..., first:] - first).clamp(min=0) for x in (intervals.start, intervals.end)))
    expected = exactly([x[:, first:] for x in tensors], here)
    expected = [x[:, :, -last:] if x.dim() == 3 else x[:, -last:] for x in expected]
    for x, y in zip(got, expected, strict=True):
        assert relative(x, y) <= 1.5e-2
    assert relative(decoded.out, expected[0][:, -4:]) <= 1.5e-2


@pytest.fixture
def no_sync() -> Iterator[Callable[[], None]]:
    """From its call on, whatever waits for the GPU raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@BOTH
@pytest.mark.parametrize("queries", [4, 1000])
def test_kernels_never_wait_for_the_gpu(queries: int, kernel: str, no_sync: Callable[[], None]) -> None:
    """With intervals that are new, but on the GPU: which queries meet a tile of keys is found there."""
    tensors = inputs(queries, 1000)
    some, new = (intervals_of(seqpar.Causal(), queries, 1000) for _ in range(2))
    new = Intervals(new.start.to(DEVICE, copy=True), new.end.to(DEVICE, copy=True))
    call(kernel, tensors, some)
    no_sync()
    call(kernel, tensors, new)


def test_attention_never_waits_for_the_gpu(no_sync: Callable[[], None]) -> None:
    """From the second call with a plan on, forward and backward."""
    plan = seqpar.plan(MASKS["documents"], length=1003)
    *tensors, dout = inputs(1003, 1003)
    leaves = [x.requires_grad_() for x in tensors]
    for warm in (True, False):
        torch.autograd.grad(seqpar.attention(*leaves, plan, kernel="triton"), leaves, dout)
        if warm:
            no_sync()


def test_a_compiled_model_keeps_its_graph() -> None:
    plan = seqpar.plan(seqpar.Causal(), length=QUERIES)
    q, k, v, dout = inputs(QUERIES, QUERIES)

    def model(q: Tensor) -> Tensor:
        return seqpar.attention(q * 2, k, v, plan).sin()

    results = []
    for function in (model, torch.compile(model, fullgraph=True)):
        leaf = q.clone().requires_grad_()
        out = function(leaf)
        results.append((out, *torch.autograd.grad(out, leaf, dout)))
    for compiled, eager in zip(results[1], results[0], strict=True):
        assert relative(compiled, eager) <= 1e-2
