"""Tree attention: queries meet the keys where those are, and partial results are merged (Shyam et al. 2024).

Every rank attends with all queries to its own keys. The partials ``(out, lse)`` travel as one message, where the paper
reduces a maximum, numerators and denominators one after another. In the backward dK and dV are at home at once, and dQ
is reduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from seqpar.comm import (
    Dealt,
    Traffic,
    Way,
    Wire,
    World,
    reduce_everywhere,
    reduce_to_owners,
    reduction_traffic,
    summed,
    to_heads,
)
from seqpar.kernels import Kernel, OutputGradient, Partial, accumulator_dtype, merge_

from . import ring
from .layouts import Layout
from .schedules import Merge, Tree, node_size

if TYPE_CHECKING:
    from .planning import Plan


class Attended(NamedTuple):
    """Output and lse of this rank's queries; and all queries, where they had to be gathered (else nothing)."""

    out: Tensor
    lse: Tensor
    gathered: Tensor


def forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, kernel: Kernel
) -> Attended:  # fmt: skip
    """q ``[B, T, H, D]``: all queries, or this rank's; k, v ``[B, T, Hkv, D]`` are this rank's. Dual: backward.

    Every rank gets the lse, which only some may need: what is sent must not depend on it. Sinks are one key more, which
    the first rank sees.
    """
    schedule, dtype = _schedule(plan), q.dtype
    queries = q if plan.replicated else _gather(plan, [q], "q")[0]
    mine = sinks if plan.world.rank == 0 else None
    partial = ring.forward(plan, queries, k, v, mine, scale, kernel)
    if plan.replicated:
        out, lse = merged(plan.levels, partial, dtype, schedule.merge, wants_lse=True)
        return Attended(out, lse, q.new_empty(0))
    return Attended(*merged_of_tokens(plan, partial, dtype), queries)


def merged(
    levels: Sequence[World], partial: Partial, dtype: torch.dtype, merge: Merge = "auto", *, wants_lse: bool
) -> tuple[Tensor, Tensor]:
    """The ranks' partials, merged on all of them: out in ``dtype``, and lse (NaN unless wanted, where heads are dealt).

    Every rank gets the same bits: partials are rounded to ``dtype`` on their way, and merged in the order of ranks.
    """
    wire = partials_wire(dtype, merge, wants_lse=wants_lse)
    out, *lse = reduce_everywhere(levels, [partial.out, _column(partial.lse)], _joined, wire)
    return out.to(dtype), _row(lse[0]) if lse else torch.full_like(partial.lse, torch.nan)


def merged_of_tokens(plan: Plan, partial: Partial, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The ranks' partials of all queries, merged, of this rank's queries: out in ``dtype``, and lse."""
    wire = partials_wire(dtype, "auto", wants_lse=True)
    parts = [partial.out, _column(partial.lse)]
    out, lse = reduce_to_owners(plan.world, parts, plan.tokens_on(partial.out.device), 1, _joined, wire)
    return out.to(dtype), _row(lse)


def backward(
    plan: Plan, dout: Tensor, dlse: Tensor | None, gathered: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, sinks: Tensor | None, scale: float, kernel: Kernel,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq of the queries in ``q``, dk and dv of this rank's keys, and dsinks (empty without sinks), accumulated.

    Of replicated queries dout and dlse are complete on every rank, and so are dq and dsinks.
    """
    grad = OutputGradient(out, lse, dout, dlse)
    dsinks = q.new_empty(0) if sinks is None else ring.sinks_gradient(grad, sinks).to(sinks.dtype)
    queries = q
    if not plan.replicated:
        queries = gathered.view(q.shape[0], plan.length, *q.shape[2:])
        out, dout, column = _gather(plan, [out, dout, _column(lse)], "dout")
        dlse = None if dlse is None else _row(*_gather(plan, [_column(dlse)], "dlse"))
        grad = OutputGradient(out, _row(column), dout, dlse)
    dq, dk, dv = ring.backward(plan, grad, queries, k, v, scale, kernel)
    wire = _dq_wire(dq.dtype, _schedule(plan).merge)
    if plan.replicated:
        (dq,) = reduce_everywhere(plan.levels, [dq], summed, wire)
    else:
        (dq,) = reduce_to_owners(plan.world, [dq], plan.tokens_on(q.device), 1, summed, wire)
    return dq, dk, dv, dsinks


def traffic(
    schedule: Tree, layout: Layout, batch: int, heads: int, head_dim: tuple[int, int], dtype: torch.dtype, rank: int
) -> dict[str, list[Traffic]]:
    """What ``rank`` sends in each level (one, of sharded queries): see :meth:`Plan.traffic`.

    Of a call that is differentiated, whose lse is needed everywhere, and without dlse.
    """
    world, accumulator, (dim, value_dim) = len(layout.queries), accumulator_dtype(dtype), head_dim
    tokens = [len(queries) * batch for queries in layout.queries]
    if world == 1:
        return {"forward": [], "backward": []}
    if schedule.replicated:
        levels, count = levels_of(schedule, world, rank), tokens[rank]
        partials, dq = partials_wire(dtype, schedule.merge, wants_lse=True), _dq_wire(accumulator, schedule.merge)
        return {
            "forward": reduction_traffic(levels, [count * value_dim, count], heads, partials),
            "backward": reduction_traffic(levels, [count * dim], heads, dq),
        }
    mine, others = tokens[rank] * heads, [n * heads for peer, n in enumerate(tokens) if peer != rank and n]
    calls = len(others) + (world - 1 if mine else 0)
    asked, told = dim * dtype.itemsize, 2 * value_dim * dtype.itemsize + accumulator.itemsize
    answer = value_dim * dtype.itemsize + accumulator.itemsize
    return {
        "forward": [Traffic(calls, (world - 1) * mine * asked + sum(others) * answer)],
        "backward": [Traffic(calls, (world - 1) * mine * told + sum(others) * dim * accumulator.itemsize)],
    }


def levels_of(schedule: Tree, world: int, rank: int) -> list[tuple[int, int]]:
    """How many ranks merge in each level, inside the node first, and which of them ``rank`` is."""
    degree = node_size(schedule, world)
    return [level for level in ((degree, rank % degree), (world // degree, rank // degree)) if level[0] > 1]


def partials_wire(dtype: torch.dtype, merge: Merge, *, wants_lse: bool) -> Wire:
    """How partials travel whose output is to be in ``dtype``: out in it, lse in accumulator dtype."""
    both = dtype, accumulator_dtype(dtype)
    return Wire(both, both if wants_lse else both[:1], "partial", "out", _way(merge))


def _dq_wire(dtype: torch.dtype, merge: Merge) -> Wire:
    return Wire((dtype,), (dtype,), "dq", "dq", _way(merge))


def _way(merge: Merge) -> Way | None:
    return None if merge == "auto" else merge


def _joined(parts: list[list[Tensor]]) -> list[Tensor]:
    """The partials ``(out, lse [B, T, H, 1])``, merged."""
    (out, lse), *others = parts
    dtype = accumulator_dtype(lse.dtype)
    partial = Partial(out.to(dtype, copy=True), _row(lse))
    for out, lse in others:
        merge_(partial, out, _row(lse))
    return [partial.out, _column(partial.lse)]


def _gather(plan: Plan, tensors: list[Tensor], kind: str) -> list[Tensor]:
    """All ranks' tokens ``[B, T, H, n]`` of each tensor, in order."""
    everyone = Dealt([slice(0, tensors[0].shape[2])] * plan.world.size, plan.tokens_on(tensors[0].device))
    return to_heads(plan.world, tensors, [everyone] * len(tensors), kind)


def _schedule(plan: Plan) -> Tree:
    assert isinstance(plan.schedule, Tree), "keys travel in other schedules"
    return plan.schedule


def _column(lse: Tensor) -> Tensor:
    """``[B, H, T]`` as ``[B, T, H, 1]``, as tensors of tokens are."""
    return lse.transpose(1, 2).unsqueeze(-1)


def _row(column: Tensor) -> Tensor:
    return column.squeeze(-1).transpose(1, 2).contiguous()
