"""Ring attention: shards of K and V pass by while this rank's queries attend to one after another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from seqpar.comm import KeyValues
from seqpar.kernels import Intervals, Kernel, OutputGradient, Partial, accumulator_dtype

from .parts import HeadGroup
from .sections import Section

if TYPE_CHECKING:
    from .planning import Plan


def forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, kernel: Kernel,
    repeats: tuple[int, ...] = (),
) -> Partial:  # fmt: skip
    """q ``[B, T, H, D]`` and k, v ``[B, T, Hkv, D]`` are this rank's tokens; so are the partial's out and lse.

    ``sinks [H]`` are one more key per query, of score ``sinks[h]`` and value 0: the partial that the others continue.
    ``repeats``: how often kernels are given each KV head, where the heads of a rank are uneven; it travels once.
    """
    if not q.shape[2]:  # Ulysses may leave a rank without heads
        return Partial.empty(q, v.shape[-1])
    sections = (block.sections for block in plan.work.blocks)
    steps = zip(sections, plan.exchange(k, v), strict=True)
    return attend(plan.work.groups, steps, q, k.shape[2], v.shape[3], sinks, scale, kernel, repeats)


def attend(
    groups: Sequence[HeadGroup], steps: Iterable[tuple[Sequence[Section], tuple[Tensor, Tensor]]],
    q: Tensor, kv_heads: int, value_dim: int, sinks: Tensor | None, scale: float, kernel: Kernel,
    repeats: tuple[int, ...] = (),
) -> Partial:  # fmt: skip
    """The sections of every step over the keys and values that are there in it, each continuing its group's partial."""
    heads = [_Heads.of(group, q.shape[2], kv_heads, repeats) for group in groups]
    partials: list[Partial | None] = [None] * len(heads)
    if sinks is not None:
        for number, mine in enumerate(heads):
            partial = partials[number] = Partial.empty(mine.of_tokens(q), value_dim)
            partial.lse.copy_(sinks[mine.queries].view(1, -1, 1).expand_as(partial.lse))
    for sections, arrived in steps:
        for section in sections:
            if section.pairs:
                mine, carry = heads[section.group], partials[section.group]
                key, value = (mine.repeated(section.keys.take(x)) for x in arrived)
                partials[section.group] = kernel.forward(
                    mine.of_tokens(q), key, value, mine.intervals(section), scale, carry, section.final
                )
    done = [p or Partial.empty(mine.of_tokens(q), value_dim) for mine, p in zip(heads, partials, strict=True)]
    if len(done) == 1:
        return done[0]
    return Partial(torch.cat([p.out for p in done], 2), torch.cat([p.lse for p in done], 1))


def backward(
    plan: Plan, grad: OutputGradient, q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: Kernel,
    repeats: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of this rank's tokens, in accumulator dtype. K and V pass by again; dK and dV follow them home."""
    dtype = accumulator_dtype(q.dtype)
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    if not q.shape[2]:
        return dq, torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    heads = [_Heads.of(group, q.shape[2], k.shape[2], repeats) for group in plan.work.groups]
    grads = [mine.of_output(grad) for mine in heads]
    exchange = plan.exchange(k, v)
    for block, arrived in zip(plan.work.blocks, exchange, strict=True):
        dkv = KeyValues.zeros(*arrived, arrived[0].shape[1], dtype)
        for section in block.sections:
            if section.pairs:
                mine, keys = heads[section.group], section.keys
                key, value = (mine.repeated(keys.take(x)) for x in arrived)
                taken = [keys.room(x) for x in (dkv.k, dkv.v)]
                parts = [mine.room(x) for x in taken]
                kernel.backward(
                    grads[section.group], mine.of_tokens(q), key, value, mine.intervals(section), scale,
                    mine.of_tokens(dq), *parts,
                )  # fmt: skip
                for part, into, whole in zip(parts, taken, (dkv.k, dkv.v), strict=True):
                    mine.add_repeated(part, into)
                    keys.put_back(into, whole)
        exchange.give_back(dkv)
    home = exchange.home()
    return dq, home.k.view(k.shape), home.v.view(v.shape)


class _Heads(NamedTuple):
    """A group's query heads, and how often kernels are given each of its KV heads (empty: once)."""

    queries: slice
    repeats: tuple[int, ...]

    @classmethod
    def of(cls, group: HeadGroup, num_heads: int, kv_heads: int, repeats: tuple[int, ...]) -> _Heads:
        if group.heads is None:
            return cls(slice(None), repeats if max(repeats, default=1) > 1 else ())
        each = repeats or (1,) * kv_heads
        queries = num_heads // max(1, sum(each))  # to a KV head as often as it is given
        first, last = group.heads.start, group.heads.stop
        mine = each[first:last]
        return cls(slice(sum(each[:first]) * queries, sum(each[:last]) * queries), mine if max(mine) > 1 else ())

    def of_tokens(self, x: Tensor) -> Tensor:
        """This group's heads of ``[B, T, H, D]``."""
        return x if self.queries == slice(None) else x[:, :, self.queries]

    def of_output(self, grad: OutputGradient) -> OutputGradient:
        """This group's heads of everything."""
        if self.queries == slice(None):
            return grad
        dlse = None if grad.dlse is None else grad.dlse[:, self.queries]
        return OutputGradient(self.of_tokens(grad.out), grad.lse[:, self.queries], self.of_tokens(grad.dout), dlse)

    def repeated(self, x: Tensor) -> Tensor:
        """K or V with each KV head as often as kernels want it, neighbours; itself where each is there once."""
        if not self.repeats:
            return x
        heads = [kv_head for kv_head, count in enumerate(self.repeats) for _ in range(count)]
        return x.index_select(2, torch.tensor(heads, device=x.device))

    def room(self, into: Tensor) -> Tensor:
        """Where the gradients of :meth:`repeated` are added: ``into`` itself, or zeros where heads repeat."""
        return torch.zeros_like(self.repeated(into)) if self.repeats else into

    def add_repeated(self, grads: Tensor, into: Tensor) -> None:
        """Sum the gradients of what repeats."""
        if self.repeats:
            for kv_head, each in enumerate(grads.split(self.repeats, 2)):
                into[:, :, kv_head] += each.sum(2)

    def intervals(self, section: Section) -> Intervals:
        """Of each KV head as often as it is given, where they differ."""
        return section.intervals.repeated(self.repeats) if self.repeats else section.intervals


def sinks_gradient(grad: OutputGradient, sinks: Tensor) -> Tensor:
    """dsinks ``[H]``, from this rank's queries: a sink has value 0, so its ``dS`` is ``P * (0 - delta)``."""
    share = (sinks.to(grad.lse.dtype).view(1, -1, 1) - grad.lse).exp().nan_to_num_(nan=0.0)  # a sink of -inf alone
    return -(share * grad.delta()).sum((0, 2))
