"""The dense oracle: softmax over a boolean matrix that is filled in pair by pair, by PyTorch's autograd, in fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Sees = Callable[[int, int, int, int], bool]  # (query, key, queries, keys) of a document -> does it see it
HeadSees = Callable[[int, int, int, int, int, int], bool]  # and the KV head, and how many there are


def dense_mask(sees: Sees, cu_q: list[int], cu_k: list[int]) -> Tensor:
    """bool ``[cu_q[-1], cu_k[-1]]``, block-diagonal in the documents."""
    mask = torch.zeros(cu_q[-1], cu_k[-1], dtype=torch.bool)
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        for i in range(q1 - q0):
            for j in range(k1 - k0):
                mask[q0 + i, k0 + j] = sees(i, j, q1 - q0, k1 - k0)
    return mask


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """out ``[B, S, H, Dv]``, lse ``[B, H, S]`` under a boolean ``[B|1, (H,) S, Skv]``; empty rows give 0 and -inf."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~(mask if mask.dim() == 4 else mask.unsqueeze(1)), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    empty = (scores == -torch.inf).all(-1)
    lse = scores.masked_fill(empty.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(empty, -torch.inf)
    weights = scores.masked_fill(empty.unsqueeze(-1), 0.0).softmax(-1).masked_fill(empty.unsqueeze(-1), 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights[..., : k.shape[1]], v), lse


def error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|`` in norm; infinities must stand in the same places."""
    got, expected = got.double(), expected.double()
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite), "infinities or NaN in other places"
    difference = (got - expected)[finite].norm()
    return float(difference / expected[finite].norm().clamp(min=1e-300)) if difference else 0.0
