"""Plans: mask x layout x schedule x group, worked out once per batch and shared by all layers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from seqpar.comm import DirectExchange, Exchange, Group, RingExchange, Traffic, World, agree, connect
from seqpar.kernels import accumulator_dtype

from . import registry
from .explaining import explain
from .itinerary import Itinerary, itinerary
from .layouts import Layout, as_layout
from .masks import Mask, Span
from .schedules import Ring, resolve_schedule
from .sharding import Held, gather_rows, select_rows
from .validation import HeadShape

IGNORED_LABEL = -100
Of = Literal["queries", "keys"]


def plan(
    mask: Mask,
    *,
    length: int,
    kv_length: int | None = None,
    group: Group = None,
    layout: str | Layout | Sequence = "zigzag",
    schedule: str | Ring = "ring",
    heads: int | tuple[int, int] | None = None,
    head_dim: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Plan the attention of one batch. Every rank of the group calls it, with the same arguments.

    Args:
        mask: who attends to whom.
        length: global number of query tokens, at least one per rank.
        kv_length: global number of key tokens, in cross-attention.
        group: the ranks that share the sequence: a process group, a 1-D ``DeviceMesh``, a connected
            :class:`seqpar.comm.World`, or None for one rank.
        layout: ``contiguous``, ``zigzag``, ``striped``, ``document_zigzag``, another plan's ``.layout``, or sorted
            positions per rank (``Layout.explicit(queries, keys)`` in cross-attention).
        schedule: ``ring``, or a :class:`Ring` with options.
        heads, head_dim, dtype: optional. What :meth:`Plan.explain` then predicts in bytes; attention refuses others.

    Raises:
        ValueError: the same on every rank, where the arguments are wrong on any of them or differ between ranks.
    """
    world = connect(group)
    kv_length = length if kv_length is None else kv_length
    made, refusal = None, None
    try:
        layout = as_layout(layout)
        made = _make(mask, length, kv_length, layout, schedule, world, HeadShape.of(heads, head_dim, dtype))
    except ValueError as error:
        refusal = error
    fields = {
        "length": length,
        "kv_length": kv_length,
        "mask": _fingerprint(mask),
        "layout": layout if isinstance(layout, str) else _fingerprint(layout),
        "schedule": schedule,
        "heads": heads,
        "head_dim": head_dim,
        "dtype": dtype,
    }
    agree(world, "seqpar.plan", fields, refusal)
    assert made is not None, "a refused plan was agreed on"
    return made


def _make(
    mask: Mask,
    length: int,
    kv_length: int,
    layout: str | Layout,
    schedule: str | Ring,
    world: World,
    told: HeadShape,
) -> Plan:
    if not isinstance(mask, Mask):
        raise ValueError(f"mask: got {mask!r}, expected a mask such as seqpar.Causal()")
    for name, value in (("length", length), ("kv_length", kv_length)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a positive number of tokens")
    ring = resolve_schedule(schedule)
    work = itinerary(mask, layout, ring, length, kv_length, world.size, world.rank)
    return Plan(mask, length, kv_length, ring, world, work, told)


class Plan:
    """What happens, on every rank, in every attention call over one batch. Made by :func:`seqpar.plan`.

    Attributes:
        mask, length, kv_length, schedule: as given.
        world: the ranks, with their byte meter: ``plan.world.meter``.
        work: this rank's itinerary.
        told: the ``heads``, ``head_dim`` and ``dtype`` given.
        agreed: kinds of attention calls that all ranks have agreed on.
        handle: the number by which operators find this plan.
    """

    def __init__(
        self, mask: Mask, length: int, kv_length: int, schedule: Ring, world: World, work: Itinerary, told: HeadShape
    ) -> None:
        self.mask, self.length, self.kv_length, self.schedule, self.world = mask, length, kv_length, schedule, world
        self.work, self.told = work, told
        self.agreed: set[tuple] = set()
        self.handle = registry.register(self)

    @property
    def layout(self) -> Layout:
        """Who holds what; give it to another plan to leave tokens where they are."""
        return self.work.layout

    def shard(self, x: Tensor, dim: int = 1, *, of: Of = "queries") -> Tensor:
        """This rank's tokens of a whole tensor that every rank holds; the gradient is gathered back."""
        held, total = self._held(of)
        if x.shape[dim] != total:
            raise ValueError(f"shard: got {x.shape[dim]} {of} along dim {dim}, expected {total}, the plan's number")
        return select_rows(x, dim, held, self.world)

    def unshard(self, x: Tensor, dim: int = 1, *, of: Of = "queries") -> Tensor:
        """The whole tensor, in order and on every rank, from every rank's tokens; the gradient is sliced."""
        held, _ = self._held(of)
        if x.shape[dim] != len(held[self.world.rank]):
            expected = f"{len(held[self.world.rank])}, rank {self.world.rank}'s number"
            raise ValueError(f"unshard: got {x.shape[dim]} {of} along dim {dim}, expected {expected}")
        return gather_rows(x, dim, held, self.world)

    @cached_property
    def position_ids(self) -> Tensor:
        """int64 ``[1|B, T]``: each local token's position in its document, for RoPE; B where rows have their own."""
        return torch.stack([self.work.queries.tensor - span.first_query for span in self._spans()])

    def shift_labels(self, tokens: Tensor) -> Tensor:
        """Each local token's label, the token after it: int64 ``[B, T]`` from the whole ``tokens [B, length]``.

        -100 at the end of every document (and of the sequence), and where ``tokens`` is -100.
        """
        if tokens.dim() != 2 or tokens.shape[1] != self.length:
            raise ValueError(
                f"tokens: got shape {tuple(tokens.shape)}, expected [batch, {self.length}]; give whole rows"
            )
        here = self.work.queries.tensor
        last = torch.stack([here == span.first_query + span.num_queries - 1 for span in self._spans()])
        if len(last) not in (1, len(tokens)):
            raise ValueError(f"tokens: got {len(tokens)} rows, expected {len(last)}, the rows of the plan's Documents")
        following = (here + 1).clamp(max=self.length - 1)
        return tokens[:, following.to(tokens.device)].masked_fill(last.to(tokens.device), IGNORED_LABEL)

    def traffic(
        self, batch: int, heads: int | tuple[int, int], head_dim: int | tuple[int, int], dtype: torch.dtype,
        rank: int | None = None,
    ) -> dict[str, Traffic]:  # fmt: skip
        """What one attention call sends from ``rank`` (this one by default): ``forward``, and ``backward`` with dKV.

        Keys and values travel unexpanded: ``rows x KV heads x (D + Dv) x bytes per element`` for each message.
        """
        shape = HeadShape.of(heads, head_dim, dtype)
        assert shape.heads is not None, "heads are given"
        assert shape.dims is not None, "head_dim is given"
        rank = self.world.rank if rank is None else rank
        elements = batch * shape.heads[1] * sum(shape.dims)
        moved, returned = (self.work.messages(rank, grads=grads) for grads in (False, True))
        kv = sum(moved) * elements * dtype.itemsize
        grads = sum(returned) * elements * self._grad_wire(dtype).itemsize
        return {"forward": Traffic(len(moved), kv), "backward": Traffic(len(moved) + len(returned), kv + grads)}

    def explain(self) -> str:
        """Steps, work and bytes, for this rank and for all of them, and why the exchange was chosen."""
        return explain(self)

    def exchange(self, k: Tensor, v: Tensor) -> Exchange:
        """One pass of all ranks' K and V by this rank, in the order of ``work.blocks``."""
        args = self.world, k, v, self.work.arriving_rows, self._grad_wire(k.dtype)
        if self.work.exchange == "direct":
            return DirectExchange(*args, send_rows=self.work.sent_rows)
        return RingExchange(*args)

    def _grad_wire(self, dtype: torch.dtype) -> torch.dtype:
        accumulator = accumulator_dtype(dtype)
        return torch.bfloat16 if self.schedule.grad_wire == "bf16" and accumulator == torch.float32 else accumulator

    def _held(self, of: Of) -> tuple[Held, int]:
        if of not in ("queries", "keys"):
            raise ValueError(f"of: got {of!r}, expected 'queries' or 'keys'")
        return (self.layout.queries, self.length) if of == "queries" else (self.layout.keys, self.kv_length)

    def _spans(self) -> list[Span]:
        documents = self.mask.documents_within(self.length, self.kv_length)
        return list(documents.spans(self.work.queries.tensor))


def _fingerprint(value: object) -> str:
    """Short, readable, and different for what differs."""
    content = value.content if isinstance(value, (Mask, Layout)) else value
    return f"{value!r:.200} [{hashlib.blake2b(repr(content).encode(), digest_size=4).hexdigest()}]"
