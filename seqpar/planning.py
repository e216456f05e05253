"""Plans: mask x layout x schedule x group, worked out once per batch and shared by all layers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from seqpar.comm import (
    DirectExchange,
    Exchange,
    GatherExchange,
    Group,
    RingExchange,
    SingleRank,
    Traffic,
    World,
    agree,
    connect,
)  # fmt: skip
from seqpar.kernels import accumulator_dtype

from . import registry, tree
from .choosing import Decision, decide, layouts_to_try, schedules_to_try, work_of
from .costs import Call, grad_wire
from .explaining import explain
from .itinerary import Itinerary
from .layouts import Layout, as_layout
from .masks import Mask, Span
from .positions import Positions
from .probing import rates_of
from .schedules import Auto, Schedule, Tree, Ulysses, heads_degree, node_size, resolve_schedule
from .sharding import Held, gather_rows, select_rows
from .trading import Trade
from .validation import HeadShape, agree_once

IGNORED_LABEL = -100
Of = Literal["queries", "keys"]


def plan(
    mask: Mask,
    *,
    length: int,
    kv_length: int | None = None,
    group: Group = None,
    layout: str | Layout | Sequence = "zigzag",
    schedule: str | Schedule | Auto = "ring",
    heads: int | tuple[int, int] | None = None,
    head_dim: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Plan the attention of one batch. Every rank of the group calls it, with the same arguments.

    Args:
        mask: who attends to whom.
        length: global number of query tokens, at least one per rank (any number in ``tree``).
        kv_length: global number of key tokens, in cross-attention.
        group: the ranks that share the sequence: a process group, a ``DeviceMesh`` of one axis, or of two for a hybrid
            (the last inside the node), a connected :class:`seqpar.comm.World`, or None for one rank (not for all).
        layout: ``contiguous``, ``zigzag``, ``striped``, ``balanced``, ``document_zigzag``, ``whole_documents``,
            ``auto``, another plan's ``.layout``, or sorted positions per rank (``Layout.explicit(queries, keys)`` in
            cross-attention).
        schedule: ``ring``, ``allgather``, ``ulysses``, on a mesh of two axes ``double_ring`` and ``hybrid`` (Ulysses
            inside the node, a ring between nodes), ``tree`` (every rank holds all queries, and keys stay where they
            are), ``auto``, or a :class:`Ring`, :class:`DoubleRing`, :class:`AllGather`, :class:`Ulysses`,
            :class:`Tree` or :class:`Auto` with options.
        heads, head_dim, dtype: what ``auto`` and :meth:`Plan.explain` predict from; attention then refuses others.
            Optional where nothing is ``auto``.

    Raises:
        ValueError: the same on every rank, where the arguments are wrong on any of them or differ between ranks.
    """
    world = connect(group)
    inside = world.inside
    fields: dict[str, object] = {}
    schedules: list[Schedule] = []
    layouts: list[Layout] = []
    told, refusal = HeadShape(), None
    try:
        if not isinstance(mask, Mask):
            raise ValueError(f"mask: got {mask!r}, expected a mask such as seqpar.Causal()")
        length = _tokens("length", length)
        kv_length = length if kv_length is None else _tokens("kv_length", kv_length)
        layout, asked = as_layout(layout), resolve_schedule(schedule, inside)
        told = HeadShape.of(heads, head_dim, dtype)
        fields = {"length": length, "kv_length": kv_length, "mask": fingerprint(mask), "layout": fingerprint(layout)}
        fields |= {
            "schedule": asked,
            "ranks of a node": inside,
            "heads": told.heads,
            "head_dim": told.head_dim,
            "dtype": told.dtype,
        }
        kv_heads = told.heads and told.heads[1]
        mask.check(length, kv_length, kv_heads)
        schedules = schedules_to_try(asked, world.size, inside, fewer_queries=length < kv_length)
        replicated = isinstance(asked, Tree) and asked.replicated
        layouts = layouts_to_try(layout, mask, length, kv_length, world.size, kv_heads, replicated)
        for each in schedules:
            work_of(each, mask, layouts[0], length, kv_length, world.size, world.rank, told.heads)
        if (isinstance(asked, Auto) or layout == "auto") and not told.complete:
            raise ValueError(
                "schedule='auto' and layout='auto' compare what schedules cost: got "
                f"heads={told.heads}, head_dim={told.head_dim}, dtype={told.dtype}, expected all three; give them"
            )
    except Exception as error:  # whatever it is, the other ranks must hear of it
        refusal = error
    agree(world, "seqpar.plan", fields, refusal)
    assert kv_length is not None, "a plan without lengths was agreed on"
    auto = asked if isinstance(asked, Auto) else Auto()
    decision = None
    chosen, held = schedules[0], layouts[0]
    if world.size > 1 and len(schedules) * len(layouts) > 1:
        call = Call.of(told, world.payload_device)
        rates = auto.rates or rates_of(world, call, inside)
        ways = schedules, layouts, mask, length, kv_length
        decision = decide(world, *ways, call, rates, auto.memory)
        chosen, held = decision.chosen.schedule, decision.chosen.layout
    work = work_of(chosen, mask, held, length, kv_length, world.size, world.rank, told.heads)
    identity = ", ".join(str(value) for value in fields.values())
    whole = mask, length, kv_length
    if isinstance(chosen, Tree):
        levels = [x for x in world.split(node_size(chosen, world.size)) if x.size > 1]
        return Plan(*whole, chosen, world, held, work, told, identity, None, decision, levels)
    if not isinstance(chosen, Ulysses):
        return Plan(*whole, chosen, world, held, work, told, identity, None, decision)
    inside_world, across = world.split(heads_degree(chosen, world.size))
    attending = Plan(*whole, chosen.inner, across, work.layout, work, HeadShape(), f"{identity}, inside")
    return Plan(*whole, chosen, world, held, work, told, identity, Trade(inside_world, attending, held), decision)


def _tokens(name: str, value: object) -> int:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected a positive number of tokens")
    return int(value)


class Plan:
    """What happens, on every rank, in every attention call over one batch. Made by :func:`seqpar.plan`.

    Attributes:
        mask, length, kv_length, schedule: as given.
        world: the ranks, with their byte meter: ``plan.world.meter``.
        layout: who holds what; give it to another plan to leave tokens where they are.
        work: the itinerary of this rank, or of the ranks that it trades heads with.
        trade: with whom heads are traded, in Ulysses; else None.
        levels: with whom partial results are merged, in Tree: inside the node, then between nodes.
        decision: how ``auto`` came to its choice, where there was one.
        told: the ``heads``, ``head_dim`` and ``dtype`` given.
        identity: what tells this plan from another, in words.
        agreed: kinds of calls that all ranks have agreed on.
        handle: the number by which operators find this plan.
    """

    def __init__(
        self,
        mask: Mask,
        length: int,
        kv_length: int,
        schedule: Schedule,
        world: World,
        layout: Layout,
        work: Itinerary,
        told: HeadShape,
        identity: str,
        trade: Trade | None = None,
        decision: Decision | None = None,
        levels: Sequence[World] = (),
    ) -> None:
        self.mask, self.length, self.kv_length, self.schedule, self.world = mask, length, kv_length, schedule, world
        self.layout, self.work, self.told, self.identity, self.trade = layout, work, told, identity, trade
        self.decision, self.levels = decision, levels
        self.agreed: set[tuple] = set()
        self.handle = registry.register(self)
        self._tokens_on: dict[torch.device, list[Tensor]] = {}
        self._rows_on: dict[torch.device, list[Tensor | None]] = {}

    def __deepcopy__(self, memo: object) -> Plan:
        """Itself: a copied model shares the plan, as its layers do."""
        return self

    @property
    def replicated(self) -> bool:
        """Whether every rank holds all queries, and gets all of the output."""
        return isinstance(self.schedule, Tree) and self.schedule.replicated

    @property
    def queries(self) -> Positions:
        """The global positions of this rank's queries."""
        return self.layout.queries[self.world.rank]

    @property
    def keys(self) -> Positions:
        """The global positions of this rank's keys."""
        return self.layout.keys[self.world.rank]

    def shard(self, x: Tensor, dim: int = 1, *, of: Of = "queries") -> Tensor:
        """This rank's tokens of a whole tensor that every rank holds; the gradient is gathered back.

        Queries that are replicated (``tree``) stay whole, and their gradient is complete on every rank.
        """
        held, total = self._held(of)
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != total:
            raise ValueError(f"shard: got shape {tuple(x.shape)}, expected {total} {of} along dim {dim}, all of them")
        if of == "queries" and self.replicated:
            return x
        if x.requires_grad and torch.is_grad_enabled():
            agree_once(self, "seqpar.shard", _rest(x, dim))
        return select_rows(x, dim, held, self.world)

    def unshard(self, x: Tensor, dim: int = 1, *, of: Of = "queries") -> Tensor:
        """The whole tensor, in order and on every rank, from every rank's tokens; the gradient is sliced."""
        held, _ = self._held(of)
        refusal, count = None, len(held[self.world.rank])
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != count:
            expected = f"{count} {of} along dim {dim}, rank {self.world.rank}'s share"
            refusal = ValueError(f"unshard: got shape {tuple(x.shape)}, expected {expected}; give what plan.shard gave")
        agree_once(self, "seqpar.unshard", {} if refusal else _rest(x, dim), refusal)
        if of == "queries" and self.replicated:
            return x
        return gather_rows(x, dim, held, self.world)

    @cached_property
    def position_ids(self) -> Tensor:
        """int64 ``[1|B, T]``: each local token's position in its document, for RoPE; B where rows have their own."""
        return torch.stack([self.queries.tensor - span.first_query for span in self._spans()])

    def shift_labels(self, tokens: Tensor) -> Tensor:
        """Each local token's label, the token after it: int64 ``[B, T]`` from the whole ``tokens [B, length]``.

        -100 at the end of every document (and of the sequence), and where ``tokens`` is -100.
        """
        if tokens.dim() != 2 or tokens.shape[1] != self.length:
            raise ValueError(
                f"tokens: got shape {tuple(tokens.shape)}, expected [batch, {self.length}]; give whole rows"
            )
        here = self.queries.tensor
        last = torch.stack([here == span.first_query + span.num_queries - 1 for span in self._spans()])
        if len(last) not in (1, len(tokens)):
            raise ValueError(f"tokens: got {len(tokens)} rows, expected {len(last)}, the rows of the plan's Documents")
        following = (here + 1).clamp(max=self.length - 1)
        labels = tokens[:, following.to(tokens.device)].to(torch.int64)
        return labels.masked_fill(last.to(tokens.device), IGNORED_LABEL)

    def traffic(
        self, batch: int, heads: int | tuple[int, int], head_dim: int | tuple[int, int], dtype: torch.dtype,
        rank: int | None = None,
    ) -> dict[str, Traffic]:  # fmt: skip
        """What one attention call sends from ``rank`` (this one by default): ``forward``, and ``backward`` with dKV.

        Keys and values travel unexpanded: ``rows x KV heads x (D + Dv) x bytes per element`` for each message. Without
        what an lse and its gradient take besides.
        """
        shape = HeadShape.of(heads, head_dim, dtype)
        assert shape.heads is not None, "heads are given"
        assert shape.head_dim is not None, "head_dim is given"
        if self.mask.by_head and shape.heads != self.told.heads:
            raise ValueError(
                f"heads: got {shape.heads}, expected {self.told.heads}, which the plan was told, since heads see "
                "different keys; make a plan for these"
            )
        rank = self.world.rank if rank is None else rank
        if self.trade is not None:
            return self.trade.traffic(batch, shape.heads, shape.head_dim, dtype, rank)
        if isinstance(self.schedule, Tree):
            levels = tree.traffic(self.schedule, self.layout, batch, shape.heads[0], shape.head_dim, dtype, rank)
            return {
                way: Traffic(sum(t.calls for t in sent), sum(t.bytes for t in sent)) for way, sent in levels.items()
            }
        return self.kv_traffic(self.work, batch * sum(shape.head_dim), shape.heads[1], dtype, rank)

    def kv_traffic(
        self, work: Itinerary, elements: int, kv_heads: int, dtype: torch.dtype, rank: int
    ) -> dict[str, Traffic]:
        """What a pass of K and V and their gradients sends from ``rank``, of ``elements`` in one head's row of both."""
        moved, returned = (work.messages(rank, grads=grads) for grads in (False, True))
        elements *= 1 if work.single else kv_heads
        kv = sum(moved) * elements * dtype.itemsize
        grads = sum(returned) * elements * self._grad_wire(dtype).itemsize
        return {"forward": Traffic(len(moved), kv), "backward": Traffic(len(moved) + len(returned), kv + grads)}

    def tokens_on(self, device: torch.device) -> list[Tensor]:
        """Where each rank's queries stand among all: int64 ``[T]`` by rank."""
        if device not in self._tokens_on:
            self._tokens_on[device] = [queries.tensor.to(device) for queries in self.layout.queries]
        return self._tokens_on[device]

    def explain(self) -> str:
        """Steps, work and bytes, for this rank and for all of them, and why the exchange was chosen."""
        return explain(self)

    def exchange(self, k: Tensor, v: Tensor) -> Exchange:
        """One pass of all ranks' K and V by this rank, in the order of ``work.blocks``."""
        blocks, grad_wire = self.work.blocks, self._grad_wire(k.dtype)
        sources = [block.source for block in blocks if block.source is not None]  # all others are no one
        rows = [block.rows for block in blocks]
        if self.work.single:  # rows of one head each
            k, v = (x.reshape(x.shape[0], -1, 1, x.shape[3]) for x in (k, v))
        if self.work.exchange == "none":
            return RingExchange(SingleRank(), k, v, [0], rows, grad_wire, inside=1)
        args = self.world, k, v, sources, rows, grad_wire
        if self.work.exchange == "forward":
            return RingExchange(*args, inside=self.work.inside)
        if k.device not in self._rows_on:
            indices = self.work.sent_rows if self.work.exchange == "direct" else self.work.places
            self._rows_on[k.device] = [x if x is None else x.to(k.device) for x in indices]
        if self.work.exchange == "direct":
            return DirectExchange(*args, send_rows=self._rows_on[k.device])
        return GatherExchange(*args, places=[x for x in self._rows_on[k.device] if x is not None])

    def _grad_wire(self, dtype: torch.dtype) -> torch.dtype:
        assert not isinstance(self.schedule, Ulysses), "gradients travel by the inner plan's exchange"
        return accumulator_dtype(dtype) if isinstance(self.schedule, Tree) else grad_wire(self.schedule, dtype)

    def _held(self, of: Of) -> tuple[Held, int]:
        if of not in ("queries", "keys"):
            raise ValueError(f"of: got {of!r}, expected 'queries' or 'keys'")
        return (self.layout.queries, self.length) if of == "queries" else (self.layout.keys, self.kv_length)

    def _spans(self) -> list[Span]:
        documents = self.mask.documents_within(self.length, self.kv_length)
        return list(documents.spans(self.queries.tensor))


def fingerprint(value: object) -> str:
    """Short, readable, and different for what differs."""
    if isinstance(value, str):
        return value
    content = value.content if isinstance(value, (Mask, Layout)) else value
    return f"{value!r:.200} [{hashlib.blake2b(repr(content).encode(), digest_size=4).hexdigest()}]"


def _rest(x: Tensor, dim: int) -> dict[str, object]:
    """What must be equal between ranks in a tensor whose tokens they share."""
    dim %= x.dim()
    others = (*x.shape[:dim], *x.shape[dim + 1 :])
    return {"dim": dim, "other dims": others, "dtype": x.dtype, "device": x.device.type}
