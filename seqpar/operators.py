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

from . import registry, ring, tree, ulysses
from .schedules import Tree
from .validation import admit

Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("seqpar::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    plan: int,
    scale: float,
    kernel: str,
    wants_lse: bool,
) -> Seven:
    """out ``[B, T, H, Dv]`` in q's dtype, lse ``[B, H, T]`` in accumulator dtype (NaN unless wanted, in Ulysses).

    And what the backward needs besides, flat: in Ulysses q, k, v, out and lse as they were traded; in Tree the queries
    that were gathered; else nothing.
    """
    found = registry.find(plan)
    backend = admit(found, q, k, v, sinks, scale, kernel, wants_lse)
    with torch.autocast(q.device.type, enabled=False):
        if found.trade is not None:
            out, lse, traded = ulysses.forward(found, q, k, v, sinks, scale, backend, wants_lse)
            flat = [x.view(-1) for x in traded]
            return out, lse, flat[0], flat[1], flat[2], flat[3], flat[4]
        if isinstance(found.schedule, Tree):
            out, lse, gathered = tree.forward(found, q, k, v, sinks, scale, backend)
            nothing = [x.new_empty(0) for x in (q, q, q, lse)]
            return out, lse, gathered.view(-1), nothing[0], nothing[1], nothing[2], nothing[3]
        partial = ring.forward(found, q, k, v, sinks, scale, backend)
    nothing = [x.new_empty(0) for x in (q, q, q, q, partial.lse)]
    return partial.out.to(q.dtype), partial.lse, nothing[0], nothing[1], nothing[2], nothing[3], nothing[4]


@torch.library.custom_op("seqpar::attention_backward", mutates_args=())
def attention_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    traded: list[Tensor],
    sinks: Tensor | None,
    plan: int,
    scale: float,
    kernel: str,
    wants_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dsinks (empty without sinks), in their inputs' dtypes."""
    found, backend = registry.find(plan), kernel_named(kernel)
    with torch.autocast(q.device.type, enabled=False):
        if found.trade is not None:
            if wants_lse and dlse is None:  # other ranks may have one: what is traded must not depend on it
                dlse = torch.zeros(lse.shape, dtype=lse.dtype, device=lse.device)
            return ulysses.backward(found, dout, dlse, traded, q, k, v, sinks, scale, backend)
        if isinstance(found.schedule, Tree):
            if wants_lse and dlse is None and not found.replicated:  # as above: other ranks may have one
                dlse = torch.zeros(lse.shape, dtype=lse.dtype, device=lse.device)
            dq, dk, dv, dsinks = tree.backward(found, dout, dlse, traded[0], q, k, v, out, lse, sinks, scale, backend)
        else:
            grad = OutputGradient(out, lse, dout, dlse)
            dq, dk, dv = ring.backward(found, grad, q, k, v, scale, backend)
            dsinks = q.new_empty(0) if sinks is None else ring.sinks_gradient(grad, sinks).to(sinks.dtype)
    copy = dk.dtype == k.dtype  # dk and dv are views of one message, which an operator may not return
    return dq.to(q.dtype), dk.to(k.dtype, copy=copy), dv.to(v.dtype, copy=copy), dsinks


@attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    plan: int,
    scale: float,
    kernel: str,
    wants_lse: bool,
) -> Seven:
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=accumulator_dtype(q.dtype))
    # Which plan it will be, and so how much is traded, is known when the graph runs.
    flat = [x.new_empty(torch.library.get_ctx().new_dynamic_size()) for x in (q, k, v, q, lse)]
    out = q.new_empty(batch, tokens, heads, v.shape[-1])
    return out, lse, flat[0], flat[1], flat[2], flat[3], flat[4]


@attention_backward_op.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    traded: list[Tensor],
    sinks: Tensor | None,
    plan: int,
    scale: float,
    kernel: str,
    wants_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _save(ctx: Any, inputs: tuple, output: Seven) -> None:
    q, k, v, sinks, ctx.plan, ctx.scale, ctx.kernel, ctx.wants_lse = inputs
    # The graph keeps the plan alive. A compiled graph knows no plan, only a number: there its caller must.
    ctx.alive = registry.find(ctx.plan) if isinstance(ctx.plan, int) else None
    saved: tuple[Tensor, ...] = (q, k, v, *output[:2])
    if ctx.alive is not None and ctx.alive.trade is not None:  # of these the backward reads the shapes alone
        saved = tuple(x.new_empty(()).expand(x.shape) for x in saved)
    ctx.save_for_backward(sinks, *saved, *output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    sinks, q, k, v, out, lse, *traded = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dsinks = attention_backward_op(
        dout, dlse, q, k, v, out, lse, traded, sinks, ctx.plan, ctx.scale, ctx.kernel, ctx.wants_lse
    )
    return dq, dk, dv, None if sinks is None else dsinks, None, None, None, None


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
