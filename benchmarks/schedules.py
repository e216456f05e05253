"""``schedule="auto"`` against every schedule that it could have chosen, measured on 2 ranks x 1 thread.

Run ``python benchmarks/schedules.py`` on an idle machine with two cores; about ten minutes. For 4 and 8 ranks, which
this machine cannot run side by side, it prints bytes and work of the busiest rank, from plans.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from statistics import quantiles
from typing import NamedTuple

import numpy as np
import torch
import tyro
from measuring import Team, median, show, teams, write

import seqpar
from seqpar.choosing import decide, layouts_to_try, schedules_to_try
from seqpar.comm import World, run_loopback
from seqpar.costs import Call

HEADS = ((8, 8), (8, 2), (5, 5), (7, 1))
HEAD_DIM = 64
SLACK = 0.05


def documents(count: int, length: int) -> seqpar.Documents:
    """Lengths drawn from a log-normal distribution."""
    drawn = np.random.default_rng(0).lognormal(0.0, 1.0, count)
    sizes = np.maximum(1, (drawn / drawn.sum() * length).astype(int))
    sizes[-1] += length - sizes.sum()
    return seqpar.Documents([0, *np.cumsum(sizes).tolist()])


MASKS: dict[str, Callable[[int], seqpar.Mask]] = {
    "causal": lambda n: seqpar.Causal(),
    "full": lambda n: seqpar.Full(),
    "window 512": lambda n: seqpar.SlidingWindow(511),
    "chunks of 700": lambda n: seqpar.Causal() & seqpar.Chunked(700),
    "prefix": lambda n: seqpar.PrefixLM(n // 3),
    "12 documents": lambda n: seqpar.Causal() & documents(12, n),
}


class Case(NamedTuple):
    """One batch."""

    mask: str
    length: int
    heads: tuple[int, int]


def measured(world: World, cases: list[Case], runs: int) -> Callable[[], dict]:
    """Each iteration takes the next case: every candidate in turn, ``runs`` times, and what auto says of them."""
    following = iter(cases)

    def iteration() -> dict:
        case = next(following)
        mask, told = MASKS[case.mask](case.length), {"heads": case.heads, "head_dim": HEAD_DIM, "dtype": torch.float32}
        common = {"length": case.length, "group": world, **told}
        auto = seqpar.plan(mask, schedule="auto", layout="auto", **common)
        assert auto.decision is not None, "there was a choice"
        ready = []
        torch.manual_seed(0)
        q, k, v, dout = (torch.randn(1, case.length, h, HEAD_DIM) for h in (*case.heads, case.heads[1], case.heads[0]))
        for candidate in auto.decision.candidates:
            plan = seqpar.plan(mask, schedule=candidate.schedule, layout=candidate.layout, **common)
            leaves = [plan.shard(x).requires_grad_() for x in (q, k, v)]
            ready.append((plan, leaves, plan.shard(dout)))
        seconds: list[list[float]] = [[] for _ in ready]
        for turn in range(runs + 1):
            for n, (plan, leaves, mine) in enumerate(ready):
                world.all_gather(torch.zeros(1), "barrier")
                began = time.perf_counter()
                torch.autograd.grad(seqpar.attention(*leaves, plan), leaves, mine)
                if turn:
                    seconds[n].append(time.perf_counter() - began)
        names = [f"{name_of(c.schedule)}, {c.layout.name}" for c in auto.decision.candidates]
        predicted = [c.cost.seconds for c in auto.decision.candidates]
        chosen = auto.decision.candidates.index(auto.decision.chosen)
        return {"seconds": seconds, "names": names, "predicted": predicted, "chosen": chosen}

    return iteration


def name_of(schedule: object) -> str:
    """As short as it can be told from the others."""
    if isinstance(schedule, seqpar.Ring):
        return schedule.exchange
    return {"AllGather": "all-gather", "Ulysses": "Ulysses", "DoubleRing": "double ring"}[type(schedule).__name__]


def judged(case: Case, ranks: list[dict]) -> dict[str, object]:
    """The slower rank's seconds of each candidate; whether the choice was right."""
    candidates = zip(*(rank["seconds"] for rank in ranks), strict=True)
    both = [[max(pair) for pair in zip(*turns, strict=True)] for turns in candidates]
    names, chosen = ranks[0]["names"], ranks[0]["chosen"]
    medians = [median(x) for x in both]
    fastest = min(range(len(names)), key=medians.__getitem__)

    def spread(values: list[float]) -> float:
        """Two standard errors of the median, of itself."""
        low, _, high = quantiles(values, n=4)
        return 2 * 0.93 * (high - low) / len(values) ** 0.5 / median(values)

    noise = max(spread(both[fastest]), spread(both[chosen]))
    ratio = medians[chosen] / medians[fastest]
    return {
        "mask": case.mask, "tokens": case.length, "heads": f"{case.heads[0]}/{case.heads[1]}",
        "chosen": names[chosen], "ms": medians[chosen] * 1e3, "predicted ms": ranks[0]["predicted"][chosen] * 1e3,
        "fastest": names[fastest], "chosen / fastest": ratio, "slowest / fastest": max(medians) / medians[fastest],
        "noise": noise, "right": ratio <= 1 + noise + SLACK,
    }  # fmt: skip


def planned(world: World, case: Case, rates: seqpar.Rates) -> dict[str, object]:
    """Bytes and work of the busiest rank: of the choice, and the least among the candidates."""
    mask = MASKS[case.mask](case.length)
    layouts = layouts_to_try("auto", mask, case.length, case.length, world.size)
    schedules = schedules_to_try(seqpar.Auto(), world.size, None)
    call = Call(*case.heads, HEAD_DIM, HEAD_DIM, torch.bfloat16, "cuda")
    decision = decide(world, schedules, layouts, mask, case.length, case.length, call, rates, None)
    kernels = [c.cost.kernel for c in decision.candidates]
    sent = [c.cost.bytes for c in decision.candidates]
    chosen = decision.chosen
    beaten = [
        name_of(c.schedule)
        for c in decision.candidates
        if c.cost.bytes < chosen.cost.bytes and c.cost.kernel < chosen.cost.kernel * 0.99
    ]
    return {
        "mask": case.mask, "tokens": case.length, "heads": f"{case.heads[0]}/{case.heads[1]}", "ranks": world.size,
        "chosen": f"{name_of(chosen.schedule)}, {chosen.layout.name}", "MB sent": chosen.cost.bytes / 1e6,
        "least MB": min(sent) / 1e6, "work / least": chosen.cost.kernel / min(kernels),
        "less of both": ", ".join(beaten) or "none",
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    runs: int = 7
    """Counted iterations of each candidate; medians are compared."""
    lengths: tuple[int, ...] = (1024, 3072)
    """Tokens."""


# An H100 with NVLink: see simulate.py.
GPU = seqpar.Rates(
    forward=650e12, backward=520e12, call=15e-6, backward_call=15e-6, copy=1.5e12,
    bandwidth=450e9, latency=10e-6, overlap=1.0,
)  # fmt: skip


def main(options: Options) -> None:
    """Measure, print, write ``results/schedules.json``."""
    cases = [Case(*x) for x in product(MASKS, options.lengths, HEADS)]
    rows = []
    with teams(ranks=Team(2, 1, measured, cases, options.runs)) as members:
        for case in cases:
            rows.append(judged(case, members["ranks"].run()[1]))
            print(rows[-1], flush=True)
    right = sum(bool(row["right"]) for row in rows)
    large = [Case(mask, 131_072, heads) for mask in MASKS for heads in HEADS]
    plans = [run_loopback(ranks, planned, case, GPU)[0] for ranks in (4, 8) for case in large]
    show(f"auto on 2 ranks: right in {right} of {len(rows)} cases", rows)
    show("auto on 4 and 8 GPUs, from plans", plans)
    write("schedules", {"right": right, "cases": len(rows), "auto": rows, "plans": plans})


if __name__ == "__main__":
    main(tyro.cli(Options))
