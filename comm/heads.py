"""Tokens for heads and back: the all-to-all of Ulysses (Jacobs et al. 2023), for any number of heads and any tokens.

Before, a rank holds some tokens with all their heads; after, some heads of all its group's tokens, which stand in the
order of their positions. Every pair of ranks exchanges one message each way, of all tensors together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .messages import Form, swap
from .world import World


class Dealt(NamedTuple):
    """How a tensor is dealt: which of its heads each rank gets, and where each rank's tokens stand among all."""

    heads: Sequence[slice]
    places: Sequence[Tensor]

    def form(self, x: Tensor, rank: int, heads_of: int) -> Form:
        """Of the part of ``x`` that is ``rank``'s tokens and the heads dealt to ``heads_of``."""
        dealt = self.heads[heads_of]
        return (x.shape[0], len(self.places[rank]), dealt.stop - dealt.start, x.shape[3]), x.dtype


def to_heads(world: World, tensors: Sequence[Tensor], dealing: Sequence[Dealt], kind: str) -> list[Tensor]:
    """From this rank's tokens ``[B, T, H, D]`` of each tensor to its heads of all tokens."""
    both = list(zip(tensors, dealing, strict=True))

    def pack(peer: int, into: list[Tensor]) -> None:
        for (x, dealt), part in zip(both, into, strict=True):
            part.copy_(x[:, :, dealt.heads[peer]])

    sent = [[dealt.form(x, world.rank, peer) for x, dealt in both] for peer in range(world.size)]
    arriving = [[dealt.form(x, peer, world.rank) for x, dealt in both] for peer in range(world.size)]
    received = swap(world, pack, sent, arriving, tensors[0].device, kind)
    merged = []
    for i, (x, dealt) in enumerate(both):
        (batch, _, heads, dim), _ = dealt.form(x, world.rank, world.rank)
        whole = x.new_empty(batch, sum(map(len, dealt.places)), heads, dim)
        for rank, places in enumerate(dealt.places):
            part = x[:, :, dealt.heads[rank]] if rank == world.rank else received[rank][i]
            whole.index_copy_(1, places, part)
        merged.append(whole)
    return merged


def to_tokens(
    world: World, tensors: Sequence[Tensor], dealing: Sequence[Dealt], num_heads: Sequence[int], kind: str
) -> list[Tensor]:
    """From this rank's heads of all tokens back to its tokens with all ``num_heads`` of each tensor.

    Heads that several ranks had are added, in fp32 at least and in the order of ranks.
    """
    both = list(zip(tensors, dealing, strict=True))

    def pack(peer: int, into: list[Tensor]) -> None:
        for (x, dealt), part in zip(both, into, strict=True):
            torch.index_select(x, 1, dealt.places[peer], out=part)

    sent = [[dealt.form(x, peer, world.rank) for x, dealt in both] for peer in range(world.size)]
    arriving = [[dealt.form(x, world.rank, peer) for x, dealt in both] for peer in range(world.size)]
    received = swap(world, pack, sent, arriving, tensors[0].device, kind)
    whole = []
    for i, ((x, dealt), heads) in enumerate(zip(both, num_heads, strict=True)):
        (batch, tokens, _, dim), _ = dealt.form(x, world.rank, world.rank)
        own = x.index_select(1, dealt.places[world.rank])
        parts = [own if rank == world.rank else part[i] for rank, part in enumerate(received)]
        if sum(part.stop - part.start for part in dealt.heads) == heads:
            whole.append(torch.cat(parts, 2))
            continue
        mine = x.new_zeros(batch, tokens, heads, dim, dtype=torch.promote_types(x.dtype, torch.float32))
        for dealt_to, part in zip(dealt.heads, parts, strict=True):
            mine[:, :, dealt_to] += part
        whole.append(mine.to(x.dtype))
    return whole
