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


@cache
def _native_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()
