"""What a rank does in a test. Functions here run as threads (loopback) and as processes (gloo) alike."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import seqpar
from seqpar.comm import World, connect

from .cases import MASKS, layout_of
from .oracle import dense_attention, error

GRADS = ("q", "k", "v", "sinks")


def attend(
    world: World,
    mask: str,
    layout: str,
    inputs: dict[str, Tensor],
    *,
    schedule: Any = "ring",
    kernel: str = "auto",
    sinks: bool = False,
    lse: bool = False,
) -> dict[str, Tensor]:
    """Whole out and lse, and the gradients of the whole inputs, as this rank comes to know them; and what it sent."""
    case, heads = MASKS[mask], (inputs["q"].shape[2], inputs["k"].shape[2])
    plan = seqpar.plan(
        case.of(heads[1]),
        length=case.length,
        kv_length=case.kv_length,
        group=world,
        layout=layout_of(case, layout, world.size),
        schedule=schedule,
        heads=heads,
    )
    whole = {name: inputs[name].clone().requires_grad_() for name in ("q", "k", "v", "sinks")}
    world.meter.reset()
    out, local_lse = seqpar.attention_with_lse(
        plan.shard(whole["q"]),
        plan.shard(whole["k"], of="keys"),
        plan.shard(whole["v"], of="keys"),
        plan,
        sinks=whole["sinks"] if sinks else None,
        kernel=kernel,
    )
    moved = dict(world.meter.by_kind)
    whole_out, whole_lse = plan.unshard(out), plan.unshard(local_lse, dim=2)
    objective = (whole_out.double() * inputs["dout"].double()).sum()
    if lse:
        seen = whole_lse.isfinite()
        objective = objective + (whole_lse[seen].double() * inputs["dlse"][seen].double()).sum()
    wanted = [whole[name] for name in GRADS if sinks or name != "sinks"]
    grads = torch.autograd.grad(objective, wanted)
    result = {"out": whole_out.detach(), "lse": whole_lse.detach(), **dict(zip(GRADS, grads, strict=False))}
    if sinks and not plan.replicated:  # a parameter: each rank has its part
        result["sinks"] = world.all_reduce(result["sinks"], "test")
    return result | {"forward": moved, "both": dict(world.meter.by_kind)}


def checkpointed(world: World, mode: str, schedule: Any = "ring") -> dict[str, Any]:
    """Gradients through a checkpointed layer, and how often attention ran forward and what was sent for it."""
    generator = torch.Generator().manual_seed(0)  # threads share the default one
    weight = torch.randn(8, 8, dtype=torch.float64, generator=generator).requires_grad_()
    x = torch.randn(1, 30, 4, 8, dtype=torch.float64, generator=generator)
    plan = seqpar.plan(seqpar.Causal(), length=30, group=world, schedule=schedule)

    keys = plan.shard(x, of="keys")

    def layer(local: Tensor) -> Tensor:
        return seqpar.attention(local @ weight, keys, keys, plan) @ weight

    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = seqpar.checkpoint_context
    world.meter.reset()
    with CountForwards() as forwards:
        local = plan.shard(x)
        out = layer(local) if mode == "none" else checkpoint(layer, local, **options)
        out.square().sum().backward()
    assert weight.grad is not None
    return {"grad": weight.grad, "forwards": forwards.count, "traffic": dict(world.meter.by_kind)}


class CountForwards(TorchDispatchMode):
    """Counts how often attention's forward operator really runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.seqpar.attention.default
        return func(*args, **(kwargs or {}))


class Layer(nn.Module):
    """Attention between projections, with 4 query heads and 2 KV heads of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, out, bias=False) for out in (32, 16, 16, 32))

    def forward(self, x: Tensor, plan: seqpar.Plan) -> Tensor:
        """x ``[B, T, 32]``; under tensor parallelism each rank has some of the heads."""
        q, k, v = (project(x).unflatten(-1, (-1, 8)) for project in (self.q, self.k, self.v))
        return self.o(seqpar.attention(q, k, v, plan).flatten(2))


def beside_other_axes(world: World, schedule: Any) -> float:
    """The worst error of a gradient with the sequence on one axis of a mesh, as FSDP2 is, and heads on another."""
    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("sp", "tp"))
    torch.manual_seed(0)
    alone = Layer().double()
    layer = copy.deepcopy(alone)
    split = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "o": RowwiseParallel()}
    parallelize_module(layer, mesh["tp"], split)
    fully_shard(layer, mesh=mesh["sp"])
    x = torch.randn(1, 37, 32, dtype=torch.float64)
    plan = seqpar.plan(seqpar.Causal(), length=37, group=mesh["sp"], schedule=schedule)
    (layer(plan.shard(x), plan).square().sum() * plan.world.size).backward()  # FSDP averages
    alone(x, seqpar.plan(seqpar.Causal(), length=37)).square().sum().backward()
    pairs = zip(layer.parameters(), alone.parameters(), strict=True)
    return max(error(sharded.grad.full_tensor(), whole.grad) for sharded, whole in pairs)


def compiled(world: World, schedule: Any) -> tuple[float, int]:
    """The worst error of a compiled layer's gradients, over plans of several lengths; and how many graphs it took."""
    torch.manual_seed(0)
    layer, counter = Layer().double(), CompileCounterWithBackend("aot_eager")
    fast, worst = torch.compile(layer, fullgraph=True, backend=counter), 0.0
    for length in (12, 14, 16, 18):
        x = torch.randn(1, length, 32, dtype=torch.float64)
        plan = seqpar.plan(seqpar.Causal(), length=length, group=world, schedule=schedule)
        grads = []
        for model in (layer, fast):
            out = model(plan.shard(x), plan)
            grads.append(torch.autograd.grad(out.square().sum(), list(layer.parameters())))
        worst = max(worst, *(error(b, a) for a, b in zip(*grads, strict=True)))
    return worst, counter.frame_count


def plan_automatically(world: World) -> tuple[int, int, seqpar.Rates]:
    """How many messages a first and a second automatic plan of a group send to learn its rates, and what those are."""
    sent = []
    for length in (64, 128):
        plan = seqpar.plan(
            seqpar.Causal(), length=length, group=dist.group.WORLD, schedule="auto", heads=2, head_dim=8,
            dtype=torch.float32,
        )  # fmt: skip
        assert plan.decision is not None
        sent.append(plan.world.meter.by_kind.get("probe", (0, 0))[0])
    return sent[0], sent[1], plan.decision.rates


def rates_of_meshes(world: World) -> list[seqpar.Rates]:
    """The rates found for one axis of all ranks, for two over the same ranks, and for those once connected."""
    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("node", "sp"))
    found = []
    for group in (dist.group.WORLD, mesh, connect(mesh)):
        plan = seqpar.plan(
            seqpar.Causal(), length=64, group=group, schedule="auto", heads=2, head_dim=8, dtype=torch.float32
        )
        assert plan.decision is not None
        found.append(plan.decision.rates)
    hybrid = seqpar.plan(seqpar.Causal(), length=64, group=connect(mesh), schedule="hybrid")
    assert hybrid.schedule == seqpar.Ulysses(degree=world.size // 2)
    return found


def on_mesh_axes(world: World) -> dict[str, Any]:
    """Attention over the second axis of a 2 x 2 mesh, over both axes, and what a 3-D mesh is told."""
    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("dp", "sp"))
    plan = seqpar.plan(seqpar.Causal(), length=9, group=mesh["sp"])
    torch.manual_seed(mesh["dp"].get_local_rank())
    x = torch.randn(1, 9, 2, 8)
    out = plan.unshard(seqpar.attention(*[plan.shard(x)] * 3, plan))
    alone = seqpar.attention(x, x, x, seqpar.plan(seqpar.Causal(), length=9))
    torch.testing.assert_close(out, alone)
    told = {"heads": (5, 5), "head_dim": 8, "dtype": torch.float64}
    chosen = {"hybrid": seqpar.Ulysses(degree=world.size // 2), "double_ring": seqpar.DoubleRing(world.size // 2)}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 9, 5, 8, generator=generator, dtype=torch.float64).requires_grad_()
    alone = seqpar.attention(x, x, x, seqpar.plan(seqpar.Causal(), length=9))
    (expected,) = torch.autograd.grad(alone.square().sum(), x)
    for schedule in ("hybrid", "double_ring", "allgather", "auto"):
        plan = seqpar.plan(seqpar.Causal(), length=9, group=mesh, schedule=schedule, **told)
        assert plan.schedule == chosen.get(schedule, plan.schedule)
        plan.world.meter.reset()
        both = plan.unshard(seqpar.attention(*[plan.shard(x)] * 3, plan))
        torch.testing.assert_close(both, alone, rtol=1e-10, atol=1e-10)
        (grad,) = torch.autograd.grad(both.square().sum(), x)
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)
        # The groups of both axes count in the mesh's meter.
        sent = sum(t.bytes for kind, t in plan.world.meter.by_kind.items() if kind not in ("agree", "gather"))
        assert sent == sum(way.bytes for way in plan.traffic(1, 5, 8, torch.float64).values())
    cube = init_device_mesh("cpu", (1, 2, world.size // 2), mesh_dim_names=("dp", "node", "sp"))
    refused = {}
    for name, arguments in {"cube": {"group": cube}, "axis": {"group": mesh["sp"], "schedule": "hybrid"}}.items():
        try:
            seqpar.plan(seqpar.Causal(), length=9, **arguments)
        except ValueError as error:
            refused[name] = str(error)
    return refused


def tree_on_a_mesh(world: World) -> tuple[float, int, bool]:
    """The worst error on a mesh of two axes, inside the node first; the levels; whether ranks got the same bits."""
    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("node", "sp"))
    plan = seqpar.plan(seqpar.Causal(), length=4, kv_length=30, group=mesh, schedule="tree")
    assert plan.schedule == seqpar.Tree(degree=2)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, 4, 8, dtype=torch.float64, generator=generator) for n in (4, 30))
    keys = plan.shard(k, of="keys")
    out = seqpar.attention(q, keys, keys, plan)
    seen = torch.ones(4, 30, dtype=torch.bool).tril(26)
    expected, _ = dense_attention(q, k, k, seen.view(1, 1, 4, 30))
    same = all(torch.equal(out, other) for other in connect(mesh).all_gather(out, "gather"))
    return error(out, expected), len(plan.levels), same
