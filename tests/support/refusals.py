"""Ranks that do something wrong, and what they are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import seqpar
from seqpar.comm import World

Arguments = Callable[[int], dict[str, Any]]


def plan_wrongly(world: World, arguments: Arguments) -> str | None:
    """The message of the ValueError that ``seqpar.plan`` raises, None if it raises none."""
    given = {"mask": seqpar.Causal(), "length": 8, **arguments(world.rank)}
    try:
        seqpar.plan(given.pop("mask"), group=world, **given)
    except ValueError as error:
        assert set(world.meter.by_kind) <= {"agree"}, "something was sent before the refusal"
        return str(error)
    return None


def attend_wrongly(world: World, x: Tensor, arguments: Arguments) -> str | None:
    """The message of the ValueError that ``seqpar.attention`` raises, None if it raises none."""
    plan = seqpar.plan(seqpar.Causal(), length=x.shape[1], group=world)
    given = arguments(world.rank)
    options = {name: value for name, value in given.items() if name in ("scale", "sinks", "kernel")}
    try:
        if "plan" in given:  # all agree on a plan each, and then use different ones
            plans = [seqpar.plan(mask, length=x.shape[1], group=world) for mask in (seqpar.Full(), seqpar.Causal())]
            plan = plans[given["plan"] == seqpar.Causal()]
        seqpar.attention(*[_local(plan, given.get(name, x), x) for name in "qkv"], plan, **options)
    except ValueError as error:
        assert set(world.meter.by_kind) <= {"agree"}, "something was sent before the refusal"
        return str(error)
    return None


def refusal(world: World, what: str) -> str | None:
    """A plan, a call, or different calls, on which ranks disagree."""
    if what == "plan" or (what == "call" and world.rank == 0):
        return plan_wrongly(world, lambda rank: {"length": 8 + rank})
    x = torch.zeros(1, 8, 2, 8)
    if what == "call":
        plan = seqpar.plan(seqpar.Causal(), length=8)
        plan.world, held = world, plan.layout
        plan.layout = replace(held, queries=held.queries * 2, keys=held.keys * 2)
        try:
            seqpar.attention(x, x, x, plan)
        except ValueError as error:
            return str(error)
        return None
    half = (torch.half, torch.bfloat16)
    return attend_wrongly(world, x, lambda rank: {name: x.to(half[rank]) for name in "qkv"})


def _local(plan: seqpar.Plan, given: Any, whole: Tensor) -> Any:
    """This rank's tokens of ``given``, which is left as it is where it does not have the plan's length."""
    fits = (
        isinstance(given, Tensor)
        and not given.is_sparse
        and given.dim() == 4
        and given.shape[1] == whole.shape[1]
        and given.device == whole.device
    )
    return plan.shard(given) if fits else given
