"""The ranks of a run: their process group, device, mesh, and agreement on what they were told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from seqpar import comm

from .errors import RunError
from .spawn import Place

_AT_ONCE = 8


@dataclass(frozen=True)
class Ranks:
    """This rank's place among all ranks.

    mesh: [dp, sp]; the sp axis shares a sequence, the dp axis repeats it with other rows. world: all ranks in one axis,
    over which parameters are sharded. sequence, everyone: the sp axis and all ranks as seqpar sees them, each with its
    byte meter.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    world: DeviceMesh
    sequence: comm.World
    everyone: comm.World

    def rows(self, whole: list[int]) -> list[int]:
        """This rank's share of the rows of a whole batch, the same on all ranks of its sequence."""
        share = len(whole) // self.mesh["dp"].size()
        first = self.mesh["dp"].get_local_rank() * share
        return whole[first : first + share]

    def agree(self, fields: Mapping[str, object], refusal: ValueError | None = None) -> None:
        """Raise ValueError on every rank where some rank has another value or a refusal, naming field and ranks."""
        named = list(fields.items())
        for first in range(0, max(1, len(named)), _AT_ONCE):
            comm.agree(self.everyone, "options and data", dict(named[first : first + _AT_ONCE]), refusal)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What happens inside happens on all ranks or on none: a ValueError on some rank is raised on every rank."""
        refusal = None
        try:
            yield
        except ValueError as error:
            refusal = error
        self.agree({}, refusal)

    def gather(self, numbers: Sequence[int]) -> Tensor:
        """Every rank's numbers, of which all ranks have as many, int64 [ranks, N] on this rank's device."""
        mine = torch.tensor(numbers, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        return torch.stack(everyone)

    def from_rank0(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        box = torch.tensor([value], device=self.device)
        dist.broadcast(box, src=0)
        return int(box)

    def on_rank0(self, function: Callable[[], str]) -> str:
        """The text that `function` returns on rank 0, on every rank; its ValueError or RunError is raised on all."""
        kinds: tuple[type[Exception], ...] = (ValueError, RunError)
        outcome = [0, ""]
        if self.rank == 0:
            try:
                outcome = [0, function()]
            except kinds as error:
                outcome = [1 + isinstance(error, RunError), str(error)]
        content = json.dumps(outcome).encode()
        box = torch.zeros(self.from_rank0(len(content)), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            box.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(box, src=0)
        kind, text = json.loads(bytes(box.tolist()))
        if kind:
            raise kinds[kind - 1](text)
        return str(text)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


@contextmanager
def connected(place: Place, *, sp: int, threads: int | None, timeout: float) -> Iterator[Ranks]:
    """The ranks, connected to each other while the context lasts.

    sp: how many of them share a sequence, a divisor of their number. threads: of each rank; this machine's cores shared
    out evenly where that is None. timeout: seconds to wait for each other. Raises ValueError without a GPU for each.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if place.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {place.local_rank} got {torch.cuda.device_count()} GPUs; expected one for each rank: "
                f"use --nproc {torch.cuda.device_count()} or fewer"
            )
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    torch.set_num_threads(threads or max(1, cores() // place.local_size))
    wait = timedelta(seconds=timeout)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=place.rendezvous,
        rank=place.rank,
        world_size=place.size,
        timeout=wait,
        device_id=device if on_gpu else None,
    )
    grid = torch.arange(place.size).view(-1, sp)
    dp_group = _my_group(grid.T.tolist(), wait)
    sp_group = _my_group(grid.tolist(), wait)
    mesh = DeviceMesh.from_group([dp_group, sp_group], device.type, mesh=grid, mesh_dim_names=("dp", "sp"))
    all_ranks = dist.group.WORLD
    assert all_ranks is not None, "the process group was just made"
    world = DeviceMesh.from_group(all_ranks, device.type, mesh_dim_names=("world",))
    ended_well = False
    try:
        yield Ranks(
            place.rank, place.size, device, mesh, world, sequence=comm.connect(mesh["sp"]), everyone=comm.connect(world)
        )
        ended_well = True
    finally:
        # After a failure the other ranks may never answer: the process ends without taking the group down.
        if ended_well or place.size == 1:
            dist.destroy_process_group()


def _my_group(groups: list[list[int]], wait: timedelta) -> dist.ProcessGroup:
    """Make all groups, in the same order on every rank, and return the one that this rank is in."""
    made = [dist.new_group(ranks, timeout=wait) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
