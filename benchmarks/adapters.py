"""What the adapters cost besides attention: plans, reshapes, copies. 2 ranks x 1 thread.

Run ``python benchmarks/adapters.py`` on an idle machine with two cores, with ``pip install -e .[dev]``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import tyro
from measuring import Team, median, show, teams, write
from torch import Tensor, nn
from torch.nn import functional as F

import seqpar
from seqpar.comm import World

HEADS, HEAD_DIM = (8, 2), 64
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def megatron(world: World, length: int) -> Attend:
    """`core_attention`, tensors [S, B, H, D]."""
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from seqpar.integrations.megatron import CoreAttention

    parallel_state.initialize_model_parallel(context_parallel_size=world.size)
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS[0] * HEAD_DIM, num_attention_heads=HEADS[0], num_query_groups=HEADS[1],
        attention_dropout=0.0, context_parallel_size=world.size, transformer_impl="local",
    )  # fmt: skip
    core = CoreAttention(config, 1, AttnMaskType.causal, "self")
    return lambda q, k, v: core(*(x.transpose(0, 1) for x in (q, k, v)), None)


def deepspeed(world: World, length: int) -> Attend:
    """`DistributedAttention`, tensors [B, S, H, D]."""
    from seqpar.integrations.deepspeed import DistributedAttention

    attention = DistributedAttention(None, dist.group.WORLD, gather_idx=1)
    return lambda q, k, v: attention(q, k, v, 0)


def huggingface(world: World, length: int) -> Attend:
    """The attention function that models call, tensors [B, H, S, D]."""
    from seqpar.integrations.huggingface import attention_forward

    plan, module = seqpar.plan(seqpar.Causal(), length=length, group=world), nn.Module()
    module.layer_idx = 1
    return lambda q, k, v: attention_forward(
        module, *(x.transpose(1, 2) for x in (q, k, v)), None, seqpar_plan=plan, is_causal=True
    )[0]


def pytorch(world: World, length: int) -> Attend:
    """`F.scaled_dot_product_attention` in a parallelized module, tensors [B, H, S, D]."""
    from seqpar.integrations.torch import parallelize

    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)

    module = Attention()
    handle = parallelize(module, world)
    handle.shard(torch.zeros(1, length, dtype=torch.long))
    return module


def flash_attn(world: World, length: int) -> Attend:
    """`zigzag_ring_flash_attn_func`, tensors [B, S, H, D], a plan agreed on in every call."""
    from seqpar.integrations.flash_attn import zigzag_ring_flash_attn_func

    return lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, causal=True, group=world)


ADAPTERS: dict[str, Callable[[World, int], Attend]] = {
    "Megatron": megatron,
    "DeepSpeed": deepspeed,
    "Hugging Face": huggingface,
    "PyTorch": pytorch,
    "flash_attn": flash_attn,
}


def setup(world: World, name: str, length: int) -> Callable[[], tuple[float, float, float]]:
    """Seconds of a call's forward outside `seqpar.attention`, of the whole forward, and of forward and backward."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    attend = ADAPTERS[name](world, length)
    heads = (HEADS[0], HEADS[1], HEADS[1])
    leaves = [torch.randn(1, length // world.size, h, HEAD_DIM).requires_grad_() for h in heads]
    inside = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            inside += time.perf_counter() - begin
            return result

        return run

    def iteration() -> tuple[float, float, float]:
        nonlocal inside
        inside = 0.0
        names = ("attention", "attention_with_lse")
        patches = {each: timed(getattr(seqpar, each)) for each in names}
        with mock.patch.multiple(seqpar, **patches):
            begin = time.perf_counter()
            out = attend(*leaves)
            forward = time.perf_counter() - begin
        torch.autograd.grad(out.sum(), leaves)
        return forward - inside, forward, time.perf_counter() - begin

    return iteration


def main(length: int = 8192, runs: int = 9) -> None:
    """Medians over runs of the slower rank's share, for each adapter."""
    rows = []
    for name in ADAPTERS:
        with teams(team=Team(2, 1, setup, name, length)) as started:
            seconds = [started["team"].run()[1] for _ in range(runs + 1)][1:]
        shares = [max(outside / forward for outside, forward, _ in ranks) for ranks in seconds]
        of_all = [max(outside / both for outside, _, both in ranks) for ranks in seconds]
        rows.append(
            {
                "adapter": name,
                "outside, ms": 1e3 * median([max(outside for outside, _, _ in ranks) for ranks in seconds]),
                "forward, ms": 1e3 * median([max(forward for _, forward, _ in ranks) for ranks in seconds]),
                "of the forward, %": 100 * median(shares),
                "of forward and backward, %": 100 * median(of_all),
            }
        )
    show(f"{length:,} tokens, {HEADS[0]}/{HEADS[1]} heads x {HEAD_DIM}, fp32, 2 ranks", rows)
    write("adapters", {"length": length, "rows": rows})


if __name__ == "__main__":
    tyro.cli(main)
