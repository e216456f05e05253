"""The backward: dQ by tiles of queries, dK and dV by tiles of keys, each tile by one program, so in a fixed order.

``P = exp(S - lse)`` and ``dS = P * (dO V^T - delta)`` are computed in both (FlashAttention-2, algorithm 2, computes
them once and adds dQ atomically: ``deterministic=False`` here).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Intervals, OutputGradient
from .configurations import Tiles
from .launching import configured, heads_in_cache, interval_strides, options
from .tiles import LOG2E, Columns, addressable, assigned, head_of, is_describable, load_rows, operand, rows_at, span

DELTA_ROWS = 16


@triton.jit
def delta_kernel(
    Out, DOut, DLse, Delta, stride_ob, stride_ot, stride_oh, stride_od, stride_db, stride_dt, stride_dh, stride_dd,
    queries, heads, tiles, VALUE_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """``rowsum(out * dout) - dlse`` of ROWS queries of one head."""
    pid = tl.program_id(0)
    bh, first = pid // tiles, pid % tiles * ROWS
    batch, head = bh // heads, bh % heads
    Out = head_of(Out, batch, head, stride_ob, stride_oh, False)
    DOut = head_of(DOut, batch, head, stride_db, stride_dh, False)
    out = load_rows(Out, batch, head, first, queries, stride_ot, stride_od, ROWS, 0, COLUMNS, VALUE_DIM, False)
    dout = load_rows(DOut, batch, head, first, queries, stride_dt, stride_dd, ROWS, 0, COLUMNS, VALUE_DIM, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    row = first + tl.arange(0, ROWS)
    at = tl.cast(bh, tl.int64) * queries + row
    if HAS_DLSE:
        delta -= tl.load(DLse + at, mask=row < queries, other=0.0)
    tl.store(Delta + at, delta, mask=row < queries)


@triton.jit
def dq_kernel(
    Q, K0, K1, V0, V1, DOut, Lse, Delta, Start, End, DQ,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ob, stride_ot, stride_oh, stride_od,
    stride_gb, stride_gt, stride_gh, stride_ib, stride_ih,
    queries, heads, tiles, programs_heads, section, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    VALUE_DIM: tl.constexpr, V_0: tl.constexpr, V_1: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One program: adds to the dQ of a tile of ROWS queries of one head."""
    tile, bh = assigned(tiles, programs_heads, section)
    batch, head = bh // heads, bh % heads
    first = tile * ROWS
    row = first + tl.arange(0, ROWS)
    inside = row < queries

    bounds = tl.cast(batch, tl.int64) * stride_ib + head * stride_ih + row
    start = tl.load(Start + bounds, mask=inside, other=0)
    end = tl.load(End + bounds, mask=inside, other=0)
    low, high, all_low, all_high = span(start, end, inside)

    if low < high:
        Q = head_of(Q, batch, head, stride_qb, stride_qh, False)
        DOut = head_of(DOut, batch, head, stride_ob, stride_oh, False)
        q0 = load_rows(Q, batch, head, first, queries, stride_qt, stride_qd, ROWS, 0, D0, DIM, False)
        o0 = load_rows(DOut, batch, head, first, queries, stride_ot, stride_od, ROWS, 0, V_0, VALUE_DIM, False)
        if D1 > 0:
            q1 = load_rows(Q, batch, head, first, queries, stride_qt, stride_qd, ROWS, D0, D1, DIM, False)
        if V_1 > 0:
            o1 = load_rows(DOut, batch, head, first, queries, stride_ot, stride_od, ROWS, V_0, V_1, VALUE_DIM, False)
        at = tl.cast(bh, tl.int64) * queries + row
        lse = base_2_lse(Lse + at, inside)
        delta = tl.load(Delta + at, mask=inside, other=0.0)

        kv_head = head // GROUP
        K0 = head_of(K0, batch, kv_head, stride_kb, stride_kh, DESCRIPTORS)
        K1 = head_of(K1, batch, kv_head, stride_kb, stride_kh, DESCRIPTORS)
        V0 = head_of(V0, batch, kv_head, stride_vb, stride_vh, DESCRIPTORS)
        V1 = head_of(V1, batch, kv_head, stride_vb, stride_vh, DESCRIPTORS)
        dq0 = tl.zeros([ROWS, D0], tl.float32)
        dq1 = tl.zeros([ROWS, D1 if D1 > 0 else 1], tl.float32)
        for n in range(low, high, KEYS):
            k0 = load_rows(K0, batch, kv_head, n, high, stride_kt, stride_kd, KEYS, 0, D0, DIM, DESCRIPTORS)
            scores = tl.dot(q0, k0.T, input_precision="ieee")
            if D1 > 0:
                k1 = load_rows(K1, batch, kv_head, n, high, stride_kt, stride_kd, KEYS, D0, D1, DIM, DESCRIPTORS)
                scores = tl.dot(q1, k1.T, scores, input_precision="ieee")
            weights = tl.math.exp2(scores * (scale * LOG2E) - lse[:, None])
            if (n < all_low) | (n + KEYS > all_high):
                key = n + tl.arange(0, KEYS)
                weights = tl.where((key >= start[:, None]) & (key < end[:, None]), weights, 0.0)
            v = load_rows(V0, batch, kv_head, n, high, stride_vt, stride_vd, KEYS, 0, V_0, VALUE_DIM, DESCRIPTORS)
            dweights = tl.dot(o0, v.T, input_precision="ieee")
            if V_1 > 0:
                v = load_rows(V1, batch, kv_head, n, high, stride_vt, stride_vd, KEYS, V_0, V_1, VALUE_DIM, DESCRIPTORS)
                dweights = tl.dot(o1, v.T, dweights, input_precision="ieee")
            dscores = (weights * (dweights - delta[:, None])).to(k0.dtype)
            dq0 = tl.dot(dscores, k0, dq0, input_precision="ieee")
            if D1 > 0:
                dq1 = tl.dot(dscores, k1, dq1, input_precision="ieee")

        DQ = head_of(DQ, batch, head, stride_gb, stride_gh, False)
        add_rows(DQ, dq0 * scale, first, queries, stride_gt, ROWS, 0, D0, DIM)
        if D1 > 0:
            add_rows(DQ, dq1 * scale, first, queries, stride_gt, ROWS, D0, D1, DIM)


@triton.jit
def dkv_kernel(
    Q0, Q1, K, V, DOut0, DOut1, Lse, Delta, Start, End, Reach, DQ, DK, DV,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ob, stride_ot, stride_oh, stride_od,
    stride_gb, stride_gt, stride_gh, stride_dkb, stride_dkt, stride_dkh, stride_dvb, stride_dvt, stride_dvh,
    stride_ib, stride_ih, stride_rb, stride_rh,
    queries, keys, heads, tiles, programs_heads, section, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    VALUE_DIM: tl.constexpr, V_0: tl.constexpr, V_1: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DESCRIPTORS: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """One program: adds to the dK, dV of a tile of KEYS keys of one KV head; if ATOMIC, also to all dQ they touch.

    Scores are computed transposed, ``[KEYS, ROWS]``, so that P and dS are the left operands of the products that they
    enter, and stay in registers. ``Reach [B|1, H|1, tiles, 4]``: see ``Intervals.queries_of_tiles``.
    """
    tile, bh = assigned(tiles, programs_heads, section)
    tile = tiles - 1 - tile  # under a causal mask the first tiles have the most queries
    kv_heads = heads // GROUP
    batch, kv_head = bh // kv_heads, bh % kv_heads
    n = tile * KEYS
    key = n + tl.arange(0, KEYS)

    # One list of query tiles for all heads of the group; heads with intervals of their own share the union.
    reach = Reach + batch * stride_rb + kv_head * GROUP * stride_rh + tile * 4
    first, last = tl.load(reach), tl.load(reach + 1)
    all_first, all_last = tl.load(reach + 2), tl.load(reach + 3)
    for _member in range(1, GROUP):
        reach += stride_rh
        first, last = tl.minimum(first, tl.load(reach)), tl.maximum(last, tl.load(reach + 1))
        all_first, all_last = tl.maximum(all_first, tl.load(reach + 2)), tl.minimum(all_last, tl.load(reach + 3))
    members_tiles = tl.cdiv(last - first, ROWS)
    trips = GROUP * members_tiles

    if trips > 0:
        K = head_of(K, batch, kv_head, stride_kb, stride_kh, False)
        V = head_of(V, batch, kv_head, stride_vb, stride_vh, False)
        k0 = load_rows(K, batch, kv_head, n, keys, stride_kt, stride_kd, KEYS, 0, D0, DIM, False)
        v0 = load_rows(V, batch, kv_head, n, keys, stride_vt, stride_vd, KEYS, 0, V_0, VALUE_DIM, False)
        if D1 > 0:
            k1 = load_rows(K, batch, kv_head, n, keys, stride_kt, stride_kd, KEYS, D0, D1, DIM, False)
        if V_1 > 0:
            v1 = load_rows(V, batch, kv_head, n, keys, stride_vt, stride_vd, KEYS, V_0, V_1, VALUE_DIM, False)
        dk0 = tl.zeros([KEYS, D0], tl.float32)
        dk1 = tl.zeros([KEYS, D1 if D1 > 0 else 1], tl.float32)
        dv0 = tl.zeros([KEYS, V_0], tl.float32)
        dv1 = tl.zeros([KEYS, V_1 if V_1 > 0 else 1], tl.float32)

        for i in range(0, trips):
            head = kv_head * GROUP + i // members_tiles
            m = first + i % members_tiles * ROWS
            q_head0 = head_of(Q0, batch, head, stride_qb, stride_qh, DESCRIPTORS)
            q0 = load_rows(q_head0, batch, head, m, queries, stride_qt, stride_qd, ROWS, 0, D0, DIM, DESCRIPTORS)
            scores = tl.dot(k0, q0.T, input_precision="ieee")
            if D1 > 0:
                q_head1 = head_of(Q1, batch, head, stride_qb, stride_qh, DESCRIPTORS)
                q1 = load_rows(q_head1, batch, head, m, queries, stride_qt, stride_qd, ROWS, D0, D1, DIM, DESCRIPTORS)
                scores = tl.dot(k1, q1.T, scores, input_precision="ieee")

            row = m + tl.arange(0, ROWS)
            inside = row < queries
            at = (tl.cast(batch, tl.int64) * heads + head) * queries + row
            lse = base_2_lse(Lse + at, inside)
            weights = tl.math.exp2(scores * (scale * LOG2E) - lse[None, :])
            if (m < all_first) | (m + ROWS > all_last):
                bounds = tl.cast(batch, tl.int64) * stride_ib + head * stride_ih + row
                start = tl.load(Start + bounds, mask=inside, other=0)
                end = tl.load(End + bounds, mask=inside, other=0)
                weights = tl.where((key[:, None] >= start[None, :]) & (key[:, None] < end[None, :]), weights, 0.0)

            o_head0 = head_of(DOut0, batch, head, stride_ob, stride_oh, DESCRIPTORS)
            o0 = load_rows(o_head0, batch, head, m, queries, stride_ot, stride_od, ROWS, 0, V_0, VALUE_DIM, DESCRIPTORS)
            dv0 = tl.dot(weights.to(o0.dtype), o0, dv0, input_precision="ieee")
            dweights = tl.dot(v0, o0.T, input_precision="ieee")
            if V_1 > 0:
                o_head1 = head_of(DOut1, batch, head, stride_ob, stride_oh, DESCRIPTORS)
                o1 = load_rows(
                    o_head1, batch, head, m, queries, stride_ot, stride_od, ROWS, V_0, V_1, VALUE_DIM, DESCRIPTORS
                )
                dv1 = tl.dot(weights.to(o1.dtype), o1, dv1, input_precision="ieee")
                dweights = tl.dot(v1, o1.T, dweights, input_precision="ieee")
            delta = tl.load(Delta + at, mask=inside, other=0.0)
            dscores = (weights * (dweights - delta[None, :])).to(q0.dtype)
            dk0 = tl.dot(dscores, q0, dk0, input_precision="ieee")
            if D1 > 0:
                dk1 = tl.dot(dscores, q1, dk1, input_precision="ieee")
            if ATOMIC:
                grad = head_of(DQ, batch, head, stride_gb, stride_gh, False)
                dq = tl.dot(dscores.T, k0, input_precision="ieee") * scale
                pointers, mask = rows_at(grad, m, queries, stride_gt, 1, ROWS, 0, D0, DIM)
                tl.atomic_add(pointers, dq, mask=mask, sem="relaxed")
                if D1 > 0:
                    dq = tl.dot(dscores.T, k1, input_precision="ieee") * scale
                    pointers, mask = rows_at(grad, m, queries, stride_gt, 1, ROWS, D0, D1, DIM)
                    tl.atomic_add(pointers, dq, mask=mask, sem="relaxed")

        DK = head_of(DK, batch, kv_head, stride_dkb, stride_dkh, False)
        DV = head_of(DV, batch, kv_head, stride_dvb, stride_dvh, False)
        add_rows(DK, dk0 * scale, n, keys, stride_dkt, KEYS, 0, D0, DIM)
        add_rows(DV, dv0, n, keys, stride_dvt, KEYS, 0, V_0, VALUE_DIM)
        if D1 > 0:
            add_rows(DK, dk1 * scale, n, keys, stride_dkt, KEYS, D0, D1, DIM)
        if V_1 > 0:
            add_rows(DV, dv1, n, keys, stride_dvt, KEYS, V_0, V_1, VALUE_DIM)


@triton.jit
def base_2_lse(pointers, inside):
    """The lse of rows, in base 2; +inf where a row saw nothing or is none, so that its weights become 0."""
    lse = tl.load(pointers, mask=inside, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def add_rows(
    base, x, first, end, stride_row, ROWS: tl.constexpr, FROM: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr
):
    """Add a tile to rows of dense columns."""
    pointers, mask = rows_at(base, first, end, stride_row, 1, ROWS, FROM, COLUMNS, DIM)
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + x, mask=mask)


def delta(grad: OutputGradient) -> Tensor:
    """``rowsum(out * dout) - dlse``, fp32 ``[B, H, Tq]``, in one pass over memory."""
    out, dout = (addressable(x, DELTA_ROWS) for x in (grad.out, grad.dout))
    batch, queries, heads, value_dim = out.shape
    result = torch.empty(batch, heads, queries, dtype=torch.float32, device=out.device)
    tiles = triton.cdiv(queries, DELTA_ROWS)
    dlse = result if grad.dlse is None else grad.dlse.to(torch.float32).contiguous()
    delta_kernel[(tiles * batch * heads,)](
        out, dout, dlse, result, *out.stride(), *dout.stride(), queries, heads, tiles,
        value_dim, DELTA_ROWS, triton.next_power_of_2(value_dim), grad.dlse is not None,
    )  # fmt: skip
    return result


def add_dq(
    grad: OutputGradient,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    scale: float,
    dq: Tensor,
    tiles: Tiles | None = None,
) -> None:
    """Add this block's part to ``dq``, fp32."""
    tiles = tiles or configured("dq", q, v)
    q, k, v, dout = (addressable(x, max(tiles.rows, tiles.keys)) for x in (q, k, v, grad.dout))
    batch, queries, heads, dim = q.shape
    value_dim, group = v.shape[3], heads // k.shape[2]
    num_tiles = triton.cdiv(queries, tiles.rows)
    descriptors = tiles.descriptors and is_describable(k) and is_describable(v)
    key_source, value_source = (operand(x, tiles.keys, descriptors) for x in (k, v))
    dq_kernel[(num_tiles * batch * heads,)](
        q, *key_source, *value_source, dout, grad.lse.contiguous(), grad.delta(delta),
        intervals.start, intervals.end, dq,
        *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *dq.stride()[:3], *interval_strides(intervals),
        queries, heads, num_tiles, batch * heads, min(heads_in_cache(k, v, group), batch * heads), scale,
        group, dim, *Columns.of(dim), value_dim, *Columns.of(value_dim),
        tiles.rows, tiles.keys, descriptors, **options(tiles),
    )  # fmt: skip


def add_dkv(
    grad: OutputGradient,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    scale: float,
    dk: Tensor,
    dv: Tensor,
    dq: Tensor | None = None,
    tiles: Tiles | None = None,
) -> None:
    """Add this block's part to ``dk`` and ``dv``, fp32; with ``dq`` given, to that too, in any order (atomically)."""
    tiles = tiles or configured("dkv" if dq is None else "dkv_atomic", q, v)
    q, k, v, dout = (addressable(x, max(tiles.rows, tiles.keys)) for x in (q, k, v, grad.dout))
    batch, queries, heads, dim = q.shape
    keys, kv_heads, value_dim = v.shape[1:]
    reach = intervals.queries_of_tiles(tiles.keys, keys)
    num_tiles = reach.shape[2]
    descriptors = tiles.descriptors and is_describable(q) and is_describable(dout)
    query_source, dout_source = (operand(x, tiles.rows, descriptors) for x in (q, dout))
    into = dk if dq is None else dq
    dkv_kernel[(num_tiles * batch * kv_heads,)](
        *query_source, k, v, *dout_source, grad.lse.contiguous(), grad.delta(delta),
        intervals.start, intervals.end, reach, into, dk, dv,
        *q.stride(), *k.stride(), *v.stride(), *dout.stride(),
        *into.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *interval_strides(intervals),
        *(stride if size > 1 else 0 for stride, size in zip(reach.stride()[:2], reach.shape[:2], strict=True)),
        queries, keys, heads, num_tiles, batch * kv_heads, min(heads_in_cache(q, dout, 1), batch * kv_heads), scale,
        heads // kv_heads, dim, *Columns.of(dim), value_dim, *Columns.of(value_dim),
        tiles.rows, tiles.keys, descriptors, dq is not None, **options(tiles),
    )  # fmt: skip
