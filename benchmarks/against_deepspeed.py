"""``schedule="auto"`` against DeepSpeed's ``DistributedAttention`` around the same local kernel, 2 ranks x 1 thread.

Run ``python benchmarks/against_deepspeed.py`` on an idle machine with two cores, with ``pip install -e .[deepspeed]``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from statistics import quantiles
from typing import NamedTuple

import torch
import tyro
from measuring import Team, in_turn, median, show, teams, write
from schedules import MASKS, name_of
from torch import Tensor

import seqpar
from seqpar.comm import World

HEADS = ((8, 8), (8, 2))
HEAD_DIM = 64


class Case(NamedTuple):
    """One batch."""

    mask: str
    length: int
    heads: tuple[int, int]

    def inputs(self) -> list[Tensor]:
        """Whole q, k, v and dout."""
        generator = torch.Generator().manual_seed(0)
        heads = (*self.heads, self.heads[1], self.heads[0])
        return [torch.randn(1, self.length, h, HEAD_DIM, generator=generator) for h in heads]


def ours(world: World, case: Case) -> Callable[[], tuple[str, Tensor]]:
    """As auto has it; returns what it chose, and the square of its gradients' norm."""
    plan = seqpar.plan(
        MASKS[case.mask](case.length), length=case.length, group=world, schedule="auto", layout="auto",
        heads=case.heads, head_dim=HEAD_DIM, dtype=torch.float32,
    )  # fmt: skip
    q, k, v, dout = (plan.shard(x) for x in case.inputs())
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def iteration() -> tuple[str, Tensor]:
        grads = torch.autograd.grad(seqpar.attention(*leaves, plan), leaves, dout)
        return f"{name_of(plan.schedule)}, {plan.layout.name}", squares(grads)

    return iteration


def deepspeeds(world: World, case: Case) -> Callable[[], tuple[str, Tensor]]:
    """Whole heads of all tokens to every rank, our CPU kernel on them under the same mask, and back."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import torch.distributed as dist
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
    whole = seqpar.plan(MASKS[case.mask](case.length), length=case.length)
    attend = DistributedAttention(
        lambda q, k, v: seqpar.attention(q, k, v, whole), dist.group.WORLD, scatter_idx=2, gather_idx=1
    )
    split = seqpar.plan(seqpar.Full(), length=case.length, group=world, layout="contiguous")
    q, k, v, dout = (split.shard(x) for x in case.inputs())
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def iteration() -> tuple[str, Tensor]:
        return "DeepSpeed", squares(torch.autograd.grad(attend(*leaves, 0), leaves, dout))

    return iteration


def squares(grads: tuple[Tensor, ...]) -> Tensor:
    """What both sides must agree on, summed over ranks."""
    return torch.stack([x.double().square().sum() for x in grads])


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    runs: int = 9
    """Counted iterations of each; medians are compared."""
    length: int = 4096
    """Tokens."""


def main(options: Options) -> None:
    """Measure, print, write ``results/against_deepspeed.json``."""
    rows = []
    for mask, heads in product(("causal", "full", "window 512", "12 documents"), HEADS):
        case = Case(mask, options.length, heads)
        with teams(ours=Team(2, 1, ours, case), deepspeed=Team(2, 1, deepspeeds, case)) as members:
            seconds = in_turn(members, options.runs)
            results = {name: team.run()[1] for name, team in members.items()}
        mine, theirs = (torch.stack([x for _, x in results[name]]).sum(0) for name in ("ours", "deepspeed"))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0.0)
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["deepspeed"], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        rows.append(
            {
                "mask": mask, "heads": f"{heads[0]}/{heads[1]}", "auto": results["ours"][0][0],
                "ours ms": median(seconds["ours"]) * 1e3, "DeepSpeed ms": median(seconds["deepspeed"]) * 1e3,
                "ours / DeepSpeed": middle, "half of the pairs between": f"{low:.2f} and {high:.2f}",
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    show(f"{options.length:,} tokens, forward + backward, fp32, 2 ranks x 1 thread", rows)
    write("against_deepspeed", {"rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Options))
