"""Ranks that are processes of ``torch.distributed``, over NCCL or gloo."""

from __future__ import annotations

from collections.abc import MutableSet
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .world import Messages, SingleRank, SubWorld, Transfer, World

_begun: MutableSet[dist.ProcessGroup] = WeakSet()  # groups of a mesh's axes in which all ranks have made a call

Group = dist.ProcessGroup | DeviceMesh | World | None
"""What :func:`connect` takes, and so every ``group=`` of seqpar."""


class ProcessGroupWorld(World):
    """The ranks of a ``torch.distributed`` process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(rank=dist.get_rank(group), size=dist.get_world_size(group))
        self.group = group

    @property
    def lasting(self) -> object:
        """The process group."""
        return self.group

    @property
    def control_device(self) -> torch.device:
        """The accelerator under NCCL, which moves nothing else."""
        on_gpu = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    @property
    def payload_device(self) -> torch.device:
        """The accelerator where NCCL is among the group's backends: gloo alone moves nothing from there."""
        on_gpu = "nccl" in dist.get_backend(self.group)
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def _start(self, sends: Messages, receives: Messages) -> Transfer:
        operations = [
            dist.P2POp(operation, tensor, group=self.group, group_peer=peer)
            for operation, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in messages
        ]
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for work in works:
                work.wait()
            operations.clear()  # the tensors had to live until here

        return Transfer(wait)

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor, group=self.group)
        return gathered


def connect(group: Group) -> World:
    """The ranks to share a sequence with, as this rank sees them.

    Args:
        group: a process group, a ``DeviceMesh`` of one axis or two (all its ranks, row by row), None for this rank
            alone, or a :class:`World` (returned as it is: connect once and share it between plans, and its meter counts
            them all).
    """
    if isinstance(group, World):
        return group
    if group is None:
        return SingleRank()
    if isinstance(group, DeviceMesh):
        if group.ndim > 2:
            names = group.mesh_dim_names or ()
            raise ValueError(f"group: got a {group.ndim}-D mesh {names}, expected one or two axes; pass mesh[names]")
        if group.ndim == 2:
            if group.mesh_dim_names is None:
                raise ValueError("group: got a mesh without mesh_dim_names, expected names; give init_device_mesh some")
            return MeshWorld(group) if group.size() > 1 else SingleRank()
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        expected = "a ProcessGroup that this rank is a member of, a DeviceMesh of one or two axes, or None for one rank"
        raise ValueError(f"group: got {group!r}, expected {expected}")
    return ProcessGroupWorld(group) if dist.get_world_size(group) > 1 else SingleRank()


class MeshWorld(SubWorld):
    """The ranks of a mesh of two axes, row by row, split along its axes: there every axis has a group of its own.

    The mesh keeps the group of all of them that is made here. NCCL runs the transfers of a group one after another, so
    only those of different groups are under way at once.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        group, ranks = mesh._flatten().get_group(), mesh.mesh.flatten().tolist()
        super().__init__(ProcessGroupWorld(group), [dist.get_group_rank(group, rank) for rank in ranks])
        self._mesh = mesh

    @property
    def inside(self) -> int:
        """The length of the mesh's last axis."""
        return self._mesh.size(1)

    def split(self, degree: int) -> tuple[World, World]:
        """See :meth:`World.split`."""
        return (self._along(1), self._along(0)) if degree == self._mesh.size(1) else super().split(degree)

    def _along(self, axis: int) -> World:
        group, here = self._mesh.get_group(axis), self._mesh.get_coordinate()
        assert here is not None, "this rank is not in the mesh"
        ranks = self._mesh.mesh.select(1 - axis, here[1 - axis]).tolist()
        whole = ProcessGroupWorld(group)
        if group not in _begun:  # NCCL wants all of a group's ranks in the first call, and an exchange may need few
            whole._all_gather(torch.zeros(1, device=whole.control_device))
            _begun.add(group)
        world = SubWorld(whole, [dist.get_group_rank(group, rank) for rank in ranks])
        world.meter = self.meter
        return world
