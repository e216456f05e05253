"""PyTorch's own flash attention for the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from .contract import accumulator_dtype
from .few_queries_cpu import one_pass, packed, takes, two_products, unpacked
from .flash import Direction, Shape
from .pieces import Piece

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

FEW_QUERIES = 8
"""Up to so many, each key is read once for all query heads that share it, where PyTorch's flash kernel reads it for
each of them (docs/decoding.md)."""


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
        """As they are: what has to be padded is so later, for the keys of a piece and not a whole cache."""
        return shape.dim, shape.value_dim

    def prepared(self, x: Tensor) -> Tensor:
        """With a dense last dim, and as it is otherwise: see :meth:`head_dims`."""
        return x if x.stride(-1) == 1 else x.contiguous()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~seqpar.kernels.flash.FlashLibrary`."""
        if q.shape[1] <= FEW_QUERIES and not causal:
            return _few_queries(q, k, v, scale, mask)
        q, k, v = _alike(*(_fast(x).transpose(1, 2) for x in (q, k, v)))
        mask = None if mask is None else mask.to(q.dtype)
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
        dout, q, k, v, out = _alike(*(_fast(x) for x in (dout, q, k, v, out)))
        mask = None if mask is None else mask.to(q.dtype)
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
    """As :meth:`CpuFlash.forward`, each key read once for all query heads that share it."""
    if takes(q, k, v):
        return one_pass(q, k, v, scale, mask)
    q, k, v = (_fast(x) for x in (q, k, v))
    if q.dtype != torch.bfloat16:
        return two_products(q, k, v, scale, mask)
    tokens, kv_heads = q.shape[1], k.shape[2]
    query, k, v = _alike(packed(q, kv_heads), k.transpose(1, 2), v.transpose(1, 2))
    if mask is not None:  # a KV head's queries are the tokens of its query heads
        mask = mask.repeat(q.shape[2] // kv_heads, 1) if mask.dim() == 2 else mask.reshape(1, kv_heads, -1, k.shape[2])
    out, lse = _forward(query, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return unpacked(out, tokens), lse.reshape(lse.shape[0], -1, tokens)


def _fast(x: Tensor) -> Tensor:
    """In the dtype that this processor computes fastest in."""
    slow = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not _native_bf16())
    return x.float() if slow else x


def _alike(*tensors: Tensor) -> Iterator[Tensor]:
    """All padded to the largest of their last dims: PyTorch's kernel wants D == Dv."""
    dim = max(x.shape[-1] for x in tensors)
    return (x if x.shape[-1] == dim else pad(x, (0, dim - x.shape[-1])) for x in tensors)


@cache
def _native_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()
