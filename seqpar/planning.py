"""Plans: mask x layout x schedule x group, worked out once per batch and shared by all layers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from numbers import Integral
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
            :class:`seqpar.comm.World`, or None for one rank (not for all there are).
        layout: ``contiguous``, ``zigzag``, ``striped``, ``document_zigzag``, another plan's ``.layout``, or sorted
            positions per rank (``Layout.explicit(queries, keys)`` in cross-attention).
        schedule: ``ring``, or a :class:`Ring` with options.
        heads, head_dim, dtype: optional. What :meth:`Plan.explain` then predicts in bytes; attention refuses others.

    Raises:
        ValueError: the same on every rank, where the arguments are wrong on any of them or differ between ranks.
    """
    world = connect(group)
    fields: dict[str, object] = {}
    work, told, refusal = None, HeadShape(), None
    try:
        if not isinstance(mask, Mask):
            raise ValueError(f"mask: got {mask!r}, expected a mask such as seqpar.Causal()")
        length = _tokens("length", length)
        kv_length = length if kv_length is None else _tokens("kv_length", kv_length)
        layout, schedule = as_layout(layout), resolve_schedule(schedule)
        told = HeadShape.of(heads, head_dim, dtype)
        fields = {"length": length, "kv_length": kv_length, "mask": _fingerprint(mask), "layout": _fingerprint(layout)}
        fields |= {"schedule": schedule, "heads": told.heads, "head_dim": told.head_dim, "dtype": told.dtype}
        work = itinerary(mask, layout, schedule, length, kv_length, world.size, world.rank)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        refusal = error
    agree(world, "seqpar.plan", fields, refusal)
    assert work is not None, "a refused plan was agreed on"
    assert isinstance(schedule, Ring), "the schedule was resolved"
    identity = ", ".join(str(value) for value in fields.values())
    return Plan(mask, length, kv_length or length, schedule, world, work, told, identity)


def _tokens(name: str, value: object) -> int:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected a positive number of tokens")
    return int(value)


class Plan:
    """What happens, on every rank, in every attention call over one batch. Made by :func:`seqpar.plan`.

    Attributes:
        mask, length, kv_length, schedule: as given.
        world: the ranks, with their byte meter: ``plan.world.meter``.
        work: this rank's itinerary.
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
        schedule: Ring,
        world: World,
        work: Itinerary,
        told: HeadShape,
        identity: str,
    ) -> None:
        self.mask, self.length, self.kv_length, self.schedule, self.world = mask, length, kv_length, schedule, world
        self.work, self.told, self.identity = work, told, identity
        self.agreed: set[tuple] = set()
        self.handle = registry.register(self)
        self._sent_rows: dict[torch.device, list[Tensor | None]] = {}

    def __deepcopy__(self, memo: object) -> Plan:
        """Itself: a copied model shares the plan, as its layers do."""
        return self

    @property
    def layout(self) -> Layout:
        """Who holds what; give it to another plan to leave tokens where they are."""
        return self.work.layout

    def shard(self, x: Tensor, dim: int = 1, *, of: Of = "queries") -> Tensor:
        """This rank's tokens of a whole tensor that every rank holds; the gradient is gathered back."""
        held, total = self._held(of)
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != total:
            raise ValueError(f"shard: got shape {tuple(x.shape)}, expected {total} {of} along dim {dim}, all of them")
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
        labels = tokens[:, following.to(tokens.device)].to(torch.int64)
        return labels.masked_fill(last.to(tokens.device), IGNORED_LABEL)

    def traffic(
        self, batch: int, heads: int | tuple[int, int], head_dim: int | tuple[int, int], dtype: torch.dtype,
        rank: int | None = None,
    ) -> dict[str, Traffic]:  # fmt: skip
        """What one attention call sends from ``rank`` (this one by default): ``forward``, and ``backward`` with dKV.

        Keys and values travel unexpanded: ``rows x KV heads x (D + Dv) x bytes per element`` for each message.
        """
        shape = HeadShape.of(heads, head_dim, dtype)
        assert shape.heads is not None, "heads are given"
        assert shape.head_dim is not None, "head_dim is given"
        rank = self.world.rank if rank is None else rank
        elements = batch * shape.heads[1] * sum(shape.head_dim)
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
            if k.device not in self._sent_rows:
                self._sent_rows[k.device] = [
                    rows if rows is None else rows.to(k.device) for rows in self.work.sent_rows
                ]
            return DirectExchange(*args, send_rows=self._sent_rows[k.device])
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
    if isinstance(value, str):
        return value
    content = value.content if isinstance(value, (Mask, Layout)) else value
    return f"{value!r:.200} [{hashlib.blake2b(repr(content).encode(), digest_size=4).hexdigest()}]"


def _rest(x: Tensor, dim: int) -> dict[str, object]:
    """What must be equal between ranks in a tensor whose tokens they share."""
    dim %= x.dim()
    others = (*x.shape[:dim], *x.shape[dim + 1 :])
    return {"dim": dim, "other dims": others, "dtype": x.dtype, "device": x.device.type}
