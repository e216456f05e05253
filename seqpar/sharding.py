"""Whole tensors to this rank's tokens and back, differentiably.

A whole tensor is replicated: every rank holds all of it, and its complete gradient. So the dual of taking one's rows is
to gather everybody's, and the dual of gathering is to take one's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqpar.comm import World

from .positions import Positions

Held = tuple[Positions, ...]


def select_rows(x: Tensor, dim: int, held: Held, world: World) -> Tensor:
    """This rank's rows along ``dim`` of a whole tensor. Dual: gathers the gradients of everybody's rows."""
    return _Select.apply(x, dim, held, world)


def gather_rows(x: Tensor, dim: int, held: Held, world: World) -> Tensor:
    """The whole tensor, in global order, from every rank's rows along ``dim``. Dual: takes this rank's rows."""
    return _Gather.apply(x, dim, held, world)


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, held: Held, world: World) -> Tensor:
        ctx.args = dim, held, world
        return _select(x, dim, held[world.rank])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grads[0], *ctx.args), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, held: Held, world: World) -> Tensor:
        ctx.args = dim, held, world
        return _gather(x, dim, held, world)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dim, held, world = ctx.args
        return _select(grads[0], dim, held[world.rank]), None, None, None


def _select(x: Tensor, dim: int, mine: Positions) -> Tensor:
    return x.index_select(dim, mine.tensor.to(x.device))


def _gather(x: Tensor, dim: int, held: Held, world: World) -> Tensor:
    """One all-gather, each rank's rows padded to the longest's."""
    lengths = [len(positions) for positions in held]
    x = x.movedim(dim, 0)
    padded = x.new_zeros(max(lengths), *x.shape[1:])
    padded[: len(x)] = x
    shards = world.all_gather(padded, "gather")
    rows = torch.cat([shard[:length] for shard, length in zip(shards, lengths, strict=True)])
    whole = torch.empty_like(rows)
    whole[torch.cat([positions.tensor for positions in held]).to(x.device)] = rows
    return whole.movedim(0, dim)
