"""Attention as operators of ``torch.library``: opaque to compilers, visible to selective checkpointing.

An operator takes tensors and numbers, so a plan goes in by its number. Everything that may be wrong is checked inside,
where a compiled graph cannot have traced it away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from seqpar.kernels import OutputGradient, accumulator_dtype, kernel_named

from . import registry, ring
from .validation import admit


@torch.library.custom_op("seqpar::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: int, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """out ``[B, T, H, Dv]`` in q's dtype, lse ``[B, H, T]`` in accumulator dtype."""
    found = registry.find(plan)
    backend = admit(found, q, k, v, sinks, scale, kernel)
    with torch.autocast(q.device.type, enabled=False):
        partial = ring.forward(found, q, k, v, sinks, scale, backend)
    return partial.out.to(q.dtype), partial.lse


@torch.library.custom_op("seqpar::attention_backward", mutates_args=())
def attention_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    plan: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dsinks (empty without sinks), in their inputs' dtypes."""
    grad = OutputGradient(out, lse, dout, dlse)
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv = ring.backward(registry.find(plan), grad, q, k, v, scale, kernel_named(kernel))
        dsinks = q.new_empty(0) if sinks is None else ring.sinks_gradient(grad, sinks).to(sinks.dtype)
    copy = dk.dtype == k.dtype  # dk and dv are views of one message, which an operator may not return
    return dq.to(q.dtype), dk.to(k.dtype, copy=copy), dv.to(v.dtype, copy=copy), dsinks


@attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: int, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=accumulator_dtype(q.dtype))
    return q.new_empty(batch, tokens, heads, v.shape[-1]), lse


@attention_backward_op.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    plan: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, ctx.plan, ctx.scale, ctx.kernel = inputs
    ctx.save_for_backward(q, k, v, sinks, *output)
    ctx.set_materialize_grads(False)
    # The graph keeps the plan alive. A compiled graph knows no plan, only a number: there its caller must.
    ctx.alive = registry.find(ctx.plan) if isinstance(ctx.plan, int) else None


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, sinks, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dsinks = attention_backward_op(dout, dlse, q, k, v, out, lse, sinks, ctx.plan, ctx.scale, ctx.kernel)
    return dq, dk, dv, None if sinks is None else dsinks, None, None, None


attention_op.register_autograd(_differentiate, setup_context=_save)


def _keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    ours = op is torch.ops.seqpar.attention.default
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_context() -> tuple[Any, Any]:
    """A selective checkpoint that keeps attention's ``(out, lse)`` and recomputes all else.

    The layer then repeats neither the attention forward nor its communication::

        checkpoint(layer, x, use_reentrant=False, context_fn=seqpar.checkpoint_context)
    """
    return create_selective_checkpoint_contexts(_keep_attention)
