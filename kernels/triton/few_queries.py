"""Attention of few queries: the heads of a KV head share a tile, the keys are split over programs, then merged.

Decoding reads every key once and computes little with it: what counts is that all of the GPU reads, each key once for
all query heads that share it (Flash-Decoding).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Intervals, Partial
from .configurations import Tiles
from .forward import result_of, with_positive
from .launching import configured, interval_strides, multiprocessors, options
from .tiles import LN2, LOG2E, LOWEST, Columns, addressable, attend, head_of, is_describable, operand, rows_at, span

PROGRAMS_PER_MULTIPROCESSOR = 2
MERGED_AT_ONCE = 16


@triton.jit
def few_kernel(
    Q, K0, K1, V0, V1, Start, End, Out, Lse,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ib, stride_ih,
    queries, heads, batches, tiles, splits, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    VALUE_DIM: tl.constexpr, V_0: tl.constexpr, V_1: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one KV head's rows over one split of its keys. Out, Lse ``[splits, B, H, Tq(, Dv)]``.

    Row ``r`` of a KV head is query ``r % Tq`` of its query head ``r // Tq``.
    """
    pid = tl.program_id(0)
    split, pid = pid % splits, pid // splits
    tile, pid = pid % tiles, pid // tiles
    kv_heads = heads // GROUP
    batch, kv_head = pid // kv_heads, pid % kv_heads

    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < GROUP * queries
    query, head = row % queries, kv_head * GROUP + row // queries
    bounds = tl.cast(batch, tl.int64) * stride_ib + head * stride_ih + query
    start = tl.load(Start + bounds, mask=inside, other=0)
    end = tl.load(End + bounds, mask=inside, other=0)
    low, high, all_low, all_high = span(start, end, inside)
    # Splits share what these rows see, not what there is: under a window that is little.
    size = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), splits), KEYS) * KEYS
    low += split * size
    high = tl.minimum(high, low + size)

    Q += tl.cast(batch, tl.int64) * stride_qb
    q_at = query[:, None] * stride_qt + head[:, None].to(tl.int64) * stride_qh
    column = tl.arange(0, D0)
    q0 = tl.load(Q + q_at + column[None, :] * stride_qd, mask=inside[:, None] & (column < DIM)[None, :], other=0.0)
    q1 = q0
    if D1 > 0:
        column = D0 + tl.arange(0, D1)
        q1 = tl.load(Q + q_at + column[None, :] * stride_qd, mask=inside[:, None] & (column < DIM)[None, :], other=0.0)

    K0 = head_of(K0, batch, kv_head, stride_kb, stride_kh, DESCRIPTORS)
    K1 = head_of(K1, batch, kv_head, stride_kb, stride_kh, DESCRIPTORS)
    V0 = head_of(V0, batch, kv_head, stride_vb, stride_vh, DESCRIPTORS)
    V1 = head_of(V1, batch, kv_head, stride_vb, stride_vh, DESCRIPTORS)
    out0, out1, largest, total = attend(
        q0, q1, K0, K1, V0, V1, batch, kv_head, stride_kt, stride_kd, stride_vt, stride_vd,
        start, end, low, high, all_low, all_high, scale,
        DIM, D0, D1, VALUE_DIM, V_0, V_1, ROWS, KEYS, DESCRIPTORS,
    )  # fmt: skip

    group_rows = GROUP * queries
    at = ((tl.cast(split, tl.int64) * batches + batch) * kv_heads + kv_head) * group_rows
    divisor = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), largest + tl.math.log2(divisor))
    tl.store(Lse + at + row, lse, mask=inside)
    pointers, mask = rows_at(Out + at * VALUE_DIM, tile * ROWS, group_rows, VALUE_DIM, 1, ROWS, 0, V_0, VALUE_DIM)
    tl.store(pointers, out0 / divisor[:, None], mask=mask)
    if V_1 > 0:
        pointers, mask = rows_at(Out + at * VALUE_DIM, tile * ROWS, group_rows, VALUE_DIM, 1, ROWS, V_0, V_1, VALUE_DIM)
        tl.store(pointers, out1 / divisor[:, None], mask=mask)


@triton.jit
def merge_kernel(
    PartOut, PartLse, Carry, CarryLse, Out, Lse, queries, heads, rows, splits,
    VALUE_DIM: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, CARRIES: tl.constexpr,
):  # fmt: skip
    """One program: merges the splits of one query of one head, and the carry. Out ``[B, Tq, H, Dv]``, dense."""
    row = tl.program_id(0)
    bh, query = row // queries, row % queries
    batch, head = bh // heads, bh % heads
    out_at = ((tl.cast(batch, tl.int64) * queries + query) * heads + head) * VALUE_DIM
    column = tl.arange(0, COLUMNS)

    before = tl.full([], float("-inf"), tl.float32)
    largest = tl.full([], LOWEST, tl.float32)
    total = tl.zeros([], tl.float32)
    out = tl.zeros([COLUMNS], tl.float32)
    if CARRIES:
        before = tl.load(CarryLse + row)
        largest = tl.maximum(before * LOG2E, LOWEST)
        total += tl.math.exp2(before * LOG2E - largest)
        out += tl.load(Carry + out_at + column, mask=column < VALUE_DIM, other=0.0).to(tl.float32) * total
    seen = total * 0.0
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        at = tl.cast(split, tl.int64) * rows + row
        lse = tl.load(PartLse + at, mask=split < splits, other=float("-inf"))
        new = tl.maximum(largest, tl.max(lse, 0))
        weights = tl.math.exp2(lse - new)
        decay = tl.math.exp2(largest - new)
        mask = (split < splits)[:, None] & (column < VALUE_DIM)[None, :]
        parts = tl.load(PartOut + at[:, None] * VALUE_DIM + column[None, :], mask=mask, other=0.0)
        out = out * decay + tl.sum(parts * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        seen += tl.sum(weights, 0)
        largest = new

    divisor = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(seen == 0.0, before, (largest + tl.math.log2(divisor)) * LN2)
    tl.store(Lse + row, lse)
    out = out / divisor
    tl.store(Out + out_at + column, out.to(Out.dtype.element_ty), mask=column < VALUE_DIM)


def few_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    scale: float,
    carry: Partial | None,
    final: bool = False,
    tiles: Tiles | None = None,
) -> Partial:
    """As :func:`~seqpar.kernels.triton.forward.forward`, for few queries and any number of keys."""
    group = q.shape[2] // k.shape[2]
    tiles = tiles or configured("few", q, v)
    tiles = replace(tiles, rows=min(tiles.rows, max(16, triton.next_power_of_2(group * q.shape[1]))))
    q, scale = with_positive(scale, q)
    q, k, v = (addressable(x, max(tiles.rows, tiles.keys)) for x in (q, k, v))
    batch, queries, heads, dim = q.shape
    keys, kv_heads, value_dim = v.shape[1:]
    result = result_of(q, value_dim, carry, final)
    before = carry or result
    num_tiles = triton.cdiv(group * queries, tiles.rows)
    alike = num_tiles * batch * kv_heads
    wanted = triton.cdiv(multiprocessors(q) * PROGRAMS_PER_MULTIPROCESSOR, max(1, alike))
    splits = max(1, min(wanted, triton.cdiv(keys, tiles.keys)))
    out = torch.empty(splits, batch, heads, queries, value_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(splits, batch, heads, queries, dtype=torch.float32, device=q.device)
    descriptors = tiles.descriptors and is_describable(k) and is_describable(v)
    key_source, value_source = (operand(x, tiles.keys, descriptors) for x in (k, v))
    few_kernel[(splits * alike,)](
        q, *key_source, *value_source, intervals.start, intervals.end, out, lse,
        *q.stride(), *k.stride(), *v.stride(), *interval_strides(intervals),
        queries, heads, batch, num_tiles, splits, scale * math.log2(math.e),
        group, dim, *Columns.of(dim), value_dim, *Columns.of(value_dim),
        tiles.rows, tiles.keys, descriptors, **options(tiles),
    )  # fmt: skip
    rows = batch * heads * queries
    merge_kernel[(rows,)](
        out, lse, before.out, before.lse, result.out, result.lse, queries, heads, rows, splits,
        value_dim, triton.next_power_of_2(value_dim), MERGED_AT_ONCE, carry is not None,
    )  # fmt: skip
    return result
