"""Sparsely-sharded attention: how much time, traffic and cache shrink with density.

Run ``python benchmarks/s2.py`` on an idle machine; about five minutes on two cores. Where there is a GPU, it is
measured instead: 8K to 128K tokens, against the fastest of PyTorch's dense backends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import tyro
from measuring import Team, gpu_in_turn, in_turn, median, show, teams, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import seqpar
from seqpar.comm import World
from seqpar.itinerary import itinerary
from seqpar.reach import busiest_rows, forward_rows

HEADS, HEAD_DIM = 16, 64


def mask_of(stride: int, local: int = 16, dense_heads: int = 0) -> seqpar.SparselySharded:
    """Blocks of 64."""
    return seqpar.SparselySharded(64, local, stride, dense_heads)


def inputs(length: int, heads: int = HEADS, dim: int = HEAD_DIM, **options: Any) -> list[Tensor]:
    """q, k, v and dout."""
    torch.manual_seed(0)
    return [torch.randn(1, length, heads, dim, **options) for _ in range(4)]


def ours(world: World, mask: seqpar.Mask, length: int) -> Callable[[], float]:
    """Forward and backward of this rank's share."""
    plan = seqpar.plan(mask, length=length, group=world, heads=HEADS)
    q, k, v, dout = (plan.shard(x) for x in inputs(length))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def iteration() -> None:
        torch.autograd.grad(seqpar.attention(*leaves, plan), leaves, dout)

    return iteration


def torchs(world: World, length: int) -> Callable[[], None]:
    """Forward and backward of dense causal attention, by PyTorch."""
    q, k, v, dout = (x.transpose(1, 2) for x in inputs(length))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def iteration() -> None:
        torch.autograd.grad(scaled_dot_product_attention(*leaves, is_causal=True), leaves, dout)

    return iteration


def density(mask: seqpar.Mask, length: int, heads: int = HEADS) -> float:
    """The share of all causal pairs."""
    pairs = int(seqpar.plan(mask, length=length, heads=heads).work.pairs.sum())
    return pairs / (heads * length * (length + 1) / 2)


def speed(length: int, runs: int) -> list[dict[str, object]]:
    """Of one process with 2 threads, and of 2 ranks with one each."""
    mask, dense, rows, torch_seconds = mask_of(16), seqpar.Causal(), [], 0.0
    share = density(mask, length)
    for name, ranks, threads in (("1 rank x 2 threads", 1, 2), ("2 ranks x 1 thread", 2, 1)):
        members = {"s2": Team(ranks, threads, ours, mask, length), "dense": Team(ranks, threads, ours, dense, length)}
        if ranks == 1:
            members["torch"] = Team(1, threads, torchs, length)
        with teams(**members) as team:
            seconds = {name: median(values) for name, values in in_turn(team, runs).items()}
        row: dict[str, object] = {"": name, "S2 s": seconds["s2"], "ours dense s": seconds["dense"]}
        row |= {"1 / density": 1 / share, "faster than dense": seconds["dense"] / seconds["s2"]}
        row["of the ideal"] = seconds["dense"] / seconds["s2"] * share
        torch_seconds = torch_seconds or seconds.get("torch", 0.0)
        row |= {"torch dense, 2 threads, s": torch_seconds, "of the ideal to it": torch_seconds / seconds["s2"] * share}
        rows.append(row)
        print(row, flush=True)
    return rows


def traffic() -> list[dict[str, object]]:
    """From plans: what the busiest rank moves, of a dense ring's K and V, and how even work is."""
    rows = []
    for length, world, heads, stride, dense in (
        (16_384, 2, 16, 16, 0),
        (131_072, 8, 16, 16, 0),
        (131_072, 8, 8, 8, 0),
        (131_072, 8, 8, 7, 1),
        (131_072, 64, 16, 16, 0),
        (1_048_576, 64, 8, 8, 0),
    ):
        for layout in ("zigzag", "contiguous"):
            mask = mask_of(stride, dense_heads=dense)
            work = itinerary(mask, layout, seqpar.Ring("direct"), length, length, world, 0, heads)
            whole = busiest_rows(forward_rows(work.layout.keys)) * heads
            moved = work.needed - work.needed.diagonal().diag()
            rows.append(
                {
                    "tokens": f"{length:,}", "ranks": world, "KV heads": heads, "stride": stride, "dense": dense,
                    "layout": layout, "density": density(mask, length, heads),
                    "busiest rank's bytes": busiest_rows(work.needed) / whole,
                    "all bytes": int(moved.sum()) / (whole * world),
                    "work, max / mean": float(work.pairs.max() / work.pairs.double().mean()),
                }
            )  # fmt: skip
    return rows


def cache(heads: int = 8, dim: int = 128) -> list[dict[str, object]]:
    """Resident bytes of one layer's cache in bf16, beside a dense one's."""
    rows, mask = [], mask_of(8)
    for length in (1024, 4096, 16_384, 65_536):
        kept = seqpar.KVCache(mask, heads=heads, head_dim=dim, dtype=torch.bfloat16, capacity=length + mask.block)
        while kept.length < length:
            x = torch.zeros(1, 1024, heads, dim, dtype=torch.bfloat16)
            kept.attend(x, x, x)
        blocks = length // mask.block
        formula = mask.local_blocks + (blocks - mask.local_blocks) / mask.stride
        dense = heads * length * 2 * dim * 2
        rows.append(
            {
                "tokens": f"{length:,}", "pages per head": sum(kept.resident_pages()) / heads,
                "L + (i+1-L)/v": formula, "resident MB": kept.resident_bytes / 1e6, "dense MB": dense / 1e6,
                "of dense": kept.resident_bytes / dense,
            }
        )  # fmt: skip
    return rows


BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def gpu(runs: int, heads: int = 32, dim: int = 128) -> list[dict[str, object]]:
    """bf16 on a GPU: S2 against the fastest dense backend of PyTorch."""
    rows = []
    for length in (8192, 16_384, 32_768, 65_536, 131_072):
        for stride, local in ((16, 16), (32, 16), (32, 8)):
            mask = mask_of(stride, local)
            row: dict[str, object] = {"tokens": f"{length:,}", "stride": stride, "local": local}
            rows.append(row | on_gpu(mask, length, heads, dim, runs))
            print(rows[-1], flush=True)
    return rows


def on_gpu(mask: seqpar.Mask, length: int, heads: int, dim: int, runs: int) -> dict[str, object]:
    """Milliseconds of both passes of everybody, and how much faster S2 is than the best of the dense ones."""
    q, k, v, dout = inputs(length, heads, dim, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plan = seqpar.plan(mask, length=length, heads=heads)

    def dense(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), is_causal=True)
            return out.transpose(1, 2)

    contenders: dict[str, Callable[[], Tensor]] = {"s2": lambda: seqpar.attention(*leaves, plan)}
    contenders |= {name: partial(dense, backend) for name, backend in BACKENDS.items()}
    passes = {name: _passes(attend, leaves, dout) for name, attend in contenders.items()}
    share = density(mask, length, heads)
    row: dict[str, object] = {"1 / density": 1 / share}
    for way, number in (("forward", 0), ("backward", 1)):
        calls = {name: both[number] for name, both in passes.items()}
        seconds = {name: median(values) for name, values in gpu_in_turn(calls, runs).items()}
        best = min(seconds[name] for name in BACKENDS)
        row |= {f"{way} {name} ms": value * 1e3 for name, value in seconds.items()}
        row |= {f"{way} faster": best / seconds["s2"], f"{way} of the ideal": best / seconds["s2"] * share}
    return row


def _passes(
    attend: Callable[[], Tensor], leaves: list[Tensor], dout: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    out = attend()
    return lambda: attend().detach(), lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    runs: int = 3
    """Counted iterations of each; medians are printed."""
    length: int = 16_384
    """Tokens of the comparison on the CPU."""


def main(options: Options) -> None:
    """Measure, print the tables, write ``results/s2.json``, or ``results/s2_gpu.json``."""
    if torch.cuda.is_available():
        rows = gpu(options.runs)
        show("32 heads x 128, bf16, against PyTorch's dense causal attention", rows)
        write("s2_gpu", {"gpu": rows})
        return
    fast, sent, kept = speed(options.length, options.runs), traffic(), cache()
    title = f"forward + backward, {options.length:,} tokens, {HEADS} heads x {HEAD_DIM}, fp32, block 64, L = v = 16"
    show(title, fast)
    show("from plans: block 64, 16 local blocks; bytes as a share of dense ring attention's", sent)
    show("a layer's cache: block 64, L = 16, v = 8, 8 KV heads x 128, bf16", kept)
    write("s2", {title: fast, "traffic": sent, "cache": kept})


if __name__ == "__main__":
    main(tyro.cli(Options))
