"""The forward: a tile of queries against all keys that they see, then merged with the carry."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Intervals, Partial
from .configurations import Tiles
from .launching import configured, heads_in_cache, interval_strides, options
from .tiles import (
    LN2,
    LOG2E,
    Columns,
    addressable,
    assigned,
    attend,
    head_of,
    is_describable,
    load_rows,
    operand,
    rows_at,
    span,
)


@triton.jit
def forward_kernel(
    Q, K0, K1, V0, V1, Start, End, Carry, CarryLse, Out, Lse,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ib, stride_ih,
    queries, heads, tiles, programs_heads, section, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    VALUE_DIM: tl.constexpr, V_0: tl.constexpr, V_1: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DESCRIPTORS: tl.constexpr, CARRIES: tl.constexpr,
):  # fmt: skip
    """One program: a tile of ROWS queries of one head. Out and Carry ``[B, Tq, H, Dv]``, lse ``[B, H, Tq]``, dense."""
    tile, bh = assigned(tiles, programs_heads, section)
    batch, head = bh // heads, bh % heads
    first = tile * ROWS
    row = first + tl.arange(0, ROWS)
    inside = row < queries

    bounds = tl.cast(batch, tl.int64) * stride_ib + head * stride_ih + row
    start = tl.load(Start + bounds, mask=inside, other=0)
    end = tl.load(End + bounds, mask=inside, other=0)
    low, high, all_low, all_high = span(start, end, inside)

    Q = head_of(Q, batch, head, stride_qb, stride_qh, False)
    q0 = load_rows(Q, batch, head, first, queries, stride_qt, stride_qd, ROWS, 0, D0, DIM, False)
    q1 = q0
    if D1 > 0:
        q1 = load_rows(Q, batch, head, first, queries, stride_qt, stride_qd, ROWS, D0, D1, DIM, False)

    kv_head = head // GROUP
    K0 = head_of(K0, batch, kv_head, stride_kb, stride_kh, DESCRIPTORS)
    K1 = head_of(K1, batch, kv_head, stride_kb, stride_kh, DESCRIPTORS)
    V0 = head_of(V0, batch, kv_head, stride_vb, stride_vh, DESCRIPTORS)
    V1 = head_of(V1, batch, kv_head, stride_vb, stride_vh, DESCRIPTORS)
    out0, out1, largest, total = attend(
        q0, q1, K0, K1, V0, V1, batch, kv_head, stride_kt, stride_kd, stride_vt, stride_vd,
        start, end, low, high, all_low, all_high, scale,
        DIM, D0, D1, VALUE_DIM, V_0, V_1, ROWS, KEYS, DESCRIPTORS,
    )  # fmt: skip

    # Sums are compared with 0, not through "> 0": where an input was NaN, the output shall be.
    lse_at = tl.cast(bh, tl.int64) * queries + row
    weight = tl.full([ROWS], 1.0, tl.float32)
    carried = tl.zeros([ROWS], tl.float32)
    before = tl.full([ROWS], float("-inf"), tl.float32)
    top = largest
    if CARRIES:
        before = tl.load(CarryLse + lse_at, mask=inside, other=float("-inf"))
        top = tl.maximum(largest, before * LOG2E)
        weight = tl.math.exp2(largest - top)
        carried = tl.math.exp2(before * LOG2E - top)
    everything = total * weight + carried
    everything = tl.where(everything == 0.0, 1.0, everything)
    lse = tl.where(total == 0.0, before, (top + tl.math.log2(everything)) * LN2)
    if CARRIES:
        tl.debug_barrier()  # several warps may hold a row: none may store its lse before all have read the carry's
    tl.store(Lse + lse_at, lse, mask=inside)

    weight = weight / everything
    carried = carried / everything
    stride_row = heads * VALUE_DIM
    at = tl.cast(batch, tl.int64) * queries * stride_row + head * VALUE_DIM
    for part in tl.static_range(2 if V_1 > 0 else 1):
        if part == 0:
            out = out0 * weight[:, None]
            pointers, mask = rows_at(at, first, queries, stride_row, 1, ROWS, 0, V_0, VALUE_DIM)
        else:
            out = out1 * weight[:, None]
            pointers, mask = rows_at(at, first, queries, stride_row, 1, ROWS, V_0, V_1, VALUE_DIM)
        if CARRIES:
            out += tl.load(Carry + pointers, mask=mask, other=0.0) * carried[:, None]
        tl.store(Out + pointers, out.to(Out.dtype.element_ty), mask=mask)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    scale: float,
    carry: Partial | None,
    final: bool = False,
    tiles: Tiles | None = None,
) -> Partial:
    """Attention of q over ``intervals``, which lie where q does, continued from ``carry``, which it overwrites."""
    tiles = tiles or configured("forward", q, v)
    q, scale = with_positive(scale, q)
    q, k, v = (addressable(x, max(tiles.rows, tiles.keys)) for x in (q, k, v))
    batch, queries, heads, dim = q.shape
    value_dim, group = v.shape[3], heads // k.shape[2]
    result = result_of(q, value_dim, carry, final)
    before = carry or result
    num_tiles = triton.cdiv(queries, tiles.rows)
    descriptors = tiles.descriptors and is_describable(k) and is_describable(v)
    key_source, value_source = (operand(x, tiles.keys, descriptors) for x in (k, v))
    forward_kernel[(num_tiles * batch * heads,)](
        q, *key_source, *value_source, intervals.start, intervals.end,
        before.out, before.lse, result.out, result.lse,
        *q.stride(), *k.stride(), *v.stride(), *interval_strides(intervals),
        queries, heads, num_tiles, batch * heads, min(heads_in_cache(k, v, group), batch * heads),
        scale * math.log2(math.e),
        group, dim, *Columns.of(dim), value_dim, *Columns.of(value_dim),
        tiles.rows, tiles.keys, descriptors, carry is not None, **options(tiles),
    )  # fmt: skip
    return result


def with_positive(scale: float, q: Tensor) -> tuple[Tensor, float]:
    """Queries and a positive scale that give the same scores: maxima are taken before scores are scaled."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def result_of(q: Tensor, value_dim: int, carry: Partial | None, final: bool) -> Partial:
    """Where to write: over the carry, or into new memory; a final out is of q's dtype."""
    batch, queries, heads, _ = q.shape
    dtype = q.dtype if final else torch.float32
    if carry is not None and carry.out.dtype == dtype:
        return carry
    out = torch.empty(batch, queries, heads, value_dim, dtype=dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device) if carry is None else carry.lse
    return Partial(out, lse)
