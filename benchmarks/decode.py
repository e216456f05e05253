"""Decoding with a cache that is spread over ranks: time, calls, bytes and memory: ``python benchmarks/decode.py``.

One step of one layer, one new token, in turn: ours; a ring that moves K and V for the same step; and Tree Attention as
it was published, with three all-reduces (Shyam et al. 2024, algorithm 3) around the same local kernel. Then what 8 to
1,024 GPUs would take, by published rates: nothing of that is run. ``--simulate`` does that part alone.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
import torch.distributed as dist
import tyro
from measuring import Team, in_turn, median, show, teams, write
from simulate import RATES
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import seqpar
from seqpar.comm import ProcessGroupWorld, World
from seqpar.kernels import Partial
from seqpar.layouts import Layout
from seqpar.schedules import Merge
from seqpar.tree import merged, traffic

PICTURE = Path(__file__).parents[1] / "docs" / "decode.png"
RANKS, HEADS, DIM, PAGE = 4, (32, 8), 128, 64
SLACK = 4096  # tokens that may be appended to a full cache
CONTEXTS = (81_920, 655_360, 1_310_720, 5_242_880, 10_485_760)
NODE, HBM, LAUNCH = 8, 3.35e12, 10e-6  # an H100's bytes/s of memory, and seconds that launching local attention takes


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    context: int = 65_536
    """Tokens in the cache."""
    runs: int = 7
    """Steps of each contender, in turn."""
    simulate: bool = False
    """Only predict 8 to 1,024 GPUs."""


def token(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The next token's query, and its key (and value)."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(1, 1, heads, DIM, generator=generator).to(dtype) for heads in HEADS)  # type: ignore[return-value]


def ours(world: World, context: int, dtype: torch.dtype, merge: Merge = "auto") -> Callable[[], Any]:
    """Append a token and attend."""
    cache = cached(world, context, dtype, merge)
    q, kv = token(dtype)

    def step() -> tuple[Any, int, int]:
        world.meter.reset()
        out = cache.attend(q, kv, kv)
        return out.float().numpy(), world.meter.calls, world.meter.bytes

    return torch.no_grad()(step)


def cached(world: World, context: int, dtype: torch.dtype, merge: Merge = "auto") -> seqpar.KVCache:
    """A cache filled by writing to it, with the ranks' shares of the same random keys."""
    cache = seqpar.KVCache(
        seqpar.Causal(), heads=HEADS, head_dim=DIM, capacity=context + SLACK, group=world, dtype=dtype, page=PAGE,
        schedule=seqpar.Tree(merge=merge),
    )  # fmt: skip
    if context % (world.size * PAGE):
        raise ValueError(f"context: got {context}, expected a multiple of {world.size * PAGE}, a page for each rank")
    k = share(world, context, dtype)  # pages, one to each rank in turn
    cache._shard.k[0].view(HEADS[1], -1, DIM)[:, : k.shape[1]] = k[0].transpose(0, 1)
    cache._shard.v[0].copy_(cache._shard.k[0])
    cache._lengths[0][0] = cache._written[0][0] = context
    return cache


def share(world: World, context: int, dtype: torch.dtype) -> Tensor:
    """This rank's keys ``[1, T, Hkv, D]``, which are its values too."""
    generator = torch.Generator().manual_seed(world.rank)
    return torch.randn(1, context // world.size, HEADS[1], DIM, generator=generator).to(dtype)


def ring(world: World, context: int, dtype: torch.dtype, exchange: str) -> Callable[[], Any]:
    """The same step where K and V travel; the first rank has the query."""
    pages = torch.arange(context).view(-1, PAGE)
    keys = [pages[rank :: world.size].flatten().tolist() for rank in range(world.size)]
    keys[0].append(context)  # the new token's, which the first rank keeps
    queries = [[0] if rank == 0 else [] for rank in range(world.size)]
    plan = seqpar.plan(
        seqpar.Causal(), length=1, kv_length=context + 1, group=world, layout=Layout.explicit(queries, keys),
        schedule=seqpar.Ring(exchange),
    )  # fmt: skip
    (q, new), k = token(dtype), share(world, context, dtype)
    q, k = q[:, : len(plan.queries)], torch.cat([k, new], 1) if world.rank == 0 else k

    def step() -> tuple[Any, int, int]:
        world.meter.reset()
        out = seqpar.attention(q, k, k, plan)
        return out.float().numpy(), world.meter.calls, world.meter.bytes

    return torch.no_grad()(step)


def published(world: World, context: int, dtype: torch.dtype) -> Callable[[], Any]:
    """Ours, with the published merge in place of one exchange."""
    cache = cached(world, context, dtype)
    cache._levels = []  # no exchange: what it returns is this rank's part
    q, kv = token(dtype)
    found: list[Partial] = []
    attend, three = cache._append, all_reduces(world)

    def append(*args: Any) -> list[Partial]:
        found.extend(attend(*args))
        return found

    cache._append = append  # type: ignore[method-assign]

    def step() -> tuple[Any, int, int]:
        found.clear()
        cache.attend(q, kv, kv)
        return three(found[-1]).to(dtype).float().numpy(), 3, of_all_reduces(world.size, 1)

    return torch.no_grad()(step)


def first_steps(world: World, context: int, dtype: torch.dtype) -> dict[str, tuple[Any, int, int]]:
    """Of every contender its first step: output, calls and bytes; and of ours a second one, which agrees on nothing."""
    step = ours(world, context, dtype)
    found = {"ours": step(), "published": published(world, context, dtype)()}
    found |= {exchange: ring(world, context, dtype, exchange)() for exchange in ("direct", "forward")}
    return found | {"again": step()}


def all_reduces(world: World) -> Callable[[Partial], Tensor]:
    """A maximum, then numerators, then denominators."""
    assert isinstance(world, ProcessGroupWorld)

    def merge(partial: Partial) -> Tensor:
        largest = partial.lse.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=world.group)
        weight = (partial.lse - largest).exp()
        numerator = partial.out.float() * weight.transpose(1, 2).unsqueeze(-1)
        dist.all_reduce(numerator, group=world.group)
        dist.all_reduce(weight, group=world.group)
        return numerator / weight.transpose(1, 2).unsqueeze(-1)

    return merge


def of_all_reduces(ranks: int, tokens: int) -> int:
    """Bytes that a rank sends in three ring all-reduces in fp32."""
    return 2 * (ranks - 1) * tokens * (4 * HEADS[0] * DIM + 8 * HEADS[0]) // ranks


def merging(world: World, way: Literal["gather", "scatter", "published"], dtype: torch.dtype) -> Callable[[], Any]:
    """The merge of one token's partials alone, fifty times."""
    partial = Partial(torch.randn(1, 1, HEADS[0], DIM), torch.randn(1, HEADS[0], 1))
    three = all_reduces(world)

    def step() -> None:
        for _ in range(50):
            if way == "published":
                three(partial)
            else:
                merged([world], partial, dtype, way, wants_lse=False)

    return torch.no_grad()(step)


def speed(context: int, runs: int, dtype: torch.dtype) -> list[dict[str, object]]:
    """A decode step, and what it sends."""
    args = (RANKS, 1)
    with teams(
        ours=Team(*args, ours, context, dtype),
        dealt=Team(*args, ours, context, dtype, "scatter"),
        published=Team(*args, published, context, dtype),
        direct=Team(*args, ring, context, dtype, "direct"),
        ring=Team(*args, ring, context, dtype, "forward"),
    ) as members:
        seconds = in_turn(members, runs)
        results = {name: team.run()[1] for name, team in members.items()}
    names = {
        "ours": "ours",
        "dealt": "ours, heads dealt",
        "published": "three all-reduces",
        "direct": "ring, rows sent directly",
        "ring": "ring",
    }
    row, size = HEADS[0] * DIM, dtype.itemsize
    assert max(sent for _, _, sent in results["ours"]) == (RANKS - 1) * (size * row + 4 * HEADS[0]), "the formula"
    return [
        {
            "a decode step by": names[name], "ms": median(values) * 1e3,
            "ours is faster by": median([a / b for a, b in zip(values, seconds["ours"], strict=True)]),
            "calls of a rank": max(calls for _, calls, _ in results[name]),
            "bytes sent, busiest rank": max(sent for _, _, sent in results[name]),
        }
        for name, values in seconds.items()
    ]  # fmt: skip


def merges(runs: int, dtype: torch.dtype) -> list[dict[str, object]]:
    """The merge of one token alone."""
    ways = {"gather": "one packed exchange", "scatter": "two, heads dealt", "published": "three all-reduces"}
    with teams(**{way: Team(RANKS, 1, merging, way, dtype) for way in ways}) as members:
        seconds = in_turn(members, runs)
    size, row = dtype.itemsize, HEADS[0] * DIM
    sent = {
        "gather": (1, (RANKS - 1) * (size * row + 4 * HEADS[0])),
        "scatter": (2, (RANKS - 1) * (2 * size * row + 4 * HEADS[0]) // RANKS),
        "published": (3, of_all_reduces(RANKS, 1)),
    }
    return [
        {
            "merge of one token": name, "us": median(seconds[way]) / 50 * 1e6, "calls": sent[way][0],
            "bytes sent by a rank": sent[way][1],
            "of one exchange": median([a / b for a, b in zip(seconds[way], seconds["gather"], strict=True)]),
        }
        for way, name in ways.items()
    ]  # fmt: skip


def remembering(world: World, context: int, layers: int) -> Callable[[], Any]:
    """The last 4,096 tokens of a context appended at once, and four by themselves: peak beyond the full cache.

    What stands before them is written to the cache directly: to attend to it all, too, would take its square.
    """
    heads, new = (4, 2), 4096
    x = torch.randn(1, new, heads[0], 64)

    def cache_of(capacity: int, layers: int) -> seqpar.KVCache:
        return seqpar.KVCache(
            seqpar.Causal(), heads=heads, head_dim=64, capacity=capacity, layers=layers, group=world, page=PAGE
        )

    def append(cache: seqpar.KVCache, count: int) -> None:
        for layer in range(cache.layers):
            cache.attend(x[:, :count], x[:, :count, : heads[1]], x[:, :count, : heads[1]], layer=layer)

    def step() -> tuple[int, int]:
        append(cache_of(new, 1), new)  # what libraries allocate once
        cache = cache_of(context, layers)
        for layer in range(layers):
            for room in (cache._shard.k[layer], cache._shard.v[layer]):
                room.fill_(0.5)
            cache._lengths[layer][0] = cache._written[layer][0] = context - new - 4
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed before is used again, and does not count
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        append(cache, new)
        for _ in range(4):
            append(cache, 1)
        return cache.resident_bytes, _status("VmHWM") - before

    return torch.no_grad()(step)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory(contexts: tuple[int, ...] = (16_384, 65_536, 262_144), layers: int = 2) -> list[dict[str, object]]:
    """Per rank: its share of the cache, and the peak beyond it."""
    rows = []
    for context in contexts:
        with teams(two=Team(2, 1, remembering, context, layers)) as members:
            _, results = members["two"].run()
        share, peak = (max(column) for column in zip(*results, strict=True))
        rows.append({"context": f"{context:,}", "cache MB": share / 1e6, "peak beyond it MB": peak / 1e6})
    return rows


def growth(contexts: tuple[int, ...] = (1024, 16_384, 65_536)) -> list[dict[str, object]]:
    """Calls and bytes of a step at several lengths."""
    rows = []
    for context in contexts:
        with teams(some=Team(RANKS, 1, ours, context, torch.float32)) as members:
            members["some"].run()
            _, results = members["some"].run()
        rows.append({"context": f"{context:,}", "calls": results[0][1], "bytes sent by a rank": results[0][2]})
    assert len({(row["calls"], row["bytes sent by a rank"]) for row in rows}) == 1, "it grows"
    return rows


def simulated() -> list[dict[str, object]]:
    """Microseconds of one layer's decode step on 8 to 1,024 GPUs, bf16, by :data:`RATES`.

    Local attention reads its keys and values once from memory. Bytes and calls of ours are what is really sent (one
    call, or two where ``merge="auto"`` deals the heads); a call takes ``log2`` of its ranks latencies. One level knows
    of no nodes: everything goes at the speed between them. In the ring a hop is the slower of its transfer and the
    attention beside it.
    """
    rows, kv = [], 2 * HEADS[1] * DIM * 2
    near, far = (RATES.latency, RATES.bandwidth), (RATES.far_latency or 0.0, RATES.far_bandwidth or 1.0)
    for context in CONTEXTS:
        for gpus in (8, 32, 128, 512, 1024):
            nodes, local = gpus // NODE, LAUNCH + context / gpus * kv / HBM
            held = Layout.explicit([range(1)] * gpus, [range(rank, rank + 1) for rank in range(gpus)])
            times = {}
            for name, schedule in (("tree", seqpar.Tree()), ("tree, nodes first", seqpar.Tree(degree=NODE))):
                levels = traffic(schedule, held, 1, HEADS[0], (DIM, DIM), torch.bfloat16, 0)["forward"]
                links = [near, far] if len(levels) == 2 else [far if gpus > NODE else near]
                peers = [NODE, nodes] if len(levels) == 2 else [gpus]
                times[name] = local + sum(
                    min(sent.calls, 2) * math.log2(count) * latency + sent.bytes / bandwidth
                    for count, sent, (latency, bandwidth) in zip(peers, levels, links, strict=True)
                )
            sizes = (4 * HEADS[0], 4 * HEADS[0] * DIM, 4 * HEADS[0])  # a maximum, numerators, denominators; fp32
            times["three all-reduces"] = local + sum(
                all_reduce_seconds(size, count, *link) for size in sizes for link, count in ((near, NODE), (far, nodes))
            )
            hop = context / gpus * kv
            link = far if gpus > NODE else near
            times["ring"] = local + (gpus - 1) * max(local, link[0] + hop / link[1])
            rows.append(
                {
                    "context": f"{context:,}", "GPUs": gpus, **{f"{n}, us": t * 1e6 for n, t in times.items()},
                    "ring / ours": times["ring"] / min(times["tree"], times["tree, nodes first"]),
                }
            )  # fmt: skip
    return rows


def all_reduce_seconds(size: int, ranks: int, latency: float, bandwidth: float) -> float:
    """The faster of doublings, which send everything in each of ``log2`` hops, and of halves there and back."""
    hops = math.log2(ranks)
    doubling = hops * (latency + size / bandwidth)
    return min(doubling, 2 * hops * latency + 2 * size * (ranks - 1) / ranks / bandwidth)


def draw(rows: list[dict[str, object]]) -> None:
    """Time of a step over GPUs, a panel for each context."""
    shown = (655_360, 5_242_880, 10_485_760)
    figure, panels = plt.subplots(1, len(shown), figsize=(12, 3.6), sharey=True)
    for panel, context in zip(panels, shown, strict=True):
        some = [r for r in rows if r["context"] == f"{context:,}"]
        for name in ("tree", "tree, nodes first", "three all-reduces", "ring"):
            panel.plot([r["GPUs"] for r in some], [r[f"{name}, us"] for r in some], marker="o", label=name)
        panel.set(xscale="log", yscale="log", xlabel="GPUs", title=f"{context / 1e6:.2f}M tokens")
        panel.set_xticks([8, 32, 128, 512, 1024], ["8", "32", "128", "512", "1,024"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("one layer's decode step, us")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    """Everything, or only what is predicted."""
    options = tyro.cli(Options, description=__doc__)
    predicted = simulated()
    anchor = next(row for row in predicted if row["context"] == "5,242,880" and row["GPUs"] == 128)
    show("predicted: one layer's decode step, H100s in nodes of 8, 32/8 heads x 128, bf16", predicted)
    print(f"5.24M tokens on 128 GPUs: predicted {anchor['ring / ours']:,.0f} times as fast as the ring; published: 8")
    draw(predicted)
    if options.simulate:
        return
    sent, kept = growth(), memory()
    show("what a step sends does not grow with the context, 4 ranks", sent)
    show("memory of a rank, 2 ranks, 2 layers, 4/2 heads x 64, fp32, 4,096 tokens at once", kept)
    tables: dict[str, object] = {}
    dtype = torch.float32  # this processor has no bf16 instructions: each step would cast the cache
    about = f"{RANKS} ranks x 1 thread, {HEADS[0]}/{HEADS[1]} heads x {DIM}, {str(dtype).removeprefix('torch.')}"
    title = f"{options.context:,} tokens, {about}"
    tables[title] = speed(options.context, options.runs, dtype)
    tables[f"merging alone, {about}"] = merges(options.runs, dtype)
    for title, rows in tables.items():
        show(title, rows)  # type: ignore[arg-type]
    write("decode", {**tables, "bytes": sent, "memory": kept, "predicted": predicted})


if __name__ == "__main__":
    main()
