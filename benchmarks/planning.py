"""What a plan costs one rank, and how even layouts are: ``python benchmarks/planning.py``; nothing is run."""

from __future__ import annotations

import time

import torch
from measuring import median, show, write
from schedules import GPU, documents

import seqpar
from seqpar import layouts, parts
from seqpar.choosing import layouts_to_try, schedules_to_try, work_of
from seqpar.costs import Call, cost
from seqpar.itinerary import itinerary, reach_of
from seqpar.layouts import resolve_layout
from seqpar.reach import busiest_rows

RUNS = 7
EVEN_LAYOUTS = ("contiguous", "zigzag", "document_zigzag", "balanced")


def milliseconds(mask: seqpar.Mask, layout: str, length: int, world: int, kv_heads: int | None = None) -> float:
    """The median of several ranks' first plans, none of them cached."""
    seconds = []
    for rank in range(RUNS + 1):
        forget()
        begin = time.process_time()
        itinerary(mask, layout, seqpar.Ring(), length, length, world, rank, kv_heads)
        seconds.append(time.process_time() - begin)
    return median(seconds[1:]) * 1e3


def evenness(name: str, mask: seqpar.Mask, length: int, world: int) -> dict[str, object]:
    """Of each layout the busiest rank's pairs over the mean, and the rows that the busiest rank sends or receives."""
    row: dict[str, object] = {"mask": name, "tokens": length, "ranks": world}
    for layout in EVEN_LAYOUTS:
        if layout == "document_zigzag" and mask.documents is None:
            row[f"{layout}: work"] = row[f"{layout}: rows"] = "-"
            continue
        work = itinerary(mask, layout, seqpar.Ring("direct"), length, length, world, 0)
        row[f"{layout}: work"] = float(work.pairs.max() / work.pairs.double().mean())
        row[f"{layout}: rows"] = busiest_rows(work.needed)
    return row


def forget() -> None:
    """Whatever is kept of earlier plans."""
    for cached in (itinerary, reach_of, parts._below_runs, layouts.holds_each_once, layouts.merged):
        cached.cache_clear()


def comparing(mask: seqpar.Mask, length: int, world: int) -> float:
    """Milliseconds of one core for one rank to compare all candidates of ``auto``, nothing of them known before."""
    call, inside = Call(32, 8, 128, 128, torch.bfloat16, "cuda"), 8 if world > 8 else None
    forget()
    begin = time.process_time()
    for held in layouts_to_try("auto", mask, length, length, world):
        for schedule in schedules_to_try(seqpar.Auto(), world, inside):
            cost(schedule, held, work_of(schedule, mask, held, length, length, world, 0), call, GPU, 0)
    return (time.process_time() - begin) * 1e3


def dealing(mask: seqpar.Mask, length: int, world: int) -> float:
    """Milliseconds of one core to deal a balanced layout, the median of several."""
    seconds = []
    for _ in range(RUNS):
        begin = time.process_time()
        resolve_layout("balanced", mask, length, length, world)
        seconds.append(time.process_time() - begin)
    return median(seconds) * 1e3


def main() -> None:
    """Measure, print the tables, write ``results/planning.json``."""
    torch.set_num_threads(1)
    rows = []
    for length, world in ((131_072, 8), (1_048_576, 64)):
        packed = seqpar.Documents(range(0, length + 1, length // 256))
        masks = {
            "causal": seqpar.Causal(),
            "window of 4,096": seqpar.SlidingWindow(4095),
            "256 packed documents": seqpar.Causal() & packed,
        }
        for name, mask in masks.items():
            costs = {
                layout: milliseconds(mask, layout, length, world) for layout in ("zigzag", "contiguous", "striped")
            }
            costs["dealing balanced"] = dealing(mask, length, world)
            costs["comparing for auto"] = comparing(mask, length, world)
            rows.append({"tokens": length, "ranks": world, "mask": name, **costs})
        sparse = seqpar.SparselySharded(64, 16, 8)
        costs = {
            layout: milliseconds(sparse, layout, length, world, 8) for layout in ("zigzag", "contiguous", "striped")
        }
        others = dict.fromkeys(("dealing balanced", "comparing for auto"), "-")
        rows.append({"tokens": length, "ranks": world, "mask": "S2, 8 KV heads", **costs, **others})
    even = [
        evenness(name, mask, length, world)
        for length, world in ((131_072, 8), (1_048_576, 64))
        for name, mask in {
            "causal": seqpar.Causal(),
            "window of 4,096": seqpar.SlidingWindow(4095),
            "prefix of 40,000": seqpar.PrefixLM(40_000),
            "64 documents, log-normal": seqpar.Causal() & documents(64, length),
            "256 documents, log-normal": seqpar.Causal() & documents(256, length),
        }.items()
    ]
    show("milliseconds of one core for a rank's itinerary, to deal a balanced layout, to compare for auto", rows)
    show("the busiest rank's work over the mean, and the rows that it moves", even)
    write("planning", {"milliseconds": rows, "evenness": even})


if __name__ == "__main__":
    main()
