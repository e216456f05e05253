"""What every schedule would give on 8 to 1,024 GPUs, from plans and published rates: ``python benchmarks/simulate.py``.

Nothing is run: the cost model of ``schedule="auto"`` (``seqpar/costs.py``) with the rates of an H100 node. Throughput
is the useful FLOP of forward and backward (only pairs that the mask allows), per second and GPU. Of each world some
ranks are planned, those with the most work and the most rows to fetch and to send among them; the slowest counts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch
import tyro
from measuring import show, write
from schedules import documents

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import seqpar
from seqpar.choosing import work_of
from seqpar.costs import Call, cost
from seqpar.itinerary import Itinerary
from seqpar.layouts import Layout, resolve_layout
from seqpar.schedules import Schedule, heads_degree

PICTURE = Path(__file__).parents[1] / "docs" / "schedules.png"
NODE, HEADS, HEAD_DIM = 8, (32, 8), 128
# FlashAttention-3 at head dim 128 (docs/benchmarks.md); NVLink 4 at 450 GB/s each way, a 400 Gb/s NIC for each GPU.
RATES = seqpar.Rates(
    forward=650e12, backward=560e12, call=15e-6, backward_call=15e-6, copy=1.5e12, overlap=1.0,
    bandwidth=450e9, latency=10e-6, node=NODE, far_bandwidth=50e9, far_latency=20e-6,
)  # fmt: skip
SCHEDULES: dict[str, Schedule] = {
    "ring": seqpar.Ring("forward"),
    "direct": seqpar.Ring("direct"),
    "double ring": seqpar.DoubleRing(NODE),
    "all-gather": seqpar.AllGather(),
    "Ulysses": seqpar.Ulysses(),
    "hybrid": seqpar.Ulysses(degree=NODE),
}


def masks(length: int) -> dict[str, tuple[seqpar.Mask, str]]:
    """Masks, and the layout that each is split in."""
    return {
        "causal": (seqpar.Causal(), "zigzag"),
        "window of 8,192": (seqpar.SlidingWindow(8191), "contiguous"),
        "64 documents": (seqpar.Causal() & documents(64, length), "balanced"),
    }


def busiest(work: Itinerary) -> set[int]:
    """The ranks with the most work, and with the most rows to fetch and to send; the first and the last."""
    moved = work.needed - work.needed.diagonal().diag()
    return {0, work.world - 1, *(int(x.argmax()) for x in (work.pairs, moved.sum(0), moved.sum(1)))}


def seconds(schedule: Schedule, mask: seqpar.Mask, held: Layout, length: int, world: int) -> float:
    """Forward and backward of the slowest rank."""
    if isinstance(schedule, seqpar.Ulysses) and schedule.degree == world:
        return float("inf")  # within one node a hybrid is Ulysses, and a double ring a ring
    call = Call(*HEADS, HEAD_DIM, HEAD_DIM, torch.bfloat16, "cuda")
    worst = 0.0
    degree = heads_degree(schedule, world)
    known = work_of(schedule, mask, held, length, length, world, 0)
    # Of those that trade, the last has as many heads as any.
    for rank in (block * degree + degree - 1 for block in busiest(known)):
        work = work_of(schedule, mask, held, length, length, world, rank)
        worst = max(worst, cost(schedule, held, work, call, RATES, rank).seconds)
    return worst


def main(lengths: tuple[int, ...] = (131_072, 1_048_576), worlds: tuple[int, ...] = (8, 32, 128, 512, 1024)) -> None:
    """Predict, print, write ``results/simulate.json`` and draw ``docs/schedules.png``."""
    rows: list[dict[str, object]] = []
    for length in lengths:
        for name, (mask, layout) in masks(length).items():
            for world in worlds:
                held = resolve_layout(layout, mask, length, length, world)
                work = work_of(seqpar.Ring("direct"), mask, held, length, length, world, 0)
                flop = float(work.pairs.sum()) * HEADS[0] * (4 + 10) * HEAD_DIM
                row: dict[str, object] = {"mask": name, "tokens": length, "GPUs": world}
                found = {n: seconds(s, mask, held, length, world) for n, s in SCHEDULES.items()}
                row |= {n: flop / s / world / 1e12 if s < float("inf") else "-" for n, s in found.items()}
                row["auto"] = min(found, key=found.__getitem__)
                rows.append(row)
                print(".", end="", file=sys.stderr, flush=True)
    show(f"TFLOP/s per GPU, {HEADS[0]}/{HEADS[1]} heads x {HEAD_DIM}, forward + backward, predicted", rows)
    write("simulate", {"TFLOP/s per GPU": rows})
    draw(rows)


def draw(rows: list[dict[str, object]]) -> None:
    """Throughput over GPUs, a line for each schedule, a picture for each mask and length."""
    pictures = list(dict.fromkeys((str(row["mask"]), int(str(row["tokens"]))) for row in rows))
    columns = len(pictures) // len({tokens for _, tokens in pictures})
    figure, axes = plt.subplots(
        len(pictures) // columns, columns, figsize=(4.2 * columns, 3.2 * (len(pictures) // columns)), squeeze=False
    )
    for axis, (mask, tokens) in zip(axes.flat, pictures, strict=True):
        mine = [row for row in rows if (row["mask"], row["tokens"]) == (mask, tokens)]
        for name in SCHEDULES:
            points = [(row["GPUs"], row[name]) for row in mine if row[name] != "-"]
            axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.set(xscale="log", title=f"{mask}, {tokens:,} tokens", xlabel="GPUs", ylim=(0, None))
        axis.set_ylabel("TFLOP/s per GPU")
        axis.set_xticks([row["GPUs"] for row in mine], [str(row["GPUs"]) for row in mine])
        axis.minorticks_off()
    axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
