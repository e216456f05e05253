"""Plain PyTorch attention over key intervals: the readable definition of the contract, in any dtype, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import Intervals, OutputGradient, Partial, accumulator_dtype, merge_


class ReferenceKernel:
    """Builds the whole ``[Tq, Tk]`` score matrix of a block: exact and slow."""

    name = "reference"

    def check(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Intervals]) -> None:
        """Every floating dtype, head dim and device is supported."""

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
        partial = Partial.empty(q, v.shape[-1]) if carry is None else carry
        scores = _scores(q, k, intervals, scale)
        lse = scores.logsumexp(-1)
        weights = _exp_scores(scores, lse)
        out = torch.einsum("bkgij,bjkd->bikgd", weights, v.to(scores.dtype))
        merge_(partial, out.flatten(2, 3), lse.flatten(1, 2))
        return partial

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
        """See :class:`~seqpar.kernels.contract.Kernel`. ``dS = P * (dP - delta)`` (FlashAttention-2, section 3.1.2)."""
        kv_heads = k.shape[2]
        dtype = accumulator_dtype(q.dtype)
        scores = _scores(q, k, intervals, scale)
        lse, delta = (x.unflatten(1, (kv_heads, -1)).to(dtype) for x in (grad.lse, grad.delta()))
        dout, query = (x.unflatten(2, (kv_heads, -1)).to(dtype) for x in (grad.dout, q))
        weights = _exp_scores(scores, lse)
        dweights = torch.einsum("bikgd,bjkd->bkgij", dout, v.to(dtype))
        dscores = weights * (dweights - delta.unsqueeze(-1)) * scale
        dq += torch.einsum("bkgij,bjkd->bikgd", dscores, k.to(dtype)).flatten(2, 3)
        dk += torch.einsum("bkgij,bikgd->bjkd", dscores, query)
        dv += torch.einsum("bkgij,bikgd->bjkd", weights, dout)


def _scores(q: Tensor, k: Tensor, intervals: Intervals, scale: float) -> Tensor:
    """Scaled scores ``[B, Hkv, G, Tq, Tk]`` in accumulator dtype, ``-inf`` outside the intervals."""
    dtype, kv_heads = accumulator_dtype(q.dtype), k.shape[2]
    query = q.to(dtype).unflatten(2, (kv_heads, -1)) * scale
    scores = torch.einsum("bikgd,bjkd->bkgij", query, k.to(dtype))
    key = torch.arange(k.shape[1], device=k.device)
    intervals = intervals.of_heads(q.shape[2]).to(k.device)
    seen = (key >= intervals.start.unsqueeze(-1)) & (key < intervals.end.unsqueeze(-1))  # [B|1, H|1, Tq, Tk]
    seen = seen.unsqueeze(2) if seen.shape[1] == 1 else seen.unflatten(1, (kv_heads, -1))
    return scores.masked_fill(~seen, -torch.inf)


def _exp_scores(scores: Tensor, lse: Tensor) -> Tensor:
    """``exp(scores - lse)``, 0 in rows whose lse is ``-inf``."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
