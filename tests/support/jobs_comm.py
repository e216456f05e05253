"""What ranks do in the tests of worlds: as threads and, importable from here, as processes."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from seqpar.comm import DirectExchange, Exchange, KeyValues, RingExchange, Traffic, World, agree, connect
from seqpar.itinerary import ring_order

# K and V of the exchanges' tests: batch, KV heads, head dims; and how many rows each rank holds.
BATCH, HEADS, DIMS = 2, 2, (3, 2)
ROWS = (3, 0, 5, 2)


def communicate(world: World) -> tuple[dict[str, Tensor], dict[str, Traffic]]:
    """What each call of a world brings this rank, and what its meter says of it."""
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    mine = torch.arange(4.0) + 10 * world.rank
    ring, empty = torch.empty(4), torch.empty(0)
    transfer = world.start([(right, mine), (right, empty)], [(left, ring), (left, empty)], "kv")
    # Several at once: of other dtypes, to and from several ranks, with the first still under way.
    others = [rank for rank in range(world.size) if rank != world.rank]
    halves = {rank: torch.empty(3, 2, dtype=torch.bfloat16) for rank in others}
    to_all = [(rank, torch.full((3, 2), world.rank + rank / 4, dtype=torch.bfloat16)) for rank in others]
    at_once = world.start(to_all, list(halves.items()), "grad")
    transfer.wait()
    at_once.wait()
    return {
        "ring": ring,
        "at_once": torch.stack(list(halves.values())),
        "gathered": torch.stack(world.all_gather(torch.tensor([[world.rank, 7]]), "gather")),
        "strided": torch.stack(world.all_gather(torch.arange(6.0).view(2, 3).t() + world.rank, "gather")),
        "reduced": world.all_reduce(torch.tensor([0.1, 1e8]) * (1 + world.rank), "reduce"),
    }, dict(world.meter.by_kind)


def raise_on_one(world: World) -> None:
    """Rank 1 raises; the others wait for it."""
    if world.rank == 1:
        raise RuntimeError("the reason of rank 1")
    world.all_gather(torch.zeros(1), "gather")


def die_on_one(world: World) -> None:
    """Rank 1 ends without a word; the others are busy."""
    if world.rank == 1:
        os._exit(7)
    time.sleep(60)


def hang_on_one(world: World) -> None:
    """Rank 1 never ends."""
    if world.rank == 1:
        time.sleep(60)


def misbehave(world: World, fault: str) -> Tensor:
    """One fault each that NCCL would turn into an error, a hang or wrong numbers."""
    peer = 1 - world.rank
    first = world.rank == 0
    out, into = torch.ones(4), torch.zeros(4)
    if fault == "strides":
        world.start([(peer, torch.ones(4, 4)[:, 1])], [(peer, into)], "kv").wait()
    elif fault == "strides_received":
        world.start([(peer, out)], [(peer, torch.ones(4, 4)[:, 1])], "kv").wait()
    elif fault == "size":
        world.start([(peer, torch.ones(3 if first else 4))], [(peer, into)], "kv").wait()
    elif fault == "dtype":
        world.start([(peer, out.to(torch.bfloat16 if first else torch.float32))], [(peer, into)], "kv").wait()
    elif fault == "order":
        for kind in ("kv", "grad") if first else ("grad", "kv"):
            if kind == "kv":
                world.start([(peer, out)], [(peer, into)], kind).wait()
            else:
                world.start([(peer, out[:2].clone())], [(peer, into[:2].clone())], kind).wait()
    elif fault == "order_of_equals":
        if first:  # a call that the other rank does not make
            world.start([], [], "kv").wait()
        world.start([(peer, out)], [(peer, into)], "kv").wait()
    elif fault == "overwritten":
        transfer = world.start([(peer, out)], [(peer, into)], "kv")
        if first:
            out.zero_()
        transfer.wait()
    elif fault == "read_early":
        numbers = torch.zeros(2, dtype=torch.int64)
        transfer = world.start([(peer, out), (peer, numbers + 5)], [(peer, into), (peer, numbers)], "kv")
        early = torch.cat([into, numbers])
        transfer.wait()
        return torch.stack([early, torch.cat([into, numbers])])
    return into


def refuse_on_one(world: World) -> str:
    """What rank 1's refusal says here."""
    refusal = ValueError("x: got 3, expected 4") if world.rank == 1 else None
    return disagreement(world, "call", {"x": 3}, refusal)


def disagreement(world: World, what: str, fields: dict[str, object], refusal: ValueError | None = None) -> str:
    """The error of an agreement; empty if there is none."""
    try:
        agree(world, what, fields, refusal)
    except ValueError as error:
        return str(error)
    return ""


def connections(world: World) -> list[str]:
    """How every kind of group connects, or why not."""
    mesh = init_device_mesh("cpu", (1, world.size), mesh_dim_names=("dp", "sp"))
    others = dist.new_group([world.size - 1])  # a group of one, and no group to the others
    told = []
    for group in (None, world, dist.group.WORLD, mesh["sp"], mesh["dp"], mesh["sp"].get_group(), mesh, others, "sp"):
        try:
            connected = connect(group)
            told.append(f"{type(connected).__name__} {connected.rank} of {connected.size}")
        except ValueError as error:
            told.append(str(error))
    return told


def kept_rows(owner: int, reader: int) -> list[int]:
    """Which rows of ``owner``'s shard ``reader`` needs in the direct exchange: uneven, sometimes all."""
    rows = list(range(ROWS[owner]))
    return rows if (owner + reader) % 3 == 0 else rows[reader % 2 :: 2]


def shard(rank: int) -> tuple[Tensor, Tensor]:
    """A rank's K and V: numbers that differ everywhere, in strided tensors as transposes leave them."""
    generator = torch.Generator().manual_seed(rank)
    k, v = (torch.randn(BATCH, HEADS, ROWS[rank], dim, generator=generator).transpose(1, 2) for dim in DIMS)
    return k, v


def gradient(reader: int, owner: int, rows: int) -> Tensor:
    """The message of a reader's gradient for an owner's shard: normal numbers, so that rounding shows."""
    size = BATCH * rows * HEADS * sum(DIMS)
    return torch.randn(size, generator=torch.Generator().manual_seed(10 * reader + owner))


def exchange(
    world: World, kind: str, grad_wire: torch.dtype
) -> tuple[list[tuple[Tensor, Tensor]], KeyValues, dict[str, Traffic]]:
    """One backward's pass: the K and V of each step, and the gradient that came home."""
    k, v = shard(world.rank)
    made: Exchange
    inside = 2 if kind == "double" else world.size
    sources = ring_order(world.rank, world.size, inside)
    rows = [ROWS[source] for source in sources]
    if kind == "direct":
        rows[1:] = [len(kept_rows(owner, world.rank)) for owner in sources[1:]]
        sent = [torch.tensor(kept_rows(world.rank, reader), dtype=torch.int64) for reader in range(world.size)]
        needed = [None if len(x) == len(k[0]) else x for x in sent]
        made = DirectExchange(world, k, v, sources, rows, grad_wire, needed)
    else:
        made = RingExchange(world, k, v, sources, rows, grad_wire, inside)
    steps = []
    for owner, num_rows, (key, value) in zip(sources, rows, made, strict=True):
        steps.append((key.clone(), value.clone()))
        message = gradient(world.rank, owner, num_rows)
        made.give_back(KeyValues.carve(message, k, v, num_rows))
    return steps, made.home(), dict(world.meter.by_kind)
