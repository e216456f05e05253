"""Triton kernels over key intervals: every mask, on NVIDIA GPUs from Ampere on, without a compiler at installation."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import Intervals, OutputGradient, Partial
from .configurations import DTYPES, FEW_QUERIES, MAX_HEAD_DIM


class TritonKernel:
    """bf16, fp16 and fp32 (in IEEE arithmetic), head dims up to 256.

    ``deterministic=False`` adds dQ atomically, in one pass over the scores instead of two: faster, and not the same to
    the last bit from run to run.
    """

    def __init__(self, *, deterministic: bool = True) -> None:
        self.name = "triton" if deterministic else "triton_atomic"
        self.deterministic = deterministic

    def check(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Intervals]) -> None:
        """Raise ValueError for another device, dtype or head dim, or without Triton."""
        if importlib.util.find_spec("triton") is None:
            raise ValueError(f"kernel={self.name!r}: got no triton, expected it installed; pip install triton")
        if q.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"kernel={self.name!r}: got {q.dtype}, expected one of {names}; use kernel='reference'")
        if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
            got = f"head_dim {q.shape[-1]} and {v.shape[-1]}"
            raise ValueError(
                f"kernel={self.name!r}: got {got}, expected at most {MAX_HEAD_DIM}; use kernel='reference'"
            )
        from .launching import architecture, interpreted, on_device_of

        if not (q.is_cuda or (q.device.type == "cpu" and interpreted())):
            raise ValueError(f"kernel={self.name!r}: got tensors on {q.device}, expected CUDA; use kernel='auto'")
        with on_device_of(q):
            architecture()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        intervals: Intervals,
        scale: float,
        carry: Partial | None,
        final: bool = False,
    ) -> Partial:
        """See :class:`~seqpar.kernels.contract.Kernel`."""
        from .few_queries import few_queries
        from .forward import forward
        from .launching import check_outputs, on_device_of

        if carry is not None:
            carry = Partial(carry.out.contiguous(), carry.lse.contiguous())
            lse_shape = torch.Size((q.shape[0], q.shape[2], q.shape[1]))
            check_outputs(
                {"carry.out": (carry.out, q.shape[:3] + v.shape[3:]), "carry.lse": (carry.lse, lse_shape)},
                {"q": q, "k": k, "v": v},
            )
        attend = few_queries if q.shape[1] <= FEW_QUERIES else forward
        with on_device_of(q):
            return attend(q, k, v, intervals.of_heads(q.shape[2]).to(q.device), scale, carry, final)

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
        """See :class:`~seqpar.kernels.contract.Kernel`."""
        from .backward import add_dkv, add_dq
        from .launching import check_outputs, on_device_of

        check_outputs(
            {"dq": (dq, q.shape), "dk": (dk, k.shape), "dv": (dv, v.shape)},
            {"q": q, "k": k, "v": v, "out": grad.out, "dout": grad.dout, "lse": grad.lse},
        )
        intervals = intervals.of_heads(q.shape[2]).to(q.device)
        with on_device_of(q):
            if self.deterministic:
                add_dq(grad, q, k, v, intervals, scale, dq)
                add_dkv(grad, q, k, v, intervals, scale, dk, dv)
            else:
                add_dkv(grad, q, k, v, intervals, scale, dk, dv, dq)
