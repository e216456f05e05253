"""What a rank does in the tests of the drop-in functions and of whole models. Threads and processes run it alike."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import seqpar
from seqpar.comm import World
from seqpar.integrations import flash_attn
from seqpar.integrations.torch import parallelize

from .oracle import error


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a drop-in function, by every rank: `cu` are whole documents' bounds, for functions that take some."""

    name: str
    length: int
    cu: tuple[int, ...] | None = None
    form: str = "func"
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    heads: tuple[int, int] = (4, 2)
    scale: float | None = None

    @property
    def bounds(self) -> list[int]:
        """Of all documents; of the whole rows where there are none."""
        return list(self.cu or (0, self.length))

    def inputs(self) -> dict[str, Tensor]:
        """Whole q, k, v and the gradients of out and lse, in fp64, with a batch of 2 where there are no documents."""
        generator = torch.Generator().manual_seed(0)
        batch, (heads, kv_heads) = 1 if self.cu else 2, self.heads
        shapes = {"q": (heads, 8), "k": (kv_heads, 8), "v": (kv_heads, 8), "dout": (heads, 8), "dlse": (heads,)}
        return {
            name: torch.randn(batch, self.length, *shape, dtype=torch.float64, generator=generator)
            for name, shape in shapes.items()
        }

    def positions(self, rank: int, ranks: int) -> Tensor:
        """The tokens that a rank holds by the name's convention, dealt with torch.chunk."""
        tokens = torch.arange(self.length)
        if self.name.startswith("stripe"):
            return tokens[rank::ranks]
        by_document = "varlen" in self.name and not self.name.startswith("llama3")
        held = []
        for begin, end in pairwise(self.bounds if by_document else [0, self.length]):
            if self.name.startswith("zigzag"):
                chunks = tokens[begin:end].chunk(2 * ranks)
                held += [chunks[rank], chunks[2 * ranks - 1 - rank]]
            else:
                held.append(tokens[begin:end].chunk(ranks)[rank])
        return torch.cat(held)


def drop_in(world: World, call: Call, group: Any = "world") -> dict[str, Tensor]:
    """This rank's positions, out, lse, and gradients of q, k and v."""
    held = call.positions(world.rank, world.size)
    local = {name: x[:, held].clone() for name, x in call.inputs().items()}
    packed = call.cu is not None
    leaves = [(local[name][0] if packed else local[name]).requires_grad_() for name in "qkv"]
    q, k, v = leaves
    inputs = {"func": [q, k, v], "kvpacked_func": [q, torch.stack([k, v], -3)]}.get(call.form)
    arguments = inputs or [torch.stack([q, k, v], -3)]
    if call.name.startswith("llama3"):
        cu = torch.tensor(call.cu, dtype=torch.int32)
        sliced = flash_attn.llama3_flash_attn_prepare_cu_seqlens(cu, call.causal, world.rank, world.size)
        arguments += [*sliced[:4], 1, sliced[4]]
    elif packed:
        cu = torch.tensor(call.cu, dtype=torch.int32) // world.size
        arguments += [cu, int(cu.diff().max())]
    function = getattr(flash_attn, f"{call.name}_{call.form}")
    options = {"causal": call.causal, "window_size": call.window, "softmax_scale": call.scale}
    options["group"] = world if group == "world" else group
    out, lse, probs = function(*arguments, return_attn_probs=True, deterministic=True, **options)
    assert probs is None
    assert torch.equal(function(*arguments, **options), out)
    objective = (out * local["dout"].reshape(out.shape)).sum()
    objective = objective + (lse.transpose(-1, -2) * local["dlse"].reshape(*out.shape[:-1])).sum()
    grads = torch.autograd.grad(objective, leaves)
    found = {"out": out.detach(), "lse": lse.detach().transpose(-1, -2), **dict(zip("qkv", grads, strict=True))}
    if packed:
        found = {name: x.unsqueeze(0) for name, x in found.items()}
    return {"held": held, **found}


def drop_in_by_default(world: World, calls: list[Call]) -> list[dict[str, Tensor]]:
    """What `drop_in` finds without a group."""
    return [drop_in(world, call, group=None) for call in calls]


class Attention(nn.Module):
    """Causal attention by PyTorch's SDPA, with RoPE, 4 query heads and 2 KV heads of 8."""

    def __init__(self, expand: bool, inside: str | None) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, out, bias=False) for out in (32, 16, 16, 32))
        self.expand, self.inside = expand, inside

    def forward(self, x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
        """x [B, T, 32], positions [1|B, T], frequencies [4]."""
        q, k, v = (project(x).view(*x.shape[:2], -1, 8).transpose(1, 2) for project in (self.q, self.k, self.v))
        angles = positions[:, None, :, None] * frequencies
        q, k = (torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).to(x.dtype)
                for a, b in (q.chunk(2, -1), k.chunk(2, -1)))  # fmt: skip
        if self.expand:
            k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        attend = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=not self.expand)
        out = attend(q, k, v) if self.inside is None else checkpoint(attend, q, k, v, **CHECKPOINTS[self.inside])
        return self.o(out.transpose(1, 2).flatten(2))


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "non-reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {"use_reentrant": False, "context_fn": seqpar.checkpoint_context},
}


class Block(nn.Module):
    """Attention and a gated MLP."""

    def __init__(self, expand: bool, inside: str | None) -> None:
        super().__init__()
        self.attention, self.norms = Attention(expand, inside), nn.ModuleList([nn.RMSNorm(32), nn.RMSNorm(32)])
        self.up, self.gate, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
        """x [B, T, 32], positions [1|B, T], frequencies [4]."""
        x = x + self.attention(self.norms[0](x), positions, frequencies)
        y = self.norms[1](x)
        return x + self.down(self.up(y) * F.silu(self.gate(y)))


class Net(nn.Module):
    """Two blocks. checkpoint: how each is called; inside: how the attention in each is called."""

    def __init__(self, expand: bool = False, checkpoint: str | None = None, inside: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.blocks = nn.ModuleList(Block(expand, inside) for _ in range(2))
        self.checkpoint = checkpoint
        self.register_buffer("frequencies", torch.tensor([1.0, 0.3, 0.1, 0.03]))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [B, T], positions [1|B, T] -> logits [B, T, 50]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.checkpoint is None:
                x = block(x, positions, self.frequencies)
            else:
                x = checkpoint(block, x, positions, self.frequencies, **CHECKPOINTS[self.checkpoint])
        return self.head(x)


# Rows of packed documents, of which each ends with a token without a label.
DOCUMENTS = [[0, 20, 21, 53], [0, 9, 53]]


def rows() -> Tensor:
    """Whole tokens [2, 53]."""
    return torch.randint(0, 50, (2, 53), generator=torch.Generator().manual_seed(1))


def loss_alone(model: nn.Module, tokens: Tensor, documents: list[list[int]]) -> Tensor:
    """The mean loss of unsharded documents, one after another."""
    total, count = torch.zeros(()), 0
    for row, bounds in zip(tokens, documents, strict=True):
        for begin, end in pairwise(bounds):
            document = row[None, begin:end]
            logits = model(document, torch.arange(end - begin)[None])[0, :-1]
            total = total + F.cross_entropy(logits, document[0, 1:], reduction="sum")
            count += end - begin - 1
    return total / count


def loss_shared(model: nn.Module, handle: Any, tokens: Tensor, documents: list[list[int]]) -> Tensor:
    """The same by this rank's tokens of these rows, and all others' of theirs."""
    batch = handle.shard(tokens, cu_seqlens=documents)
    logits = model(batch.tokens, batch.position_ids)
    total = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    return handle.loss(total, (batch.labels != -100).sum())


def train(world: World, steps: int = 10) -> list[float]:
    """The worst errors of a loss and of a gradient under FSDP2, with KV heads grouped and expanded."""
    worst = [0.0, 0.0]
    for expand in (False, True):
        alone = Net(expand)
        model = copy.deepcopy(alone)
        model.checkpoint = "non-reentrant" if expand else None
        if world.size < 4:
            mesh, axes, mine = init_device_mesh("cpu", (world.size,)), None, slice(None)
        else:
            mesh, axes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp")), "sp"
            mine = slice(mesh.get_local_rank("dp"), mesh.get_local_rank("dp") + 1)
        handle = None if expand else parallelize(model, mesh, axes=axes)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        handle = handle or parallelize(model, mesh, axes=axes)  # before and after: either will do
        optimizers = [torch.optim.AdamW(x.parameters(), lr=1e-2) for x in (alone, model)]
        for step in range(steps):
            losses = [loss_alone(alone, rows(), DOCUMENTS), loss_shared(model, handle, rows()[mine], DOCUMENTS[mine])]
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
            worst[0] = max(worst[0], error(losses[1].detach(), losses[0].detach()))
            if step == 0:
                pairs = zip(model.parameters(), alone.parameters(), strict=True)
                worst[1] = max(error(shared.grad.full_tensor(), whole.grad) for shared, whole in pairs)
            for optimizer in optimizers:
                optimizer.step()
        assert losses[0] < 0.5 * 4.0, "nothing was learned"
    assert worst[0] <= 1e-4, worst
    assert worst[1] <= 1e-5, worst
    return worst


def gradients(world: World, model: nn.Module, loss: Tensor, elsewhere: bool = False) -> list[Tensor]:
    """All ranks' gradients, averaged; by a backward in another thread, as on a GPU, if it shall be elsewhere."""
    if elsewhere:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        loss.backward()
    return [world.all_reduce(x.grad, "test") / world.size for x in model.parameters()]


def recompute(world: World) -> dict[str, float]:
    """The worst error of a gradient by kind of checkpoint and compiler."""
    alone = Net()
    loss_alone(alone, rows(), DOCUMENTS).backward()
    found = {}
    for way, compiles in (
        (None, "model"),
        ("non-reentrant", "blocks"),
        ("reentrant", "blocks"),
        *((kind, None) for kind in CHECKPOINTS),
    ):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = Net(checkpoint=way)
        called = torch.compile(model, backend=counter) if compiles == "model" else model
        handle = parallelize(called, dist.group.WORLD)
        for block in model.blocks if compiles == "blocks" else ():
            block.compile(backend=counter)
        for _ in range(2):
            model.zero_grad()
            loss = loss_shared(called, handle, rows(), DOCUMENTS)
            grads = gradients(world, model, loss, elsewhere=compiles is None)
        # Before and after attention, in attention's module and in its block; of two layers, which share them.
        graphs = 0 if compiles is None else 8 if way == "reentrant" else 4  # which also runs without gradients
        assert counter.frame_count == graphs, f"{counter.frame_count} graphs for {way}, {compiles}"
        assert (counter.op_count > 40) == (compiles is not None), f"{counter.op_count} operations were compiled"
        pairs = zip(grads, alone.parameters(), strict=True)
        found[f"{way}, compiled {compiles}"] = max(error(got, expected.grad) for got, expected in pairs)
    assert max(found.values()) <= 1e-5, found
    return found
