"""Plans in words, for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from seqpar.kernels import AUTO, DIRECTIONS, Shape

from .itinerary import busiest_rows, forward_rows
from .schedules import Ring

if TYPE_CHECKING:
    from .planning import Plan


def explain(plan: Plan) -> str:
    """The text of :meth:`Plan.explain`."""
    work, world = plan.work, plan.world
    keys = "" if plan.kv_length == plan.length else f" x {plan.kv_length:,} keys"
    pairs = work.pairs.double()
    imbalance = pairs.max() / pairs.mean().clamp(min=1)
    lines = [
        f"{plan.mask} over {plan.length:,} tokens{keys}",
        f"layout: {plan.layout.name} on {world.size} rank(s), of which this is rank {world.rank}",
        f"work: {int(pairs.sum()):,} query-key pairs in all, busiest rank / mean {imbalance:.3f}",
        f"schedule: {plan.schedule}: {work.exchange} exchange, {_why(plan)}",
        *_bytes(plan),
        *_kernels(plan),
        "step  keys of rank  rows       pairs",
    ]
    for step, block in enumerate(work.blocks):
        source = "all others" if block.source is None else block.source
        lines.append(f"{step:>4}  {source:>12}  {len(block.keys):<9,}  {block.pairs:,}")
    return "\n".join(lines)


def _why(plan: Plan) -> str:
    if plan.trade is not None:
        return (
            f"among those with the same heads, of which there are {plan.trade.plan.world.size}: {_why(plan.trade.plan)}"
        )
    if plan.world.size == 1:
        return "nothing travels"
    if not isinstance(plan.schedule, Ring):
        return "every rank holds all keys at once"
    forward, direct = busiest_rows(forward_rows(plan.layout.keys)), busiest_rows(plan.work.needed)
    chosen = "chosen" if plan.schedule.exchange == "auto" else "asked for"
    return f"{chosen}; the busiest rank moves {forward:,} rows passing shards on, {direct:,} sending them directly"


def _bytes(plan: Plan) -> list[str]:
    told = plan.told
    if told.heads is None or told.head_dim is None or told.dtype is None:
        return ["bytes, kernels: give the plan heads, head_dim and dtype to see them"]
    sent = [plan.traffic(1, told.heads, told.head_dim, told.dtype, rank) for rank in range(plan.world.size)]
    return [
        f"bytes sent per layer and batch row, {way}: {sent[plan.world.rank][way].bytes:,} by this rank in "
        f"{sent[plan.world.rank][way].calls} messages, {max(s[way].bytes for s in sent):,} by the busiest, "
        f"{sum(s[way].bytes for s in sent):,} in all"
        for way in ("forward", "backward")
    ]


def _kernels(plan: Plan) -> list[str]:
    """Which kernels ``kernel="auto"`` is on the device that this rank computes on, as far as a plan can know it."""
    told, device = plan.told, plan.world.control_device
    if told.heads is None or told.head_dim is None or told.dtype is None:
        return []
    if device.type == "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    shape = Shape(device, told.dtype, 1, *told.heads, *told.head_dim)
    lines = []
    for direction in DIRECTIONS:
        steps: Counter[tuple[str, str]] = Counter()
        for block in plan.work.blocks:
            if block.pairs:
                steps[AUTO.choose(shape, block.intervals, direction)] += 1
        chosen = ", ".join(f"{kernel} in {count} step(s) ({why})" for (kernel, why), count in steps.items())
        lines.append(f"kernel='auto' on {device}, {direction}: {chosen or 'none'}")
    return lines
