"""What a rank does in a test. Functions here run as threads (loopback) and as processes (gloo) alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import seqpar
from seqpar.comm import World

from .cases import MASKS, layout_of

GRADS = ("q", "k", "v", "sinks")


def attend(
    world: World,
    mask: str,
    layout: str,
    inputs: dict[str, Tensor],
    *,
    schedule: Any = "ring",
    kernel: str = "auto",
    sinks: bool = False,
    lse: bool = False,
) -> dict[str, Tensor]:
    """Whole out and lse, and the gradients of the whole inputs, as this rank comes to know them; and what it sent."""
    case = MASKS[mask]
    plan = seqpar.plan(
        case.mask,
        length=case.length,
        kv_length=case.kv_length,
        group=world,
        layout=layout_of(case, layout, world.size),
        schedule=schedule,
    )
    whole = {name: inputs[name].clone().requires_grad_() for name in ("q", "k", "v", "sinks")}
    world.meter.reset()
    out, local_lse = seqpar.attention_with_lse(
        plan.shard(whole["q"]),
        plan.shard(whole["k"], of="keys"),
        plan.shard(whole["v"], of="keys"),
        plan,
        sinks=whole["sinks"] if sinks else None,
        kernel=kernel,
    )
    moved = dict(world.meter.by_kind)
    whole_out, whole_lse = plan.unshard(out), plan.unshard(local_lse, dim=2)
    objective = (whole_out.double() * inputs["dout"].double()).sum()
    if lse:
        seen = whole_lse.isfinite()
        objective = objective + (whole_lse[seen].double() * inputs["dlse"][seen].double()).sum()
    wanted = [whole[name] for name in GRADS if sinks or name != "sinks"]
    grads = torch.autograd.grad(objective, wanted)
    result = {"out": whole_out.detach(), "lse": whole_lse.detach(), **dict(zip(GRADS, grads, strict=False))}
    if sinks:  # a parameter: each rank has its part
        result["sinks"] = world.all_reduce(result["sinks"], "test")
    return result | {"forward": moved, "both": dict(world.meter.by_kind)}
