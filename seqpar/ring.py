"""Ring attention: shards of K and V pass by while this rank's queries attend to one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seqpar.comm import KeyValues
from seqpar.kernels import Kernel, OutputGradient, Partial, accumulator_dtype

if TYPE_CHECKING:
    from .planning import Plan


def forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, kernel: Kernel,
    repeats: tuple[int, ...] = (),
) -> Partial:  # fmt: skip
    """q ``[B, T, H, D]`` and k, v ``[B, T, Hkv, D]`` are this rank's tokens; so are the partial's out and lse.

    ``sinks [H]`` are one more key per query, of score ``sinks[h]`` and value 0: the partial that the others continue.
    ``repeats``: how often kernels are given each KV head, where the heads of a rank are uneven; it travels once.
    """
    partial = None
    if sinks is not None:
        partial = Partial.empty(q, v.shape[-1])
        partial.lse.copy_(sinks.view(1, -1, 1).expand_as(partial.lse))
    blocks = plan.work.blocks
    last = max((step for step, block in enumerate(blocks) if block.pairs), default=None)
    for step, (block, (key, value)) in enumerate(zip(blocks, plan.exchange(k, v), strict=True)):
        if block.pairs and q.shape[2]:  # Ulysses may leave a rank without heads
            key, value = (_repeated(x, repeats) for x in (key, value))
            partial = kernel.forward(q, key, value, block.intervals, scale, partial, final=step == last)
    return partial or Partial.empty(q, v.shape[-1])


def backward(
    plan: Plan, grad: OutputGradient, q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: Kernel,
    repeats: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of this rank's tokens, in accumulator dtype. K and V pass by again; dK and dV follow them home."""
    dtype = accumulator_dtype(q.dtype)
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    exchange = plan.exchange(k, v)
    for block, (key, value) in zip(plan.work.blocks, exchange, strict=True):
        dkv = KeyValues.zeros(k, v, len(block.keys), dtype)
        if block.pairs and q.shape[2]:
            parts = [_repeated(x, repeats) for x in (dkv.k, dkv.v)]  # themselves, where nothing repeats
            key, value = (_repeated(x, repeats) for x in (key, value))
            kernel.backward(grad, q, key, value, block.intervals, scale, dq, *parts)
            for into, part in zip((dkv.k, dkv.v), parts, strict=True):
                if part is not into:
                    for kv_head, each in enumerate(part.split(repeats, 2)):
                        into[:, :, kv_head] = each.sum(2)
        exchange.give_back(dkv)
    home = exchange.home()
    return dq, home.k, home.v


def _repeated(x: Tensor, repeats: tuple[int, ...]) -> Tensor:
    """K or V with each KV head so often, neighbours; itself where each is there once."""
    if max(repeats, default=1) == 1:
        return x
    heads = [kv_head for kv_head, count in enumerate(repeats) for _ in range(count)]
    return x.index_select(2, torch.tensor(heads, device=x.device))


def sinks_gradient(grad: OutputGradient, sinks: Tensor) -> Tensor:
    """dsinks ``[H]``, from this rank's queries: a sink has value 0, so its ``dS`` is ``P * (0 - delta)``."""
    share = (sinks.to(grad.lse.dtype).view(1, -1, 1) - grad.lse).exp().nan_to_num_(nan=0.0)  # a sink of -inf alone
    return -(share * grad.delta()).sum((0, 2))
