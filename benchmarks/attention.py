"""Ring attention on 2 ranks x 1 thread against PyTorch's attention in one process with 2 threads; and where time goes.

Run ``python benchmarks/attention.py`` on an idle machine with two cores; about ten minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from measuring import Team, in_turn, median, show, teams, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile, record_function

import seqpar
from seqpar.comm import World

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """One attention call: ``window`` 0 is plain causal."""

    length: int
    heads: int
    kv_heads: int
    dtype: str
    window: int = 0
    head_dim: int = 64

    def inputs(self) -> list[Tensor]:
        """Whole q, k, v and dout."""
        torch.manual_seed(0)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return [torch.randn(1, self.length, h, self.head_dim).to(DTYPES[self.dtype]) for h in heads]

    @property
    def mask(self) -> seqpar.Mask:
        """The mask it is attended under."""
        return seqpar.SlidingWindow(self.window - 1) if self.window else seqpar.Causal()


def ours(world: World, shape: Shape, profiled: bool = False) -> Callable[[], dict[str, float] | None]:
    """Forward and backward of this rank's share."""
    plan = seqpar.plan(shape.mask, length=shape.length, group=world)
    q, k, v, dout = (plan.shard(x) for x in shape.inputs())
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def iteration() -> None:
        torch.autograd.grad(seqpar.attention(*leaves, plan), leaves, dout)

    return (lambda: where_time_goes(iteration)) if profiled else iteration


def torchs(world: World, shape: Shape) -> Callable[[], None]:
    """Forward and backward of all of it, by PyTorch, causal."""
    q, k, v, dout = (x.transpose(1, 2) for x in shape.inputs())
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def iteration() -> None:
        out = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=shape.heads != shape.kv_heads)
        torch.autograd.grad(out, leaves, dout)

    return iteration


def where_time_goes(iteration: Callable[[], None]) -> dict[str, float]:
    """Seconds in the flash kernel, in all other operators, and the rest: waiting for messages, and Python."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("iteration"):
        iteration()
    events = profiler.key_averages()
    total = sum(e.cpu_time_total for e in events if e.key == "iteration") / 1e6
    flash = sum(e.self_cpu_time_total for e in events if "_flash_attention_for_cpu" in e.key) / 1e6
    others = sum(e.self_cpu_time_total for e in events if e.key.startswith("aten::")) / 1e6 - flash
    return {"total": total, "flash kernel": flash, "other operators": others, "rest": total - flash - others}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    runs: int = 5
    """Counted iterations of each; medians are printed."""
    length: int = 8192
    """Tokens of the comparison with PyTorch."""
    window_length: int = 32_768
    """Tokens of the comparison of a window with full causal attention."""


def main(options: Options) -> None:
    """Measure, print the tables, write ``results/attention.json``."""
    rows = []
    for heads, kv_heads in ((8, 8), (8, 2)):
        bf16, fp32 = (Shape(options.length, heads, kv_heads, dtype) for dtype in ("bf16", "fp32"))
        with teams(
            ours_bf16=Team(2, 1, ours, bf16),
            torch_bf16=Team(1, 2, torchs, bf16),
            ours_fp32=Team(2, 1, ours, fp32),
            torch_fp32=Team(1, 2, torchs, fp32),
        ) as members:
            seconds = {name: median(values) for name, values in in_turn(members, options.runs).items()}
        for dtype in ("bf16", "fp32"):
            row = {"heads": f"{heads}/{kv_heads}", "dtype": dtype}
            row |= {"ours s": seconds[f"ours_{dtype}"], "torch s": seconds[f"torch_{dtype}"]}
            row["ours / torch"] = row["ours s"] / row["torch s"]
            row["ours / torch fp32"] = row["ours s"] / seconds["torch_fp32"]
            rows.append(row)
    title = f"causal zigzag, {options.length:,} tokens, forward + backward: 2 ranks x 1 thread against 1 process x 2"

    causal = Shape(options.window_length, 2, 2, "bf16")
    window = Shape(options.window_length, 2, 2, "bf16", window=1024)
    with teams(causal=Team(2, 1, ours, causal), window=Team(2, 1, ours, window)) as members:
        seconds = {name: median(values) for name, values in in_turn(members, options.runs).items()}
    windows = [{"mask": name, "seconds": s, "of causal": s / seconds["causal"]} for name, s in seconds.items()]

    shape = Shape(options.length, 8, 8, "bf16")
    with teams(profiled=Team(2, 1, ours, shape, True)) as members:
        members["profiled"].run()
        shares = members["profiled"].run()[1]
    show(title, rows)
    show(f"a window of 1,024 at {options.window_length:,} tokens, 2 heads, bf16, 2 ranks", windows)
    show("where a rank's time goes (8/8 heads, bf16), seconds", [{"rank": str(r), **s} for r, s in enumerate(shares)])
    write("attention", {"against torch": rows, "window": windows, "where time goes": shares})


if __name__ == "__main__":
    main(tyro.cli(Options))
