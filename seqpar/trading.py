"""With whom a rank trades tokens for heads, and how much that moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seqpar.comm import Traffic, World

from .dealing import deal_heads
from .itinerary import itinerary
from .layouts import Layout

if TYPE_CHECKING:
    from .planning import Plan


def messages(
    held: Layout, degree: int, rank: int, heads: int, kv_heads: int, dim: int, value_dim: int
) -> dict[str, list[tuple[int, int]]]:
    """What ``rank`` sends to each other rank of its block of ``degree``, as ``(peer, elements)``, per batch row.

    ``forward``: q, k and v there, out back. ``backward``: dout there, dq, dk and dv back.
    """
    me, first = rank % degree, rank - rank % degree
    hands = deal_heads(heads, kv_heads, degree)
    tokens, keys = ([len(x) for x in part[first : first + degree]] for part in (held.queries, held.keys))
    num_heads, num_keys = ([x.stop - x.start for x in dealt] for dealt in (hands.queries, hands.keys))
    sent: dict[str, list[tuple[int, int]]] = {"forward": [], "backward": []}
    for peer in (peer for peer in range(degree) if peer != me):
        there = tokens[me] * num_heads[peer] * dim + keys[me] * num_keys[peer] * (dim + value_dim)
        back = tokens[peer] * num_heads[me] * dim + keys[peer] * num_keys[me] * (dim + value_dim)
        sent["forward"] += [(peer, there), (peer, tokens[peer] * num_heads[me] * value_dim)]
        sent["backward"] += [(peer, tokens[me] * num_heads[peer] * value_dim), (peer, back)]
    return {way: [(peer, count) for peer, count in sent[way] if count] for way in sent}


class Trade:
    """With whom a rank trades tokens for heads, and the plan by which they attend with others who hold the same heads.

    Attributes:
        world: those who trade with each other.
        plan: of the inner schedule, over the ranks that get the same heads.
    """

    def __init__(self, world: World, plan: Plan, held: Layout) -> None:
        self.world, self.plan, self._held = world, plan, held
        self._places: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}

    def places(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """Where each trading rank's queries, and keys, stand among all of theirs; int64, by rank."""
        if device not in self._places:
            first = self.plan.world.rank * self.world.size
            both = (self.plan.work.queries, self._held.queries), (self.plan.work.keys, self._held.keys)
            queries, keys = (
                [merged.count_below(x.tensor).to(device) for x in held[first : first + self.world.size]]
                for merged, held in both
            )
            self._places[device] = queries, keys
        return self._places[device]

    def traffic(
        self, batch: int, heads: tuple[int, int], head_dim: tuple[int, int], dtype: torch.dtype, rank: int
    ) -> dict[str, Traffic]:
        """See :meth:`Plan.traffic`; without the lse, which only :func:`seqpar.attention_with_lse` brings back."""
        degree = self.world.size
        hands = deal_heads(*heads, degree)
        mine = hands.queries[rank % degree]
        inside = {"forward": Traffic(0, 0), "backward": Traffic(0, 0)}
        if mine.stop > mine.start:
            keys, work, plan = hands.keys[rank % degree], self.plan.work, self.plan
            if plan.mask.by_head:  # those of that rank's heads
                whole = plan.mask, plan.layout, plan.schedule, plan.length, plan.kv_length
                work = itinerary(*whole, plan.world.size, plan.world.rank, heads[1], range(keys.start, keys.stop))
            inside = plan.kv_traffic(work, batch * sum(head_dim), keys.stop - keys.start, dtype, rank // degree)
        sent = messages(self._held, degree, rank, *heads, *head_dim)
        return {
            way: Traffic(
                inside[way].calls + len(sent[way]),
                inside[way].bytes + batch * dtype.itemsize * sum(count for _, count in sent[way]),
            )
            for way in sent
        }
