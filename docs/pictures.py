"""Draw the pictures of docs/design.md from real plans, and offload's costs: ``python docs/pictures.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import seqpar
from seqpar.itinerary import Itinerary, itinerary
from seqpar.launch.offload_costs import Outcome
from seqpar.launch.plan_offload import PlanOffloadConfig, plan

HERE = Path(__file__).parent
WORLD, LENGTH = 4, 64
COLOURS = np.array([[0.96, 0.96, 0.96], [0.27, 0.47, 0.67], [0.93, 0.55, 0.25], [0.35, 0.62, 0.38], [0.72, 0.35, 0.55]])


def plans(mask: seqpar.Mask, layout: str) -> list[Itinerary]:
    """Every rank's itinerary."""
    return [itinerary(mask, layout, seqpar.Ring(), LENGTH, LENGTH, WORLD, rank) for rank in range(WORLD)]


def who_computes(mask: seqpar.Mask, layout: str) -> np.ndarray:
    """Of each query-key pair, 1 + the rank that computes it; 0 where the mask hides it."""
    pairs = np.zeros((LENGTH, LENGTH), dtype=int)
    for rank, work in enumerate(plans(mask, layout)):
        for block in work.blocks:
            queries, keys = work.queries.tensor.numpy(), block.keys.tensor.numpy()
            starts, ends = (bound[0, 0].numpy() for bound in (block.intervals.start, block.intervals.end))
            for query, start, end in zip(queries, starts, ends, strict=True):
                pairs[query, keys[start:end]] = rank + 1
    return pairs


def draw_layouts() -> None:
    """One mask per row, one layout per column; colour is the rank."""
    masks = {
        "causal": seqpar.Causal(),
        "causal, packed documents": seqpar.Causal() & seqpar.Documents([0, 13, 40, 64]),
        "sliding window": seqpar.SlidingWindow(15),
    }
    layouts = ("contiguous", "zigzag", "striped")
    figure, axes = plt.subplots(len(masks), len(layouts), figsize=(8, 8.4), squeeze=False)
    for row, (name, mask) in zip(axes, masks.items(), strict=True):
        for axis, layout in zip(row, layouts, strict=True):
            axis.imshow(COLOURS[who_computes(mask, layout)], interpolation="nearest")
            work = plans(mask, layout)[0].pairs.double()
            axis.set_title(f"{layout}: busiest / mean {work.max() / work.mean():.2f}", fontsize=9)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{name}\nqueries", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("keys", fontsize=9)
    figure.suptitle("Which of 4 ranks computes which query-key pairs", fontsize=11)
    figure.tight_layout()
    figure.savefig(HERE / "layouts.png", dpi=110)


def draw_blocks(rank: int = 1) -> None:
    """The local blocks of one rank, in its order: rows are its own queries, columns the keys that pass by."""
    figure, axes = plt.subplots(2, WORLD, figsize=(9, 5.2))
    cases = {"zigzag": seqpar.Causal(), "striped": seqpar.SlidingWindow(15)}
    for row, (layout, mask) in zip(axes, cases.items(), strict=True):
        work = plans(mask, layout)[rank]
        for step, (axis, block) in enumerate(zip(row, work.blocks, strict=True)):
            key = np.arange(len(block.keys))
            start, end = (bound[0, 0].numpy()[:, None] for bound in (block.intervals.start, block.intervals.end))
            seen = (key >= start) & (key < end)
            axis.imshow(COLOURS[seen * (block.source + 1)], interpolation="nearest")
            axis.set_title(f"step {step}: keys of rank {block.source}", fontsize=9)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{mask}\n{layout}: rank {rank}'s queries".replace("(left=15, right=0)", "(15)"), fontsize=9)
    figure.suptitle("The keys that a query sees stay one interval of every rank's local order", fontsize=11)
    figure.tight_layout()
    figure.savefig(HERE / "intervals.png", dpi=110)


def draw_offload() -> None:
    """What `seqpar plan-offload` says of contexts of all lengths, with workers and without."""
    contexts = [2**n for n in range(11, 18)]
    few, plans = (
        [plan(PlanOffloadConfig(model="llama-3-70b", context=n, devices=2, workers=4, alone=alone)) for n in contexts]
        for alone in (2, 4)
    )
    ways = {
        "4 x H100, no workers": [one.alone for one in plans],
        "2 x H100, no workers": [one.alone for one in few],
        "2 x H100, 4 x H20: in sequence": [one.sequence for one in plans],
        "2 x H100, 4 x H20: two batches in rotation": [one.rotation for one in plans],
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    for axis, title in zip(axes, ("tokens/s", "tokens per $"), strict=True):
        for (label, outcomes), colour in zip(ways.items(), COLOURS[1:], strict=False):
            shown = [(n, one) for n, one in zip(contexts, outcomes, strict=True) if one]
            heights = [_height(title, one) for _, one in shown]
            axis.plot([n for n, _ in shown], heights, "o-", color=colour, label=label, markersize=3.5)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(contexts, [f"{n // 1024}K" for n in contexts])
        axis.set(xlabel="tokens of context", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle("llama-3-70b in bf16, as many sequences as memory holds; predicted", fontsize=11)
    figure.tight_layout()
    figure.savefig(HERE / "offload.png", dpi=90)


def _height(title: str, way: Outcome) -> float:
    return way.speed if title == "tokens/s" else way.per_dollar


if __name__ == "__main__":
    draw_layouts()
    draw_blocks()
    draw_offload()
