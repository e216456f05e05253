"""What a rank does in tests of DeepSpeed's adapter."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import seqpar
from seqpar.comm import World, connect
from seqpar.integrations.options import AttentionOptions

from .jobs_whole_rows import ACCUMULATED, LENGTH, VOCABULARY, Rows, batches, llama, loss_sum, rows_of
from .oracle import error

CLIP = 0.5


def in_turn(world: World, jobs: list[tuple[Callable, tuple]]) -> list[Any]:
    """Several jobs on the same processes, which take longer to start than to do them."""
    return [job(world, *args) for job, args in jobs]


def quiet() -> None:
    """DeepSpeed on CPUs, and what it logs unsaid."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    logging.disable(logging.WARNING)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """One whose steps grow with the gradients, as Adam's would not."""
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def reference(steps: int, replicas: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of so many steps on one rank, and the first step's gradients."""
    model = llama("sdpa")
    optimizer = optimizer_of(model)
    losses, first = [], {}
    for step in range(steps):
        total = 0.0
        for rows in zip(*[batches(step, replica) for replica in range(replicas)], strict=True):
            loss = mean_over_tokens(model, list(rows)) / ACCUMULATED
            loss.backward()
            total += loss.item()
        losses.append(total)
        first = first or {name: p.grad.clone() for name, p in model.named_parameters()}
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return losses, first


def mean_over_tokens(model: Any, rows: list[Rows]) -> Tensor:
    """The mean over all tokens of several replicas' rows."""
    sums = [loss_sum(model, x) for x in rows]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def config_of(stage: int, **section: Any) -> dict[str, Any]:
    """A DeepSpeed config, with a section of ours if it is to say something."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATED,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        **({"seqpar": section} if section else {}),
    }


def train_deepspeed(world: World, stages: dict[int, dict[str, Any]], folder: str, steps: int = 10) -> dict[int, Any]:
    """For each stage the worst errors of a loss and of a first-step gradient against one plain rank."""
    quiet()
    from seqpar.integrations import deepspeed

    worst: dict[int, Any] = {}
    references: dict[int, Any] = {}
    for stage, section in stages.items():
        sequence_ranks = section.get("sequence_parallel_size", world.size)
        replicas = world.size // sequence_ranks
        model = llama("seqpar")
        path = f"{folder}/{stage}-{world.size}-{world.rank}.json"
        Path(path).write_text(json.dumps(config_of(stage, **section)))
        # Each way to give a config.
        config = {1: {"config_params": path}, 2: {"config": config_of(stage, **section)}}
        args = {"args": argparse.Namespace(deepspeed_config=path, local_rank=dist.get_rank())}
        engine, optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer_of(model), **config.get(stage, args)
        )
        assert args["args"].deepspeed_config == path
        assert optimizer is engine.optimizer
        assert engine.train_batch_size() == ACCUMULATED * replicas
        if replicas not in references:  # of one rank, and only one of these needs to know how
            known = [reference(steps, replicas) if world.rank == 0 else None]
            dist.broadcast_object_list(known)
            references[replicas] = known[0]
        worst[stage] = follow(engine, *references[replicas], dist.get_rank() // sequence_ranks)
        assert engine.seqpar.plan.world.size == sequence_ranks
        engine.destroy()
    return worst


def follow(engine: Any, losses: list[float], first: dict[str, Tensor], replica: int) -> tuple[float, float]:
    """The worst errors of a loss and of a first-step gradient as an engine trains."""
    off, wrong = 0.0, 0.0
    for step, expected in enumerate(losses):
        total = 0.0
        for rows in batches(step, replica):
            loss = engine(input_ids=rows.tokens, labels=rows.labels, position_ids=rows.positions).loss
            engine.backward(loss)
            total += loss.item() / ACCUMULATED
            if step == 0 and engine.is_gradient_accumulation_boundary():
                wrong = wrong_gradients(engine, first)
            engine.step()
        off = max(off, abs(total / expected - 1))
    return off, wrong


def wrong_gradients(engine: Any, expected: dict[str, Tensor]) -> float:
    """The worst error of a gradient that an engine is about to use."""
    from deepspeed.utils import safe_get_full_grad

    named = engine.module.named_parameters()
    return max(error(safe_get_full_grad(parameter), expected[name]) for name, parameter in named)


class Attends(nn.Module):
    """A model that is not of transformers, around a DistributedAttention or a function like it."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 48), nn.Linear(48, VOCABULARY)
        self.q, self.kv, self.attend = nn.Linear(48, 48), nn.Linear(48, 32), attend

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]."""
        x = self.embed(tokens)
        k, v = self.kv(x).unflatten(-1, (4, 8)).chunk(2, 2)
        return self.head(self.attend(self.q(x).unflatten(-1, (6, 8)), k, v, 0).flatten(2))


def plainly(q: Tensor, k: Tensor, v: Tensor, batch_dim_idx: int, mask: Tensor | None = None) -> Tensor:
    """Causal attention over whole tensors, or under a mask."""
    q, k, v = (x.transpose(0, batch_dim_idx).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2).transpose(0, batch_dim_idx)


def beside_an_mpu(world: World, stages: tuple[int, ...]) -> float:
    """The worst gradient of a model that deepspeed.initialize is given with our mpu, and how it deals rows."""
    quiet()
    import deepspeed

    from seqpar.integrations.deepspeed import DistributedAttention, SequenceParallel

    worst = 0.0
    for stage in stages:
        mpu = SequenceParallel(2)
        replica, here = mpu.get_data_parallel_rank(), mpu.get_sequence_parallel_rank()
        group = mpu.get_sequence_parallel_group()
        torch.manual_seed(1)
        plain = Attends(plainly)
        model = Attends(DistributedAttention(None, group))
        model.load_state_dict(plain.state_dict())
        data = [torch.full((LENGTH,), number) for number in range(8)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, _, loader, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, training_data=data, mpu=mpu, config=config_of(stage)
        )
        dealt = connect(dist.group.WORLD).all_gather(torch.tensor(list(loader.data_sampler)), "test")
        assert all(torch.equal(rows, dealt[rank - rank % 2]) for rank, rows in enumerate(dealt))
        assert sorted(torch.cat(dealt[::2]).tolist()) == list(range(8))
        for micro in range(ACCUMULATED):
            sums, counts = [], []
            for r in range(world.size // 2):
                tokens = rows_of(10 * micro + r, length=LENGTH + 1).tokens
                labels = tokens.roll(-1, 1).masked_fill(torch.rand(1, LENGTH + 1) < 0.5 * (r + micro) / 2, -100)
                logits = plain(tokens)
                sums.append(F.cross_entropy(logits[0], labels[0], reduction="sum", ignore_index=-100))
                counts.append(int((labels != -100).sum()))
                if r == replica:
                    x, y = (t.chunk(2, 1)[here] for t in (tokens, labels))
            (sum(sums) / sum(counts) / ACCUMULATED).backward()
            total = F.cross_entropy(engine(x)[0], y[0], reduction="sum", ignore_index=-100)
            loss = seqpar.token_mean(total, (y != -100).sum(), dist.group.WORLD)
            engine.backward(loss if stage == 3 else loss / mpu.get_sequence_parallel_world_size())
            if engine.is_gradient_accumulation_boundary():
                worst = max(worst, wrong_gradients(engine, {n: p.grad for n, p in plain.named_parameters()}))
            engine.step()
        engine.destroy()
    return worst


def instead_of_deepspeeds_attention(world: World) -> float:
    """The worst error of out and gradients of `DistributedAttention`, against DeepSpeed's own and a plain one."""
    quiet()
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention as Theirs

    from seqpar.integrations.deepspeed import DistributedAttention

    deepspeed.init_distributed("gloo", dist_init_required=False)
    group, generator, worst = dist.group.WORLD, torch.Generator().manual_seed(0), 0.0
    near = torch.ones(34, 34, dtype=torch.bool).tril().triu(-8)
    for axis, who, mask in (
        (0, None, None),
        (1, None, None),
        (0, seqpar.SlidingWindow(8), near),
        (1, AttentionOptions(mask="window", window=9, schedule="ulysses", kernel="reference"), near),
    ):
        whole = [torch.randn(2, 34, heads, 8, generator=generator).transpose(0, axis) for heads in (4, 2, 2, 4)]
        shards = [x.chunk(world.size, 1 - axis)[world.rank].detach().requires_grad_() for x in whole]
        leaves = [x.requires_grad_() for x in whole[:3]]
        out = plainly(*leaves, axis, mask)
        expected = [out, *torch.autograd.grad(out, leaves, whole[3])]
        expected = [x.chunk(world.size, 1 - axis)[world.rank] for x in expected]
        layers = [DistributedAttention(who, group, gather_idx=1 - axis, num_kv_heads=2) for _ in range(2)]
        theirs = Theirs(lambda q, k, v, axis=axis, mask=mask: plainly(q, k, v, axis, mask), group, 2, 1 - axis)
        for layer in (*layers, theirs):
            meter = getattr(layer, "_shared", None) and layer._shared.world.meter
            planned = meter.by_kind["agree"].calls if meter and layer is layers[1] else 0
            out = layer(*shards[:3], axis)
            got = [out, *torch.autograd.grad(out, shards[:3], shards[3])]
            worst = max(worst, *(error(a, b) for a, b in zip(got, expected, strict=True)))
            assert not planned or meter.by_kind["agree"].calls == planned, "the second layer has the first one's plan"
    return worst


def refused_by_deepspeed(world: World) -> dict[str, str]:
    """What this rank is told of mistakes in a config, a model, an attention and its call."""
    quiet()
    from seqpar.integrations import deepspeed, supported

    model, group = llama("seqpar"), dist.group.WORLD
    x = torch.randn(1, 6, 4, 8)
    layer = deepspeed.DistributedAttention(None, group, num_kv_heads=4)
    on_gpus = deepspeed.DistributedAttention(AttentionOptions(kernel="library"), group)

    def start(section: Any = None, of: Any = model, zero: Any = None, **more: Any) -> Callable[[], Any]:
        config = {**config_of(1), "seqpar": section or {}, **(more.pop("top", None) or {})}
        config["zero_optimization"] = zero or config["zero_optimization"]
        return lambda: deepspeed.initialize(**{"model": of, "config": config, **more})

    own = "zero_quantized_gradients"
    wrong: dict[str, Callable[[], Any]] = {
        "key": start({"sequence_parallel": 2}),
        "value": start({"mask": "window"}),
        "one rank's": start({"exchange": "direct"} if world.rank else {}),
        "size": start({"sequence_parallel_size": 3}),
        "mpu": start(mpu=object()),
        "mesh": start(mesh_param=(1, 2)),
        "top": start(top={"sequence_parallel_size": 2}),
        "predivided": start(top={"gradient_predivide_factor": 2.0}),
        "tensor parallel": start(top={"tensor_parallel": {"autotp_size": 2}}),
        "mics": start(zero={"stage": 3, "mics_shard_size": 2}),
        "quantized": start(zero={"stage": 3, own: True}),
        "not scattered": start(zero={"stage": 3, "reduce_scatter": False}),
        "other model": start(of=nn.Linear(2, 2)),
        "other attention": start(of=llama("sdpa")),
        "kernel": start({"kernel": "reference"}),
        "no config": start(config=None),
        "two configs": start(args=argparse.Namespace(deepspeed_config="ds.json")),
        "mpu's size": lambda: deepspeed.SequenceParallel(3),
        "local attention": lambda: deepspeed.DistributedAttention(nn.Identity(), group),
        "scatter": lambda: deepspeed.DistributedAttention(None, group, scatter_idx=1),
        "gather": lambda: deepspeed.DistributedAttention(None, group, gather_idx=2),
        "stream": lambda: deepspeed.DistributedAttention(None, group, sp_stream=object()),
        "layers": lambda: deepspeed.DistributedAttention(AttentionOptions(mask="s2", s2_dense_layers=(1,)), group),
        "rotary": lambda: layer(x, x, x, 0, (x, x)),
        "argument": lambda: layer(x, x, x, 0, None, x),
        "keyword": lambda: layer(x, x, x, 0, attn_mask=x),
        "axis": lambda: layer(x, x, x, 2),
        "dims": lambda: layer(x[0], x[0], x[0], 0),
        "heads": lambda: layer(x, x[:, :, :2], x[:, :, :2], 0),
        "kernel of a layer": lambda: on_gpus(x, x, x, 0),
        "uneven": lambda: layer(*[x[:, world.rank :]] * 3, 0),
    }
    told = {name: _told(call) for name, call in wrong.items()}
    supported.installed_version = lambda package: "0.20.1"
    told["version"] = _told(start())
    assert not model._forward_pre_hooks, "no refused call leaves a hook"
    return told


def _told(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"
