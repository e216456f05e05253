"""Kernels that call others' flash attention on pieces: with PyTorch's CPU operator, GPU operators by metas."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

import seqpar
from seqpar import Causal, Documents, Full, Mask, PrefixLM, Ring, SlidingWindow
from seqpar.itinerary import itinerary
from seqpar.kernels import Intervals, OutputGradient, Partial, kernel_named, library, pieces
from seqpar.kernels import Shape as CallShape
from seqpar.kernels.cpu import CpuFlash
from seqpar.kernels.flash import FlashKernel
from seqpar.kernels.library import AtenFlash, CudnnFlash, PackagedFlash
from seqpar.sections import Block
from support.blocks import BATCH, SHAPES, Shape, assert_exact, generator, pairs, run_blocks

CUDA = torch.device("cuda", 0)
BF16 = CallShape(CUDA, torch.bfloat16, 2, 8, 2, 64, 64)
LIBRARIES = {"cudnn": CudnnFlash, "flash": AtenFlash}


class GpuLike(CpuFlash):
    """PyTorch's CPU op as if it were one for GPUs: no masks, and the same padding and alignment."""

    head_dims = library._CudaFlash.head_dims
    prepared = library._CudaFlash.prepared

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert mask is None
        assert scale > 0
        assert q.shape[-1] % 8 == v.shape[-1] % 8 == 0
        for x in (q, k, v):
            assert not any(n % 8 for n in (x.storage_offset(), *x.stride()[:-1])), "unaligned rows"
        return super().forward(q, k, v, causal, scale, mask)


gpu_like = FlashKernel("gpu_like", GpuLike())


def blocks_of(mask: Mask, layout: str, world: int, rank: int, length: int = 61) -> list[Block]:
    work = itinerary(mask, layout, Ring("forward"), length, length, world, rank)
    fresh = []  # with intervals of their own, on which no pieces are kept yet
    for block in work.blocks:
        (section,) = block.sections
        if block.pairs:
            intervals = Intervals(section.intervals.start, section.intervals.end)
            fresh.append(replace(block, sections=(replace(section, intervals=intervals),)))
    return fresh


def run_plan(kernel: FlashKernel, blocks: list[Block], shape: Shape, grads: str = "both", scale: float = 0.4) -> None:
    sizes = tuple(len(block.keys) for block in blocks)
    run_blocks(kernel, torch.float64, shape, [b.intervals for b in blocks], sizes, 1e-10, grads, scale)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("mask", [Causal(), Full()], ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_steps_of_a_ring(world: int, mask: Mask, layout: str) -> None:
    for rank in range(world):
        blocks = blocks_of(mask, layout, world, rank)
        assert all(block.intervals.plain for block in blocks)
        for shape in ("gqa", "wide_v"):
            run_plan(gpu_like, blocks, SHAPES[shape])


@pytest.mark.parametrize("grads", ["dout", "both", "dlse"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_gradient(shape: str, grads: str) -> None:
    run_plan(gpu_like, blocks_of(Causal(), "zigzag", 2, 0), SHAPES[shape], grads)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    run_plan(gpu_like, blocks_of(Causal(), "zigzag", 2, 1), SHAPES["gqa"], scale=scale)


@pytest.mark.parametrize(
    "mask",
    [PrefixLM(17), Causal() & Documents([0, 7, 31, 61]), Documents([[0, 40, 61], [0, 3, 20, 61]]) & Causal()],
    ids=["prefix", "documents", "batch_documents"],
)
def test_several_pieces(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CALL_PAIRS", -1)  # nothing is too small for a call of its own
    monkeypatch.setattr(pieces, "KEY_PAIRS", 0)
    ranks = [blocks_of(mask, "zigzag", 2, rank) for rank in range(2)]
    assert not all(block.intervals.plain for blocks in ranks for block in blocks)
    for blocks in ranks:
        run_plan(gpu_like, blocks, SHAPES["gqa"])


def test_unaligned_inputs_are_copied() -> None:
    (block,) = blocks_of(Causal(), "contiguous", 1, 0, length=9)
    rows = torch.randn(9 * 12 + 1, generator=generator(0), dtype=torch.float64)
    for x in (rows[1:].view(1, 9, 1, 12)[..., :8], rows[1:].view(1, 12, 1, 9).transpose(1, 3)[..., :8]):
        expected = kernel_named("reference").forward(x, x, x, block.intervals, 0.3, None)
        got = gpu_like.forward(x, x, x, block.intervals, 0.3, None)
        assert_exact(got.out, expected.out, 1e-12)


# Partials.


class Bf16(GpuLike):
    """Returns what it computes in 16 bits, as GPUs do."""

    def prepared(self, x: Tensor) -> Tensor:
        return x

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.out, self.lse = super().forward(*args)
        return self.out, self.lse


def inputs(tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(1, tokens, 2, 8, generator=generator(seed)).to(dtype) for seed in range(3)]


def test_a_final_plain_block_is_returned_as_it_is() -> None:
    ops, (block,) = Bf16(), blocks_of(Causal(), "zigzag", 1, 0)
    final = FlashKernel("bf16", ops).forward(*inputs(61), block.intervals, 0.3, None, final=True)
    assert final.out.data_ptr() == ops.out.data_ptr()
    assert final.out.dtype == torch.bfloat16
    assert final.lse.dtype == torch.float32
    partial = FlashKernel("bf16", ops).forward(*inputs(61), block.intervals, 0.3, None)
    assert partial.out.dtype == torch.float32
    assert torch.equal(partial.out.bfloat16(), final.out)


def test_what_is_merged_is_in_fp32() -> None:
    end = torch.arange(30, 61, dtype=torch.int32).view(1, 1, 31)
    rectangle_and_triangle = Intervals(torch.zeros_like(end), end)
    assert [piece.kind for piece in rectangle_and_triangle.pieces[0][0]] == ["full", "causal"]
    q, (_, k, v) = inputs(31)[0], inputs(61)
    for intervals, keys, carry in (
        (rectangle_and_triangle, slice(0, 61), None),
        (blocks_of(Causal(), "zigzag", 1, 0, length=31)[0].intervals, slice(0, 31), Partial.empty(q, 8)),
    ):
        got = FlashKernel("bf16", Bf16()).forward(q, k[:, keys], v[:, keys], intervals, 0.3, carry, final=True)
        assert got.out.dtype == torch.float32
        exact = [x.double() for x in (q, k[:, keys], v[:, keys])]
        assert_exact(got.out, kernel_named("reference").forward(*exact, intervals, 0.3, None).out, 1e-2)


def test_queries_outside_every_piece_get_nothing() -> None:
    start = torch.zeros(1, 1, 5, dtype=torch.int32)
    end = torch.tensor([0, 0, 3, 3, 3], dtype=torch.int32).view(1, 1, 5)
    partial = gpu_like.forward(*inputs(5, torch.float64), Intervals(start, end), 0.3, None)
    assert not partial.out[:, :2].any()
    assert (partial.lse[..., :2] == -torch.inf).all()
    assert partial.lse[..., 2:].isfinite().all()


# Which blocks are one piece.

bounds = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(1, 6)), min_size=1, max_size=3)


@given(bounds, st.integers(-3, 3))
def test_a_plain_piece_is_the_whole_block(runs: list[tuple[int, int, int]], width: int) -> None:
    steps = torch.tensor([[a, b] for a, b, n in runs for _ in range(n)]).cumsum(0).to(torch.int32)
    start = steps[:, 0].contiguous()
    end = torch.maximum(start, steps[:, 1] + width)
    seen = pairs(Intervals(start, end), keys=int(end.max()) + 1)
    found = pieces.plain_piece(start, end)
    if found is not None:
        square = torch.zeros_like(seen)
        square[found.rows, found.keys] = True
        if found.kind == "causal":
            square[found.rows, found.keys] = square[found.rows, found.keys].tril()
        assert torch.equal(square, seen)
    else:
        assert len(pieces.cut_into_pieces(start, end)) != 1 or pieces.cut_into_pieces(start, end)[0].kind == "masked"


# The operators of PyTorch, by their metas.


@pytest.fixture
def willing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library refuses anything."""
    for one in (CudnnFlash, AtenFlash, PackagedFlash):
        monkeypatch.setattr(one, "refusal", lambda *_: "")


@pytest.mark.usefixtures("willing")
@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 64), (20, 12)], ids=str)
def test_operators_take_what_they_get(name: str, dims: tuple[int, int]) -> None:
    dim, value_dim = dims

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k, v = make(2, 16, 8, dim), make(2, 16, 2, dim), make(2, 16, 2, value_dim)
    kernel, partial = kernel_named(f"library:{name}"), None
    for block in blocks_of(Causal(), "zigzag", 4, 1, length=64):
        partial = kernel.forward(q, k, v, block.intervals, 0.1, partial)
        assert partial.out.shape == (2, 16, 8, value_dim)
        assert partial.lse.shape == (2, 8, 16)
        assert partial.out.dtype == partial.lse.dtype == torch.float32
        dlse = make(2, 8, 16, dtype=torch.float32)
        grad = OutputGradient(partial.out.bfloat16(), partial.lse, make(2, 16, 8, value_dim), dlse)
        kernel.backward(grad, q, k, v, block.intervals, 0.1, *(x.float() for x in (q, k, v)))


def flash_operators() -> SimpleNamespace:
    """PyTorch's flash operators, which read lse as if it were contiguous, by their schemas and with real numbers."""

    def forward(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale):
        assert (cum_seq_q, cum_seq_k, dropout_p, return_debug_mask) == (None, None, 0.0, False)
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        return *CpuFlash().forward(q, k, v, is_causal, scale, None), None, None, None

    def backward(
        dout, q, k, v, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale
    ):
        assert (cum_seq_q, cum_seq_k, dropout_p, max_q, max_k) == (None, None, 0.0, q.shape[1], k.shape[1])
        assert lse.is_contiguous()
        return CpuFlash().backward(dout, q, k, v, out, lse, is_causal, scale, None)

    return SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)


def cudnn_operators() -> SimpleNamespace:
    """PyTorch's cuDNN operators: heads before tokens, and an lse of 4 dims."""

    def forward(q, k, v, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, *, scale):
        assert (attn_bias, compute_log_sumexp, dropout_p, return_debug_mask) == (None, True, 0.0, False)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = CpuFlash().forward(q, k, pad_like(v, q), is_causal, scale, None)
        return out[..., : v.shape[-1]].transpose(1, 2), lse.unsqueeze(-1), *[None] * 7

    def backward(
        dout, q, k, v, out, lse, seed, offset, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *,
        scale,
    ):  # fmt: skip
        assert (attn_bias, cum_seq_q, cum_seq_k, dropout_p) == (None, None, None, 0.0)
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        assert lse.is_contiguous()
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        wide = [pad_like(dout, q), q, k, pad_like(v, q), pad_like(out, q)]
        dq, dk, dv = CpuFlash().backward(*wide, lse.squeeze(-1), is_causal, scale, None)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv[..., : v.shape[-1]].transpose(1, 2)

    return SimpleNamespace(
        _scaled_dot_product_cudnn_attention=forward, _scaled_dot_product_cudnn_attention_backward=backward
    )


def pad_like(x: Tensor, q: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, q.shape[-1] - x.shape[-1]))


@pytest.mark.usefixtures("willing")
@pytest.mark.parametrize("name", LIBRARIES)
def test_operators_get_what_they_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_aten", {"cudnn": cudnn_operators, "flash": flash_operators}[name]())
    for rank in range(2):
        for shape in (SHAPES["gqa"], Shape(dim=20, value_dim=12)):
            run_plan(kernel_named(f"library:{name}"), blocks_of(Causal(), "zigzag", 2, rank), shape)


# The flash_attn packages, by stand-ins with their signatures.


def flash_attn_2() -> SimpleNamespace:
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        return *CpuFlash().forward(q, k, v, causal, softmax_scale, None), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        assert deterministic
        write_gradients((dq, dk, dv), dout, q, k, v, out, softmax_lse, causal, softmax_scale)

    return SimpleNamespace(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)


def flash_attn_4() -> SimpleNamespace:
    def _flash_attn_fwd(q, k, v, *, softmax_scale=None, causal=False, return_lse=False):
        assert return_lse
        return CpuFlash().forward(q, k, v, causal, softmax_scale, None)

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, *, deterministic=False, dq=None, dk=None, dv=None
    ):
        assert deterministic
        write_gradients((dq, dk, dv), dout, q, k, v, out, lse, causal, softmax_scale)
        return dq, dk, dv

    return SimpleNamespace(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)


def write_gradients(into: tuple[Tensor, ...], dout: Tensor, *args: Any) -> None:
    q, k, v, out, lse, causal, scale = args
    assert lse.is_contiguous()
    for x, grad in zip(into, CpuFlash().backward(dout, q, k, v, out, lse, causal, scale, None), strict=True):
        x.copy_(grad)


@pytest.fixture
def flash_attn_3() -> Iterator[None]:
    """The operators of FlashAttention-3, with the arguments that they have up to the last one used."""
    operators = torch.library.Library("flash_attn_3", "DEF")
    operators.define(
        "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, float? softmax_scale=None, bool is_causal=False, "
        "int num_splits=0) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    operators.define(
        "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq=None, "
        "Tensor(b!)? dk=None, Tensor(c!)? dv=None, float? softmax_scale=None, bool is_causal=False, "
        "bool deterministic=False) -> Tensor[]"
    )

    def forward(q, k, v, k_new, softmax_scale, is_causal, num_splits=0):
        assert num_splits == 1, "several are added in any order"
        out, lse = CpuFlash().forward(q, k, v, is_causal, softmax_scale, None)
        return out, lse, q.new_empty(0), q.new_empty(0)

    def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, is_causal, deterministic=False):
        assert deterministic
        write_gradients((dq, dk, dv), dout, q, k, v, out, softmax_lse, is_causal, softmax_scale)
        return []

    operators.impl("fwd", forward, "CPU")
    operators.impl("bwd", backward, "CPU")
    yield
    operators._destroy()


@pytest.mark.usefixtures("willing", "flash_attn_3")
@pytest.mark.parametrize("generation", [2, 3, 4])
def test_packages_take_what_they_get(generation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = {2: flash_attn_2, 3: SimpleNamespace, 4: flash_attn_4}[generation]()
    installed = {library._GENERATIONS[generation].module: stand_in}
    monkeypatch.setattr(library, "_imported", installed.get)
    monkeypatch.setattr(library, "_major", lambda device: 10 if generation == 4 else 9)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    for rank in range(2):
        blocks = blocks_of(Causal(), "zigzag", 2, rank)
        for grads in ("dout", "both"):
            run_plan(kernel_named("library:flash_attn"), blocks, SHAPES["gqa"], grads)


@pytest.mark.parametrize(
    ("major", "installed", "expected"),
    [(9, (2, 3, 4), 3), (9, (2, 4), 2), (10, (2, 3, 4), 4), (10, (2,), 2), (8, (2, 3, 4), 2), (8, (3, 4), None)],
)
def test_the_package_meant_for_the_gpu(
    major: int, installed: tuple[int, ...], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {library._GENERATIONS[n].module: object() for n in installed}
    monkeypatch.setattr(library, "_imported", modules.get)
    monkeypatch.setattr(library, "_major", lambda device: major)
    assert library._package(CUDA) == (None if expected is None else library._GENERATIONS[expected])
    refused = PackagedFlash().refusal(BF16, [])
    assert refused == ("" if expected else f"no flash_attn package for cuda:0, expected {AMPERE} installed")
    if expected == 3:
        wide = PackagedFlash().refusal(BF16._replace(dim=256), [])
        assert wide == "head_dim 256 and 64, expected at most 192"
    dims = PackagedFlash().head_dims(BF16._replace(dim=130))
    assert dims == ((256, 256) if major == 10 else (136, 136))


AMPERE = "flash_attn.flash_attn_interface"


def test_a_missing_package_is_missing() -> None:
    assert library._imported("flash_attn_interface") is None
    assert library._imported("inspect") is inspect


# What is refused, and what repeats.

RAGGED = blocks_of(SlidingWindow(9), "zigzag", 1, 0)[0].intervals
TRIANGLE = blocks_of(Causal(), "zigzag", 1, 0)[0].intervals


@pytest.mark.parametrize("name", ["library", "library:cudnn", "library:flash", "library:flash_attn"])
def test_calls_are_refused_before_anything_is_sent(name: str) -> None:
    kernel, x = kernel_named(name), torch.empty(1, 61, 2, 8)
    with pytest.raises(ValueError, match=f"^kernel='{name}': got tensors on cpu, expected CUDA; use kernel='auto'$"):
        kernel.check(x, x, x, [TRIANGLE])
    with pytest.raises(ValueError, match=f"^kernel='{name}': got tensors on cpu"):
        seqpar.attention(x, x, x, seqpar.plan(Causal(), length=61), kernel=name)
    assert isinstance(kernel, FlashKernel)
    ragged, fp32 = kernel.refusal(BF16, RAGGED), kernel.refusal(BF16._replace(dtype=torch.float32), TRIANGLE)
    assert ragged == "a block of ragged intervals, expected rectangles and triangles"
    assert fp32 == "torch.float32, expected bfloat16 or float16"


@pytest.mark.parametrize("name", LIBRARIES)
def test_pytorch_is_asked_about_every_kind_of_piece(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def can_use_it(call: library.SDPAParams, debug: bool) -> bool:
        assert call.query.requires_grad
        assert torch.is_grad_enabled()
        assert not debug
        asked.append((*call.query.shape, *call.key.shape[1:], call.value.shape[3], call.is_causal, call.enable_gqa))
        return call.is_causal

    monkeypatch.setattr(LIBRARIES[name], "can_use", staticmethod(can_use_it))
    monkeypatch.setattr(pieces, "CALL_PAIRS", -1)
    monkeypatch.setattr(pieces, "KEY_PAIRS", 0)
    both = blocks_of(PrefixLM(17), "zigzag", 1, 0)[0].intervals
    shape, kinds = BF16._replace(dim=20, value_dim=12), [TRIANGLE.plain]
    assert {piece.kind for piece in both.pieces[0][0]} == {"full", "causal"}
    with FakeTensorMode(), torch.no_grad():
        assert not LIBRARIES[name]().refusal(shape, kinds)
        refused = kernel_named(f"library:{name}").refusal(shape, both)
    assert refused == (
        "torch.bfloat16 of head_dim 20 and 12 on cuda:0, refused by torch.backends.cuda.can_use_it (debug=True says "
        "why), expected what it allows"
    )
    dims = {"cudnn": (24, 16), "flash": (24, 24)}[name]
    assert asked[0] == (2, 8, 61, dims[0], 2, 61, *dims, True, True)
    assert asked[1][-2:] == (False, True)


def test_the_smallest_pieces_decide() -> None:
    """A library may take no piece of so few keys."""
    seen: list[list] = []

    class Observer(GpuLike):
        def refusal(self, shape: CallShape, kinds: list) -> str:
            seen.append([(piece.kind, piece.keys.stop - piece.keys.start) for piece in kinds])
            return ""

    intervals = blocks_of(Causal() & Documents([[0, 40, 61], [0, 20, 61]]), "contiguous", 1, 0)[0].intervals
    FlashKernel("observer", Observer()).refusal(BF16, intervals)
    assert seen == [[("causal", 20)]]


def test_the_first_library_that_takes_a_block_is_used() -> None:
    class Unwilling(GpuLike):
        def refusal(self, *_: Any) -> str:
            return "anything, expected nothing"

        forward = backward = None

    run_plan(FlashKernel("both", Unwilling(), GpuLike()), blocks_of(Causal(), "zigzag", 2, 0), SHAPES["mha"])
    with pytest.raises(ValueError, match=r"^kernel='none': got anything, expected nothing; use kernel='auto'$"):
        FlashKernel("none", Unwilling(), Unwilling()).check(*[torch.empty(1, 61, 2, 8)] * 3, [TRIANGLE])


def test_who_repeats_bitwise() -> None:
    def backwards() -> list[bool]:
        return [one().repeats("backward") for one in (CudnnFlash, AtenFlash, PackagedFlash)]

    assert all(one().repeats("forward") for one in (CudnnFlash, AtenFlash, PackagedFlash))
    assert backwards() == [False, False, True]
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch then warns, and does nothing else
        assert backwards() == [False, False, True]
        torch.use_deterministic_algorithms(True)
        assert backwards() == [False, True, True]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["library:cudnn", "library:flash", "library:flash_attn"])
def test_on_a_gpu(name: str) -> None:
    for shape in (Shape(8, 2, 64, 64), Shape(4, 4, 128, 128), Shape(4, 1, 72, 40)):
        compare_on_a_gpu(name, shape)


def compare_on_a_gpu(name: str, shape: Shape) -> None:
    """Against the reference kernel in fp64 on the same bf16 numbers, over the steps of a ring."""
    kernel, reference = kernel_named(name), kernel_named("reference")
    blocks = blocks_of(Causal(), "zigzag", 2, 0, length=517)
    tokens = len(blocks[0].keys)

    def normal(*size: int, seed: int) -> Tensor:
        return torch.randn(*size, generator=generator(seed)).bfloat16().to(CUDA)

    q = normal(BATCH, tokens, shape.heads, shape.dim, seed=0)
    kv = [
        [normal(BATCH, len(b.keys), shape.kv_heads, d, seed=10 * i + d) for d in (shape.dim, shape.value_dim)]
        for i, b in enumerate(blocks)
    ]
    dout = normal(BATCH, tokens, shape.heads, shape.value_dim, seed=1)
    dlse = normal(BATCH, shape.heads, tokens, seed=2).float()
    try:
        kernel.check(q, *kv[0], [b.intervals for b in blocks])
    except ValueError as error:
        pytest.skip(str(error))

    def run(kernel: Any, dtype: torch.dtype) -> list[Tensor]:
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        partial = None
        for block, (k, v) in zip(blocks, kv, strict=True):
            partial = kernel.forward(q.to(dtype), k.to(dtype), v.to(dtype), block.intervals, 0.1, partial)
        grad = OutputGradient(partial.out.to(dtype), partial.lse, dout.to(dtype), dlse.to(accumulator))
        dq, results = torch.zeros_like(q, dtype=accumulator), []
        for block, (k, v) in zip(blocks, kv, strict=True):
            dk, dv = (torch.zeros_like(x, dtype=accumulator) for x in (k, v))
            kernel.backward(grad, *(x.to(dtype) for x in (q, k, v)), block.intervals, 0.1, dq, dk, dv)
            results += [dk, dv]
        return [partial.out, partial.lse, dq, *results]

    for got, expected in zip(run(kernel, torch.bfloat16), run(reference, torch.float64), strict=True):
        assert_exact(got, expected, 2e-2)
