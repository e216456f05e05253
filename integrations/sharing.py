"""Plans that the layers of a model share, whoever knows the batch: their caller, or none but they themselves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, MutableMapping, MutableSet, Sequence
from typing import Any, NoReturn
from weakref import WeakSet, WeakValueDictionary

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

import seqpar
from seqpar.comm import Group, World, agree, connect


def layer_plans(
    masks: Sequence[seqpar.Mask], documents: seqpar.Documents, *, layout: str | seqpar.Layout, **arguments: Any
) -> list[seqpar.Plan]:
    """A plan for each layer's mask inside of documents, by `seqpar.plan`'s other arguments.

    Layers with the same mask share it, and all share the layout of their tokens: that of a causal mask, where there is
    one, which leaves least out.
    """
    plans: dict[seqpar.Mask, seqpar.Plan] = {}
    for mask in sorted(dict.fromkeys(masks), key=lambda mask: not isinstance(mask, seqpar.Causal)):
        plans[mask] = seqpar.plan(mask & documents, layout=layout, **arguments)
        layout = plans[mask].layout
    return [plans[mask] for mask in masks]


KEPT = 32
"""Plans of a group that are kept, the latest."""


class SharedPlans:
    """The latest plans over one group of ranks. A layer keeps `SharedPlans.of(group)`, the same as its neighbours.

    A plan is agreed on by all ranks, and the layers of a model should not do so one by one. So of a team of layers the
    first to be called with a batch leads: it agrees on a plan, and the others find that by the batch. A layer that is
    called again begins another batch. As all ranks call the same layers in the same order, in each call either all of
    them agree or none does, whatever their batches are.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._plans: OrderedDict[Hashable, seqpar.Plan] = OrderedDict()
        self._called: dict[Hashable, MutableSet[Any]] = {}  # by team, the layers that had the batch

    @classmethod
    def of(cls, group: Group) -> SharedPlans:
        """Those of a group, as long as some layer keeps them."""
        world = connect(group)
        key = id(world.lasting) if world.size > 1 else None  # which they keep alive: no other has it meanwhile
        found = _of_groups.get(key)
        if found is None:
            found = _of_groups[key] = cls(world)
        return found

    def leads(self, caller: object, team: Hashable) -> bool:
        """Whether it is this layer that agrees with the other ranks. Every call of a layer asks once.

        caller: the layer, the same object batch after batch. team: equal for layers whose masks differ by batch alone.
        """
        begun = team in self._called
        called = self._called.setdefault(team, WeakSet())
        if begun and caller not in called:
            called.add(caller)
            return False
        called.clear()
        called.add(caller)
        return True

    def plan(self, leads: bool, mask: seqpar.Mask, **arguments: Any) -> seqpar.Plan:
        """The plan of `seqpar.plan(mask, group=..., **arguments)`."""
        key = (mask, *sorted(arguments.items()))
        if leads or key not in self._plans:
            plan = seqpar.plan(mask, group=self.world, **arguments)
            self._plans.setdefault(key, plan)  # an earlier one knows what its calls agreed on
        self._plans.move_to_end(key)
        while len(self._plans) > KEPT:
            self._plans.popitem(last=False)
        return self._plans[key]

    def refuse(self, leads: bool, refusal: ValueError) -> NoReturn:
        """Raise it on every rank, where this rank found out before it could ask for a plan."""
        if leads:
            agree(self.world, "seqpar.plan", {}, refusal)
        raise refusal


_of_groups: MutableMapping[int | None, SharedPlans] = WeakValueDictionary()
_bounds: MutableMapping[Tensor, tuple[int, list[int]]] = WeakIdKeyDictionary()


def bounds_of(cu_seqlens: Tensor) -> list[int]:
    """The numbers in a 1-D tensor, read from its device once, however many layers are given it."""
    if cu_seqlens.is_inference():  # which have no version that would tell of a change
        return cu_seqlens.tolist()
    known = _bounds.get(cu_seqlens)
    if known is None or known[0] != cu_seqlens._version:
        known = _bounds[cu_seqlens] = cu_seqlens._version, cu_seqlens.tolist()
    return known[1]
