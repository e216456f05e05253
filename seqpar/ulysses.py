"""Ulysses: tokens are traded for heads, an inner schedule attends, and heads are traded back.

Over one group the inner schedule has a single rank, which holds every token of its heads; over blocks of a group it is
a ring (or another schedule) between blocks, and the whole a hybrid (Fang & Zhao 2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from seqpar.comm import Dealt, to_heads, to_tokens
from seqpar.kernels import Kernel, OutputGradient

from . import ring
from .dealing import Hands, deal_heads

if TYPE_CHECKING:
    from .planning import Plan
    from .trading import Trade


class Traded(NamedTuple):
    """What the backward needs of the forward: this rank's heads of all tokens; lse fp32 (fp64)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


def forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, kernel: Kernel,
    wants_lse: bool,
) -> tuple[Tensor, Tensor, Traded]:  # fmt: skip
    """q ``[B, T, H, D]`` and k, v ``[B, T, Hkv, D]`` are this rank's tokens; so are out and lse. Dual: backward."""
    trade = _trade(plan)
    hands, tokens, keys = _dealing(plan, q, k)
    q_dealt, k_dealt, v_dealt = to_heads(trade.world, (q, k, v), (tokens, keys, keys), "trade")
    my_sinks = None if sinks is None else sinks[hands.queries[trade.world.rank]]
    partial = ring.forward(
        trade.plan, q_dealt, k_dealt, v_dealt, my_sinks, scale, kernel, hands.repeats[trade.world.rank]
    )
    their_out = partial.out.to(q.dtype)
    (out,) = to_tokens(trade.world, (their_out,), (tokens,), (q.shape[2],), "out")
    lse = partial.lse.new_zeros(q.shape[0], q.shape[2], q.shape[1])
    if wants_lse:
        (column,) = to_tokens(trade.world, (_column(partial.lse),), (tokens,), (q.shape[2],), "lse")
        lse = _row(column)
    return out, lse, Traded(q_dealt, k_dealt, v_dealt, their_out, partial.lse)


def backward(
    plan: Plan, dout: Tensor, dlse: Tensor | None, flat: list[Tensor], q: Tensor, k: Tensor, v: Tensor,
    sinks: Tensor | None, scale: float, kernel: Kernel,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of this rank's tokens, and its part of dsinks (empty without sinks); ``flat`` is what was traded."""
    trade = _trade(plan)
    hands, tokens, keys = _dealing(plan, q, k)
    traded = _unflatten(flat, q, v, tokens, keys, trade.world.rank)
    (dout,) = to_heads(trade.world, (dout,), (tokens,), "dout")
    if dlse is not None:
        dlse = _row(to_heads(trade.world, (_column(dlse),), (tokens,), "dlse")[0])
    grad = OutputGradient(traded.out, traded.lse, dout, dlse)
    repeats = hands.repeats[trade.world.rank]
    summed = ring.backward(trade.plan, grad, traded.q, traded.k, traded.v, scale, kernel, repeats)
    grads = [g.to(q.dtype) for g in summed]
    num_heads = q.shape[2], k.shape[2], k.shape[2]
    dq, dk, dv = to_tokens(trade.world, grads, (tokens, keys, keys), num_heads, "trade")
    if sinks is None:
        return dq, dk, dv, q.new_empty(0)
    mine, dsinks = hands.queries[trade.world.rank], torch.zeros_like(sinks)
    dsinks[mine] = ring.sinks_gradient(grad, sinks[mine]).to(sinks.dtype)
    return dq, dk, dv, dsinks


def _unflatten(flat: list[Tensor], q: Tensor, v: Tensor, tokens: Dealt, keys: Dealt, rank: int) -> Traded:
    num_tokens, num_keys = (sum(map(len, dealt.places)) for dealt in (tokens, keys))
    heads, kv_heads = (dealt.heads[rank].stop - dealt.heads[rank].start for dealt in (tokens, keys))
    batch, dim, value_dim = q.shape[0], q.shape[3], v.shape[3]
    return Traded(
        flat[0].view(batch, num_tokens, heads, dim),
        flat[1].view(batch, num_keys, kv_heads, dim),
        flat[2].view(batch, num_keys, kv_heads, value_dim),
        flat[3].view(batch, num_tokens, heads, value_dim),
        flat[4].view(batch, heads, num_tokens),
    )


def _trade(plan: Plan) -> Trade:
    assert plan.trade is not None, "this plan trades no heads"
    return plan.trade


def _dealing(plan: Plan, q: Tensor, k: Tensor) -> tuple[Hands, Dealt, Dealt]:
    """How query heads and KV heads are dealt, and where the tokens of each rank stand among those traded."""
    trade = _trade(plan)
    hands = deal_heads(q.shape[2], k.shape[2], trade.world.size)
    queries, keys = trade.places(q.device)
    return hands, Dealt(hands.queries, queries), Dealt(hands.keys, keys)


def _column(lse: Tensor) -> Tensor:
    """``[B, H, T]`` as ``[B, T, H, 1]``, as tensors of tokens are."""
    return lse.transpose(1, 2).unsqueeze(-1)


def _row(lse: Tensor) -> Tensor:
    return lse.squeeze(-1).transpose(1, 2).contiguous()
