"""What `seqpar plan-offload` says of a plan: a table, what binds, advice; or JSON."""

from __future__ import annotations

import io
import json
import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from . import offload_costs as costs
from .offload_costs import Outcome, Pool, Setup
from .offload_devices import PRICES_OF

if TYPE_CHECKING:
    from .plan_offload import Plan, PlanOffloadConfig

WIDTH = 100  # where no terminal says how wide it is


def binding(plan: Plan) -> str:
    """What holds the better way with workers back.

    One of link, worker bandwidth, worker compute, model compute, memory, batch. "memory" and "batch": weights are read
    for too few sequences; workers have no memory for more, or --batch or --token-ms allows no more.
    """
    setup, best, step = plan.setup, plan.best, plan.best.step
    if best is plan.rotation:
        turns = {"model": 2 * step.model, "worker": 2 * step.attention, "link": max(2 * step.busy, step.sequence)}
    else:
        turns = {"model": step.model, "worker": step.attention, "link": step.network}
    most = max(turns, key=lambda name: turns[name])  # the first of equals
    if most == "link":
        return most
    shape = setup.shape
    if most == "worker":
        read = shape.kv_bytes(setup.context, setup.size) / setup.workers.bandwidth
        computed = 4 * shape.layers * shape.heads * shape.head_dim * setup.context / setup.workers.flops
        return "worker bandwidth" if read >= computed else "worker compute"
    if step.model <= 2 * shape.computing * best.each / setup.model.flops / setup.model.count * (1 + 1e-9):
        return "model compute"
    return "memory" if best.batch == best.most else "batch"


def advice(plan: Plan, bandwidth: float) -> str:
    """A sentence or two; `bandwidth`: the least that the user's share of transfers allows."""
    best = plan.best
    if plan.alone is None:
        return "Without workers it can't be done. " + _remedy(plan, bandwidth)
    if plan.alone.per_dollar > best.per_dollar:
        gain = plan.alone.per_dollar / best.per_dollar
        return f"Don't offload here: without workers a dollar buys {gain:.2f} times as many tokens."
    return _remedy(plan, bandwidth)


def _remedy(plan: Plan, bandwidth: float) -> str:
    """For what binds."""
    setup, step, bound = plan.setup, plan.best.step, binding(plan)
    if bound == "link":
        if step.latency > step.transfer:
            return f"Messages on their way take {_ms(step.latency)} ms a token: a transport of shorter latency helps."
        return f"Use faster links, of {bandwidth / 1e9:.1f} GB/s or more, or cut sequences in fewer segments."
    if bound.startswith("worker"):
        enough = math.ceil(setup.workers.count * step.attention / step.model)
        return f"Workers are slower than the model: about {enough} of them would keep up with it at this batch."
    if bound == "model compute":
        return "The model's devices compute all the time: more of them help, workers or links don't."
    even = costs.balance(setup)
    until = "" if even is None else f", up to two batches of {even:,.0f}"
    remedy = "More memory on workers" if bound == "memory" else "A larger batch"
    return f"{remedy} helps: further sequences cost the model's devices nothing{until}."


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def as_json(plan: Plan, config: PlanOffloadConfig) -> str:
    """One line. Bytes, seconds, and dollars per hour; null where a way isn't possible."""
    setup, best = plan.setup, plan.best
    bandwidth = costs.minimum_bandwidth(setup, best.each, config.transfer_share)
    figures = {
        "model": vars(setup.shape),
        "context": setup.context,
        "dtype": config.dtype,
        "devices": {"name": config.device, **vars(setup.model)},
        "workers": {"name": config.worker, **vars(setup.workers)},
        "segments": setup.segments,
        "wire_bytes": _wire(setup, best.each),
        "minimum_bandwidth": bandwidth,
        "balance_batch": costs.balance(setup),
        "alone": _figures(plan.alone, plan.pool.count),
        "sequence": _figures(plan.sequence, setup.model.count),
        "rotation": _figures(plan.rotation, setup.model.count),
        "best": "rotation" if best is plan.rotation else "sequence",
        "binds": binding(plan),
        "advice": advice(plan, bandwidth),
    }
    return json.dumps(figures)


def _wire(setup: Setup, batch: int) -> dict[str, float]:
    """Per layer and step of one batch: by heads, and by as many segments as are planned, or one for each worker."""
    parts = setup.segments if setup.segments > 1 else max(2, setup.workers.count)
    return {
        "batch": batch,
        "by_heads": costs.wire_bytes(setup.shape, batch, setup.size),
        "by_segments": costs.wire_bytes(setup.shape, batch, setup.size, parts),
        "compared_segments": parts,
        "headers": setup.headers,
    }


def _figures(way: Outcome | None, devices: int) -> dict[str, float | None] | None:
    if way is None:
        return None
    return {
        "devices": devices,
        "batch": way.batch,
        "largest_batch": way.most,
        "model_seconds": way.step.model,
        "attention_seconds": way.step.attention,
        "network_seconds": way.step.network,
        "token_seconds": way.seconds,
        "tokens_per_second": way.speed,
        "dollars_per_hour": way.dollars,
        "tokens_per_dollar": None if math.isinf(way.per_dollar) else way.per_dollar,
    }


def as_text(plan: Plan, config: PlanOffloadConfig) -> str:
    """A table of the three ways, and lines below it."""
    setup, best = plan.setup, plan.best
    wire = _wire(setup, best.each)
    bandwidth = costs.minimum_bandwidth(setup, best.each, config.transfer_share)
    each = setup.shape.kv_bytes(setup.context, setup.size)
    placed = "by heads" if setup.segments == 1 else f"{setup.segments} segments"
    of_batch = f"of {best.each:,}" + (", one of two" if best is plan.rotation else "")
    lines = [
        f"{config.model or 'a model'}: {setup.shape.parameters / 1e9:,.1f} B parameters in {config.dtype}, "
        f"{setup.context:,} tokens of context, {_gb(each)} GB of K and V each",
        f"model    {_described(config.device, setup.model)}",
        f"workers  {_described(config.worker, setup.workers)}, {placed}",
        f"link     {setup.link / 1e9:g} GB/s and {setup.latency * 1e6:g} us, {setup.links} at once",
        "",
        *_table(plan, config).splitlines(),
        "",
        f"on the wire per layer (batch {of_batch}): {wire['by_heads']:,.0f} B by heads, {wire['by_segments']:,.0f} B "
        f"by {wire['compared_segments']} segments, and {setup.headers:,} B of headers",
        f"each link needs {bandwidth / 1e9:.1f} GB/s for transfers to take {config.transfer_share:.0%} of model and "
        "attention",
        _balanced(setup),
        f"binds: {binding(plan)}. {advice(plan, bandwidth)}",
        f"Prices not given are examples, from lists of {PRICES_OF}: give your own.",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _balanced(setup: Setup) -> str:
    even = costs.balance(setup)
    if even is None:
        return "workers are faster than the model at any batch"
    if even < 1:
        return "workers are slower than the model at any batch"
    return f"model and workers balance at two batches of {even:,.1f}"


def _described(name: str, pool: Pool) -> str:
    rates = f"{pool.flops / 1e12:,.1f} TFLOP/s, {_gb(pool.memory)} GB, {pool.bandwidth / 1e9:,.0f} GB/s"
    return f"{pool.count} x {name}: {rates} to use, ${pool.price:,.2f}/h each"


def _gb(count: float) -> str:
    return f"{count / 1e9:,.3g}"


def _table(plan: Plan, config: PlanOffloadConfig) -> str:
    ways = [plan.alone, plan.sequence, plan.rotation]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for title in (f"{plan.pool.count} x {config.device} alone", "workers, in sequence", "two batches in rotation"):
        table.add_column(title, justify="right")
    rows = {
        "$ per hour": lambda way: f"{way.dollars:,.2f}",
        "largest batch in memory": lambda way: f"{way.most:,}",
        "batch": lambda way: f"{way.batch:,}",
        "model, ms": lambda way: _ms(way.step.model),
        "attention, ms": lambda way: _ms(way.step.attention),
        "network, ms": lambda way: _ms(way.step.network),
        "time per token, ms": lambda way: _ms(way.seconds),
        "tokens/s": lambda way: f"{way.speed:,.0f}",
        "tokens per $": lambda way: f"{way.per_dollar:,.0f}",
    }
    for name, value in rows.items():
        table.add_row(name, *(value(way) if way else "-" for way in ways))
    out = io.StringIO()
    Console(file=out, width=WIDTH, highlight=False, markup=False).print(table)
    return out.getvalue()
