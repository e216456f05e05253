"""Tokens for heads and back: the all-to-all of Ulysses (Jacobs et al. 2023), for any number of heads and any tokens.

Before, a rank holds some tokens with all their heads; after, some heads of all its group's tokens, which stand in the
order of their positions. Every pair of ranks exchanges one message each way, of all tensors together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .world import World


class Dealt(NamedTuple):
    """How a tensor is dealt: which of its heads each rank gets, and where each rank's tokens stand among all."""

    heads: Sequence[slice]
    places: Sequence[Tensor]

    def shape(self, x: Tensor, rank: int, heads_of: int) -> tuple[int, ...]:
        """The part of ``x`` that is ``rank``'s tokens and the heads dealt to ``heads_of``."""
        dealt = self.heads[heads_of]
        return x.shape[0], len(self.places[rank]), dealt.stop - dealt.start, x.shape[3]


def to_heads(world: World, tensors: Sequence[Tensor], dealing: Sequence[Dealt], kind: str) -> list[Tensor]:
    """From this rank's tokens ``[B, T, H, D]`` of each tensor to its heads of all tokens; tensors of one dtype."""
    received = _swap(
        world,
        lambda peer: [x[:, :, dealt.heads[peer]] for x, dealt in zip(tensors, dealing, strict=True)],
        lambda peer: [dealt.shape(x, peer, world.rank) for x, dealt in zip(tensors, dealing, strict=True)],
        kind,
    )
    merged = []
    for i, (x, dealt) in enumerate(zip(tensors, dealing, strict=True)):
        batch, _, heads, dim = dealt.shape(x, world.rank, world.rank)
        whole = x.new_empty(batch, sum(map(len, dealt.places)), heads, dim)
        for rank, places in enumerate(dealt.places):
            whole.index_copy_(1, places, received[rank][i])
        merged.append(whole)
    return merged


def to_tokens(
    world: World, tensors: Sequence[Tensor], dealing: Sequence[Dealt], num_heads: Sequence[int], kind: str
) -> list[Tensor]:
    """From this rank's heads of all tokens back to its tokens with all ``num_heads`` of each tensor.

    Heads that several ranks had are added, in fp32 at least and in the order of ranks.
    """
    received = _swap(
        world,
        lambda peer: [x.index_select(1, dealt.places[peer]) for x, dealt in zip(tensors, dealing, strict=True)],
        lambda peer: [dealt.shape(x, world.rank, peer) for x, dealt in zip(tensors, dealing, strict=True)],
        kind,
    )
    whole = []
    for i, (x, dealt, heads) in enumerate(zip(tensors, dealing, num_heads, strict=True)):
        batch, tokens, _, dim = dealt.shape(x, world.rank, world.rank)
        repeated = sum(part.stop - part.start for part in dealt.heads) > heads
        dtype = torch.promote_types(x.dtype, torch.float32) if repeated else x.dtype
        mine = x.new_zeros(batch, tokens, heads, dim, dtype=dtype)
        for rank, part in enumerate(dealt.heads):
            mine[:, :, part] += received[rank][i]
        whole.append(mine.to(x.dtype))
    return whole


Parts = Callable[[int], list[Tensor]]
Shapes = Callable[[int], list[tuple[int, ...]]]


def _swap(world: World, parts: Parts, shapes: Shapes, kind: str) -> list[list[Tensor]]:
    """``parts(peer)`` goes to each peer as one message, and comes from each as ``shapes(peer)``; by rank."""
    others = [(world.rank + step) % world.size for step in range(1, world.size)]
    sends, receives = [], []
    dtype = parts(world.rank)[0].dtype
    for peer in others:
        sends.append((peer, torch.cat([part.reshape(-1) for part in parts(peer)])))
        length = sum(math.prod(shape) for shape in shapes(peer))
        receives.append((peer, sends[-1][1].new_empty(length, dtype=dtype)))
    transfer = world.start(sends, receives, kind)
    received = {world.rank: list(parts(world.rank))}
    transfer.wait()
    for peer, message in receives:
        pieces = message.split([math.prod(shape) for shape in shapes(peer)])
        received[peer] = [piece.view(shape) for piece, shape in zip(pieces, shapes(peer), strict=True)]
    return [received[rank] for rank in range(world.size)]
