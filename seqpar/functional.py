"""The functions a model calls: attention over a plan, and the mean loss over all ranks' tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar.comm import Group, World, connect

from .operators import attention_op
from .planning import Plan
from .validation import check_types


class AttentionOutput(NamedTuple):
    """``out [B, T, H, Dv]`` in q's dtype, and ``lse [B, H, T]``, natural log, fp32 (fp64 for fp64 inputs)."""

    out: Tensor
    lse: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Exact attention over the plan's whole sequence, of which each rank holds its tokens.

    Args:
        q: local queries ``[B, T, H, D]``, as ``plan.shard`` deals them; any strides.
        k: local keys ``[B, T, Hkv, D]``; query head ``h`` reads KV head ``h // (H // Hkv)``, never expanded.
        v: local values ``[B, T, Hkv, Dv]``.
        plan: from :func:`seqpar.plan`, the same on every rank.
        scale: of the scores; ``D ** -0.5`` by default.
        sinks: learnable softmax offsets ``[H]``: one more key per head, of value 0. The gradient is this rank's part.
        kernel: ``auto`` for the fastest that repeats bitwise, or one by name: ``cpu``, ``triton``, ``triton_atomic``,
            ``library``, ``reference``, ...; see docs/design.md.

    Returns:
        ``[B, T, H, Dv]``, local, in q's dtype; zeros where a query sees no key.

    Raises:
        ValueError: before anything is sent, for inputs that are wrong: on every rank at the first call with a plan, on
            this rank at later ones. And on every rank where the first calls of some kind differ between ranks.

    Under autocast, q, k and v are cast as ``scaled_dot_product_attention`` casts them. Differentiable once, in reverse
    mode. Keep the plan until the backward where the call is compiled: a graph knows it only by number.
    """
    return _attend(q, k, v, plan, scale, sinks, kernel, wants_lse=False).out


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    kernel: str = "auto",
) -> AttentionOutput:
    """As :func:`attention`, with the log-sum-exp of each query's scores (sinks included), also differentiable.

    ``lse`` is ``-inf`` where a query sees no key.
    """
    return _attend(q, k, v, plan, scale, sinks, kernel, wants_lse=True)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float | None,
    sinks: Tensor | None,
    kernel: str,
    wants_lse: bool,
) -> AttentionOutput:
    if not isinstance(plan, Plan):
        raise ValueError(f"plan: got {type(plan).__name__}, expected the result of seqpar.plan(...)")
    check_types(plan, q, k, v, sinks, scale, kernel)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    if scale is None:
        scale = (q.shape[-1] if q.dim() and q.shape[-1] else 1) ** -0.5
    out, lse, *_ = attention_op(q, k, v, sinks, plan.handle, float(scale), kernel, wants_lse)
    return AttentionOutput(out, lse)


def token_mean(loss_sum: Tensor, num_tokens: Tensor | int, group: Group) -> Tensor:
    """The mean loss per valid token over all ranks, whose gradient is right where DDP or FSDP averages gradients.

    Args:
        loss_sum: the sum of this rank's token losses, a scalar.
        num_tokens: how many valid tokens it is the sum of; ranks may have different numbers, also none.
        group: all ranks over which gradients are averaged (data parallel x sequence parallel).

    Returns:
        ``sum(loss_sum) / sum(num_tokens)``, the same on every rank (0 where there are no tokens at all). Its gradient
        with respect to ``loss_sum`` is ``world / sum(num_tokens)``: averaged over ranks, it is the true gradient.
    """
    for name, value in (("loss_sum", loss_sum), ("num_tokens", num_tokens)):
        if isinstance(value, Tensor) and value.dim():
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected a scalar; sum it")
    return _TokenMean.apply(loss_sum, num_tokens, connect(group))


class _TokenMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor, num_tokens: Tensor | int, world: World) -> Tensor:
        count = torch.as_tensor(num_tokens, dtype=torch.float64, device=loss_sum.device)
        total, tokens = world.all_reduce(torch.stack([loss_sum.detach().double(), count]), "reduce")
        share = torch.where(tokens == 0, 0.0, 1.0 / tokens)
        ctx.scale = (world.size * share).to(loss_sum.dtype)
        return (total * share).to(loss_sum.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.scale, None, None
