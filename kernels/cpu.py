"""PyTorch's own flash attention for the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .contract import accumulator_dtype
from .flash import Direction, Shape
from .pieces import Piece

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

FEW_QUERIES = 8
"""Up to so many, two matrix products read each key once for all query heads that share it, where PyTorch's flash kernel
reads it for each of them (docs/decoding.md)."""


class CpuFlash:
    """fp64, fp32, bf16 and fp16, with a ``Tq x Tk`` mask where a piece is ragged.

    16-bit inputs are computed in fp32 where the processor has no bf16 instructions: PyTorch emulates them there, and
    its bf16 attention takes several times as long as its fp32 one (docs/benchmarks.md).
    """

    def refusal(self, shape: Shape, kinds: Sequence[Piece]) -> str:
        """Tensors on another device."""
        return "" if shape.device.type == "cpu" else f"tensors on {shape.device}, expected the CPU"

    def repeats(self, direction: Direction) -> bool:
        """Always."""
        return True

    def head_dims(self, shape: Shape) -> tuple[int, int]:
        """PyTorch's kernel wants D == Dv."""
        dim = max(shape.dim, shape.value_dim)
        return dim, dim

    def prepared(self, x: Tensor) -> Tensor:
        """In the dtype that this processor computes fastest in; PyTorch's kernel wants its last dim dense."""
        slow = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not _native_bf16())
        x = x.float() if slow else x
        return x if x.stride(-1) == 1 else x.contiguous()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~seqpar.kernels.flash.FlashLibrary`."""
        if q.shape[1] <= FEW_QUERIES and not causal and q.dtype in (torch.float32, torch.float64):
            return _few_queries(q, k, v, scale, mask)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = _forward(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        return out.transpose(1, 2), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~seqpar.kernels.flash.FlashLibrary`."""
        k, v = (x.transpose(1, 2) for x in (k, v))
        dq, group = torch.empty_like(q), lse.shape[1] // k.shape[1]
        dk, dv = (torch.zeros_like(x, dtype=accumulator_dtype(x.dtype)) for x in (k, v))
        for member in range(group):  # one query head of every KV head at a time: K, V are never expanded
            query, o, do = (x[:, :, member::group].transpose(1, 2) for x in (q, out, dout))
            seen = mask if mask is None or mask.dim() == 2 else mask[:, member::group]
            gq, gk, gv = _backward(do, query, k, v, o, lse[:, member::group], 0.0, causal, attn_mask=seen, scale=scale)
            dq[:, :, member::group] = gq.transpose(1, 2)
            dk += gk
            dv += gv
        return dq, dk.transpose(1, 2), dv.transpose(1, 2)


def _few_queries(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :meth:`CpuFlash.forward`, with the scores in memory: they are few."""
    batch, tokens, heads, _ = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    group = heads // kv_heads
    query = q.transpose(1, 2).reshape(batch, kv_heads, group * tokens, -1)  # neighbours share a KV head
    scores = query @ k.permute(0, 2, 3, 1)
    scores *= scale
    if mask is not None:
        scores = scores.view(batch, heads, tokens, keys).add_(mask).view_as(scores)
    lse = scores.logsumexp(-1)
    scores.sub_(lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp_()
    out = (scores @ v.transpose(1, 2)).view(batch, heads, tokens, -1)
    return out.transpose(1, 2), lse.view(batch, heads, tokens)


@cache
def _native_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()
