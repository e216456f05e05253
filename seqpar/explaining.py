"""Plans in words, for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from seqpar.kernels import AUTO, DIRECTIONS, Shape

from .reach import busiest_rows, forward_rows
from .schedules import AllGather, Ring, Tree

if TYPE_CHECKING:
    from .planning import Plan


def explain(plan: Plan) -> str:
    """The text of :meth:`Plan.explain`."""
    work, world = plan.work, plan.world
    keys = "" if plan.kv_length == plan.length else f" x {plan.kv_length:,} keys"
    pairs = work.pairs.double()
    imbalance = pairs.max() / pairs.mean().clamp(min=1)
    who, whose = "rank", "in all"
    if plan.trade is not None:  # then their shares are of heads, of all that the block holds
        who = f"block of {plan.trade.world.size} ranks"
        if work.kv_heads is not None:
            whose = f"of the {work.kv_heads} KV heads that this rank is dealt"
    lines = [
        f"{plan.mask} over {plan.length:,} tokens{keys}",
        f"layout: {plan.layout.name} on {world.size} rank(s), of which this is rank {world.rank}",
        f"work: {int(pairs.sum()):,} query-key pairs {whose}, busiest {who} / mean {imbalance:.3f}",
        f"schedule: {plan.schedule}: {work.exchange} exchange, {_why(plan)}",
        *_candidates(plan),
        *_bytes(plan),
        *_kernels(plan),
        f"step  keys of rank  rows       pairs{', rows of one KV head each' if work.single else ''}",
    ]
    for step, block in enumerate(work.blocks):
        source = "all others" if block.source is None else block.source
        rows = block.rows * (work.kv_heads or 1) if work.single and block.keys is not None else block.rows
        lines.append(f"{step:>4}  {source:>12}  {rows:<9,}  {block.pairs:,}")
    return "\n".join(lines)


def _why(plan: Plan) -> str:
    if plan.trade is not None:
        return (
            f"among those with the same heads, of which there are {plan.trade.plan.world.size}: {_why(plan.trade.plan)}"
        )
    if plan.world.size == 1:
        return "nothing travels"
    if isinstance(plan.schedule, Tree):
        whose = "every rank holds all queries" if plan.replicated else "queries are gathered"
        return f"{whose}, keys stay where they are, and partial results are merged"
    if isinstance(plan.schedule, AllGather):
        return "every rank holds all keys at once"
    if not isinstance(plan.schedule, Ring):
        return f"around rings of {plan.work.inside}, and between them"
    forward = busiest_rows(forward_rows(plan.layout.keys)) * (plan.work.kv_heads or 1)
    direct = busiest_rows(plan.work.needed)
    chosen = "chosen" if plan.schedule.exchange == "auto" or plan.decision is not None else "asked for"
    rows = "rows" if plan.work.kv_heads is None else "rows of one KV head each"
    return f"{chosen}; the busiest rank moves {forward:,} {rows} passing shards on, {direct:,} sending them directly"


def _candidates(plan: Plan) -> list[str]:
    """What ``auto`` compared: what each would cost the rank that it costs most."""
    decision = plan.decision
    if decision is None:
        return []
    rates, ranked = decision.rates, sorted(decision.candidates, key=lambda c: c.cost.seconds)
    lines = [
        f"auto: {rates.forward / 1e9:,.0f} and {rates.backward / 1e9:,.0f} GFLOP/s forward and backward, "
        f"{rates.bandwidth / 1e9:.2f} GB/s, {rates.latency * 1e6:,.0f} us a message"
        + (f"; between nodes {rates.far_bandwidth / 1e9:.2f} GB/s" if rates.far_bandwidth else ""),
        "predicted ms: forward  backward   bytes sent    memory B  layout           schedule",
    ]
    for c in ranked:
        mark = "->" if c is decision.chosen else "  "
        lines.append(
            f"{mark} {c.cost.forward * 1e3:>18.2f} {c.cost.backward * 1e3:>9.2f} {c.cost.bytes:>12,} "
            f"{c.cost.memory:>11,}  {c.layout.name:<15}  {c.schedule}{', excluded: ' if c.excluded else ''}{c.excluded}"
        )
    best = decision.chosen.cost
    why = f"kernels run for {best.kernel / best.seconds:.0%} of its time" if best.seconds else "nothing to do"
    others = [c.cost.seconds for c in ranked if c is not decision.chosen and not c.excluded]
    if others and best.seconds:
        lead = others[0] / best.seconds - 1
        ahead = f"{lead:.1%} faster than the next" if lead > 0.01 else "as fast as any, and the fewest bytes"
        why = f"{ahead}; {why}"
    return [*lines, f"chosen: {why}"]


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
    told, device = plan.told, plan.world.payload_device
    if told.heads is None or told.head_dim is None or told.dtype is None:
        return []
    shape = Shape(device, told.dtype, 1, *told.heads, *told.head_dim)
    lines = []
    for direction in DIRECTIONS:
        steps: Counter[tuple[str, str]] = Counter()
        for section in (section for block in plan.work.blocks for section in block.sections if section.pairs):
            steps[AUTO.choose(shape, section.intervals, direction)] += 1
        chosen = ", ".join(f"{kernel} in {count} call(s) ({why})" for (kernel, why), count in steps.items())
        lines.append(f"kernel='auto' on {device}, {direction}: {chosen or 'none'}")
    return lines
