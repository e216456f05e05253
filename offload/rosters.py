"""Shards that a worker keeps, and lists of them that calls are about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.kernels import Kernel, Partial, accumulator_dtype
from seqpar.shards import Shard, Step, meet_itself
from seqpar.stores import Appended


@dataclass(eq=False)
class Kept:
    """A shard of one sequence, and how many tokens each of its layers has."""

    shard: Shard
    lengths: list[int]
    heads: int  # of queries
    capacity: int
    head_dim: tuple[int, int]
    dtype: torch.dtype
    size: int  # bytes of the worker's memory


class Roster:
    """Shards in the order of a frame's pieces, and how many of a call's tokens each gets (None: all)."""

    def __init__(self, shards: Sequence[Kept], counts: Sequence[int] | None) -> None:
        self.shards, self.counts, self.dtype = list(shards), counts, shards[0].dtype
        both = sum(kept.shard.rooms.heads * sum(kept.head_dim) for kept in shards)
        self.token_bytes = both * self.dtype.itemsize  # of a token's keys and values
        out = sum(kept.heads * kept.head_dim[1] for kept in shards) * self.dtype.itemsize
        self.answer_bytes = out + sum(kept.heads for kept in shards) * accumulator_dtype(self.dtype).itemsize

    def steps(self, layer: int, tokens: int) -> list[Step]:
        """What each shard does with so many new tokens. Raises ValueError where it has no room, or no such layer."""
        counts = self.counts or [tokens] * len(self.shards)
        for kept, count in zip(self.shards, counts, strict=True):
            if layer >= len(kept.lengths) or count > tokens or kept.lengths[layer] + count > kept.capacity:
                raise ValueError(
                    f"call: got {count} of {tokens} tokens for layer {layer}, expected a layer below "
                    f"{len(kept.lengths)} and at most {kept.capacity} tokens in all"
                )
        return [
            kept.shard.rooms.step((Appended(kept.lengths[layer] + count, count),), tokens)
            for kept, count in zip(self.shards, counts, strict=True)
        ]

    def queries_shapes(self, tokens: int) -> list[tuple[int, ...]]:
        """Of the queries in a frame."""
        return [(tokens, kept.heads, kept.head_dim[0]) for kept in self.shards]

    def keys_shapes(self, steps: Sequence[Step]) -> list[tuple[int, ...]]:
        """Of the rows in a frame that shards keep: of all keys, and then of all values."""
        both = list(zip(self.shards, steps, strict=True))
        return [(len(_kept(step)), kept.head_dim[which]) for which in (0, 1) for kept, step in both]

    def older(
        self, layer: int, steps: Sequence[Step], queries: Sequence[Tensor], scale: float, kernel: Kernel
    ) -> list[Partial]:  # fmt: skip
        """Attention of each shard's ``queries [T, H, D]`` to the keys before the step's new ones."""
        return [
            kept.shard.attend(layer, step, q.unsqueeze(0), scale=scale, kernel=kernel, among="old")
            for kept, step, q in zip(self.shards, steps, queries, strict=True)
        ]

    def write(self, layer: int, steps: Sequence[Step], rows: Sequence[Tensor]) -> None:
        """Put the rows ``[N, D]`` that shards keep where they belong, as :meth:`keys_shapes` lists them."""
        both = zip(rows[: len(steps)], rows[len(steps) :], strict=True)
        for kept, step, (keys, values) in zip(self.shards, steps, both, strict=True):
            kept.shard.write(layer, step, _spread(keys, step), _spread(values, step))
            kept.lengths[layer] = step.appended[0].length

    def newer(
        self, layer: int, steps: Sequence[Step], queries: Sequence[Tensor], rows: Sequence[Tensor],
        found: Sequence[Partial], scale: float, kernel: Kernel,
    ) -> list[Partial]:  # fmt: skip
        """What was found of the older keys, and of the new ``rows``, which have been written."""
        merged, both = [], zip(rows[: len(steps)], rows[len(steps) :], strict=True)
        for kept, step, q, part, (k, v) in zip(self.shards, steps, queries, found, both, strict=True):
            if step.tokens == step.appended[0].new == 1 and len(k) == step.rooms.heads and step.rooms.sees_itself:
                merged.append(meet_itself(part, q.unsqueeze(0), k, v, scale))
            else:
                merged.append(kept.shard.meet(layer, step, part, q.unsqueeze(0), scale=scale, kernel=kernel))
        return merged


def _kept(step: Step) -> Tensor:
    return step.rooms.kept(step.appended[0])


def _spread(rows: Tensor, step: Step) -> Tensor:
    """Kept rows ``[N, D]`` of the new tokens' heads, as ``[1, T, heads, D]``; what is not kept is never read."""
    kept, tokens, heads = _kept(step), step.tokens, step.rooms.heads
    if len(kept) == tokens * heads:
        return rows.view(1, tokens, heads, -1)
    whole = rows.new_zeros(tokens * heads, rows.shape[1])
    whole.index_copy_(0, kept.to(rows.device) + (tokens - step.appended[0].new) * heads, rows)
    return whole.view(1, tokens, heads, -1)
