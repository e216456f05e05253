"""What a plan costs one rank: milliseconds of one core to work out an itinerary. ``python benchmarks/planning.py``."""

from __future__ import annotations

import time

import torch
from measuring import median, show, write

import seqpar
from seqpar.itinerary import itinerary

RUNS = 7


def milliseconds(mask: seqpar.Mask, layout: str, length: int, world: int) -> float:
    """The median of several ranks' first plans, none of them cached."""
    seconds = []
    for rank in range(RUNS + 1):
        itinerary.cache_clear()
        begin = time.process_time()
        itinerary(mask, layout, seqpar.Ring(), length, length, world, rank)
        seconds.append(time.process_time() - begin)
    return median(seconds[1:]) * 1e3


def main() -> None:
    """Measure, print the table, write ``results/planning.json``."""
    torch.set_num_threads(1)
    rows = []
    for length, world in ((131_072, 8), (1_048_576, 64)):
        documents = seqpar.Documents(range(0, length + 1, length // 256))
        masks = {
            "causal": seqpar.Causal(),
            "window of 4,096": seqpar.SlidingWindow(4095),
            "256 packed documents": seqpar.Causal() & documents,
        }
        for name, mask in masks.items():
            costs = {
                layout: milliseconds(mask, layout, length, world) for layout in ("zigzag", "contiguous", "striped")
            }
            rows.append({"tokens": length, "ranks": world, "mask": name, **costs})
    show("milliseconds of one core for a rank's itinerary", rows)
    write("planning", {"milliseconds": rows})


if __name__ == "__main__":
    main()
