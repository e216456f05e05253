"""Attention over key intervals by PyTorch's own CPU flash kernel, called on dense pieces of a block."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from .contract import Intervals, OutputGradient, Partial, merge_
from .pieces import Piece

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuKernel:
    """fp64, fp32, bf16 and fp16 on the CPU, without a ``Tq x Tk`` mask for anything plain.

    16-bit inputs are computed in fp32 where the processor has no bf16 instructions: PyTorch emulates them there, and
    its bf16 attention takes several times as long as its fp32 one (docs/benchmarks.md).
    """

    name = "cpu"

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise ValueError for tensors on another device."""
        if q.device.type != "cpu":
            raise ValueError(f"kernel='cpu': got tensors on {q.device}, expected the CPU; use kernel='auto'")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, scale: float, carry: Partial | None
    ) -> Partial:
        """See :class:`~seqpar.kernels.contract.Kernel`."""
        partial, whole, value_dim = carry, q, v.shape[-1]
        dim = max(q.shape[-1], value_dim)  # PyTorch's kernel wants D == Dv
        q, k, v = (_pad_to(dim, _computable(x)) for x in (q, k, v))
        for batch, heads, kv_heads, piece in _calls(intervals, q, k):
            query = q[batch, piece.rows, heads].transpose(1, 2)
            key, value = (x[batch, piece.keys, kv_heads].transpose(1, 2) for x in (k, v))
            mask = _additive_mask(intervals, batch, heads, piece, q.dtype)
            out, lse = _flash(query, key, value, 0.0, piece.kind == "causal", attn_mask=mask, scale=scale)
            if mask is not None:  # PyTorch reports an lse of 0 for rows without keys
                lse = lse.masked_fill(_empty_rows(intervals, batch, heads, piece), -torch.inf)
            out = out.transpose(1, 2)[..., :value_dim]
            if partial is None:
                if out.shape[:3] == whole.shape[:3] and out.is_contiguous() and out.dtype == lse.dtype:
                    partial = Partial(out, lse.contiguous())
                    continue
                partial = Partial.empty(whole, value_dim)
            into = Partial(partial.out[batch, piece.rows, heads], partial.lse[batch, heads, piece.rows])
            if carry is None and piece.first:
                into.out.copy_(out)
                into.lse.copy_(lse)
            else:
                merge_(into, out, lse)
        return Partial.empty(whole, value_dim) if partial is None else partial

    def backward(
        self,
        grad: OutputGradient,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        intervals: Intervals,
        scale: float,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """See :class:`~seqpar.kernels.contract.Kernel`.

        PyTorch's kernel knows no dlse. A column of ones in V with dlse as its output gradient adds dlse to every
        ``dP`` of the row, which is what ``- delta`` asks for; that column of the output counts as 0 in ``delta``.
        """
        head_dim, value_dim = q.shape[-1], v.shape[-1]
        q, k, v, out, dout = (_computable(x) for x in (q, k, v, grad.out, grad.dout))
        if grad.dlse is not None:
            dout = torch.cat([dout, grad.dlse.transpose(1, 2).unsqueeze(-1).to(dout.dtype)], -1)
            v = pad(v, (0, 1), value=1.0)
        dim = max(head_dim, v.shape[-1])
        q, k, v, out, dout = (_pad_to(dim, x) for x in (q, k, v, out, dout))
        lse = grad.lse.masked_fill(grad.lse == -torch.inf, 0.0)  # an empty row's scores are all -inf: exp gives 0
        for batch, heads, kv_heads, piece in _calls(intervals, q, k):
            key, value = (x[batch, piece.keys, kv_heads].transpose(1, 2) for x in (k, v))
            mask = _additive_mask(intervals, batch, heads, piece, q.dtype)
            queries = [x[batch, piece.rows, heads] for x in (q, out, dout, dq)]
            rows_lse = lse[batch, heads, piece.rows]
            group = rows_lse.shape[1] // key.shape[1]
            for member in range(group):  # one query head of every KV head at a time: K, V are never expanded
                query, o, do, into = (x[:, :, member::group] for x in queries)
                query, o, do = (x.transpose(1, 2) for x in (query, o, do))
                gq, gk, gv = (
                    g.transpose(1, 2)
                    for g in _flash_backward(
                        do, query, key, value, o, rows_lse[:, member::group], 0.0, piece.kind == "causal",
                        attn_mask=mask, scale=scale,
                    )
                )  # fmt: skip
                into += gq[..., :head_dim]
                dk[batch, piece.keys, kv_heads] += gk[..., :head_dim]
                dv[batch, piece.keys, kv_heads] += gv[..., :value_dim]


@cache
def _native_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


def _computable(x: Tensor) -> Tensor:
    """``x`` in the dtype that this processor computes fastest in; PyTorch's kernel wants its last dim dense."""
    slow = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not _native_bf16())
    x = x.float() if slow else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _pad_to(dim: int, x: Tensor) -> Tensor:
    return x if x.shape[-1] == dim else pad(x, (0, dim - x.shape[-1]))


def _calls(intervals: Intervals, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice, Piece]]:
    """Each piece with the batch rows, query heads and KV heads that it holds for."""
    group = q.shape[2] // k.shape[2]
    everything = slice(None)
    for b, row in enumerate(intervals.pieces):
        batch = everything if len(intervals.pieces) == 1 else slice(b, b + 1)
        for h, pieces in enumerate(row):
            heads = everything if len(row) == 1 else slice(h, h + 1)
            kv_heads = everything if len(row) == 1 else slice(h // group, h // group + 1)
            for piece in pieces:
                yield batch, heads, kv_heads, piece


def _additive_mask(intervals: Intervals, batch: slice, heads: slice, piece: Piece, dtype: torch.dtype) -> Tensor | None:
    """0 for the pairs of a masked piece that are in the intervals, ``-inf`` for the others, ``[rows, keys]``."""
    if piece.kind != "masked":
        return None
    bounds = (x[batch, heads, piece.rows].flatten() - piece.keys.start for x in (intervals.start, intervals.end))
    start, end = (bound.numpy().tobytes() for bound in bounds)
    return _mask_of(start, end, piece.keys.stop - piece.keys.start, dtype)


def _empty_rows(intervals: Intervals, batch: slice, heads: slice, piece: Piece) -> Tensor:
    """The rows of a masked piece that see none of its keys, ``[1, 1, rows]``."""
    start, end = (x[batch, heads, piece.rows] for x in (intervals.start, intervals.end))
    return end.clamp(max=piece.keys.stop) <= start.clamp(min=piece.keys.start)


@lru_cache(maxsize=8)
def _mask_of(start: bytes, end: bytes, num_keys: int, dtype: torch.dtype) -> Tensor:
    """The tiles along a window have all the same mask, which takes longer to build than to use."""
    low, high = (torch.frombuffer(bytearray(x), dtype=torch.int32).unsqueeze(1) for x in (start, end))
    key = torch.arange(num_keys, dtype=torch.int32)
    return torch.zeros(len(low), num_keys, dtype=dtype).masked_fill_((key < low) | (key >= high), -torch.inf)
