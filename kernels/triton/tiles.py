"""What the kernels share: tiles of rows, the programs that own them, and the loop of queries over their keys.

A tile is ``[rows, columns]`` of one head of a ``[B, T, H, D]`` tensor. Triton's tiles are powers of two wide, so a head
dim that is none is cut in two, 80 into 64 + 16 and 192 into 128 + 64, rather than padded to the next power.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Stands for "no score yet" in a running maximum: -inf would give -inf - -inf.
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
# Stands for "after every key" in minima over rows of which some see nothing.
BEYOND: tl.constexpr = tl.constexpr(1 << 30)


class Columns(NamedTuple):
    """A head dim as one or two powers of two; ``second`` is 0 where one will do."""

    first: int
    second: int

    @classmethod
    def of(cls, dim: int) -> Columns:
        """The narrowest cover of ``dim`` columns; a product wants at least 16."""
        first = max(16, 1 << (dim.bit_length() - 1))
        second = 0 if dim <= first else max(16, triton.next_power_of_2(dim - first))
        return cls(2 * first, 0) if second == first else cls(first, second)


def operand(x: Tensor, rows: int, descriptors: bool) -> tuple[Any, Any]:
    """What a kernel loads tiles of ``rows`` of ``x [B, T, H, D]`` from: one source for each part of the columns.

    Both are ``x`` itself, or each is a descriptor for Hopper's copy engine.
    """
    if not descriptors:
        return x, x
    columns = Columns.of(x.shape[-1])
    shape = list(x.shape)
    strides = [stride if size > 1 else x.shape[-1] for stride, size in zip(x.stride()[:-1], shape, strict=False)] + [1]
    first = TensorDescriptor(x, shape, strides, [1, rows, 1, columns.first])
    second = TensorDescriptor(x, shape, strides, [1, rows, 1, columns.second]) if columns.second else first
    return first, second


def is_describable(x: Tensor) -> bool:
    """Whether the copy engine can read ``x``: dense columns, everything else apart and aligned to 16 bytes."""
    strides = [stride * x.itemsize for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    aligned = all(stride > 0 and stride % 16 == 0 for stride in (*strides, x.shape[-1] * x.itemsize))
    return aligned and x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and x.numel() > 0


def addressable(x: Tensor, rows: int) -> Tensor:
    """``x``, copied where its strides are so wide that 32 bits do not reach across a tile."""
    reach = rows * x.stride(1) + x.shape[3] * x.stride(3)
    return x if reach < 1 << 31 else x.contiguous()


@triton.jit
def assigned(tiles, heads, section):
    """The tile and head (of all rows of the batch) of this program, last tiles of a section of heads first.

    Under a causal mask the last tiles have the most keys: the long ones start first. The heads of a section are those
    whose keys fit the L2 cache together.
    """
    pid = tl.program_id(0)
    skipped = pid // (tiles * section) * section
    within = pid - skipped * tiles
    here = tl.minimum(section, heads - skipped)
    return tiles - 1 - within // here, skipped + within % here


@triton.jit
def head_of(source, batch, head, stride_batch, stride_head, DESCRIPTORS: tl.constexpr):
    """Where a head begins; a descriptor finds it by itself."""
    if DESCRIPTORS:
        return source
    else:
        return source + tl.cast(batch, tl.int64) * stride_batch + tl.cast(head, tl.int64) * stride_head


@triton.jit
def load_rows(
    source, batch, head, first, end, stride_row, stride_column,
    ROWS: tl.constexpr, FROM: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """``[ROWS, COLUMNS]`` from row ``first`` and column FROM; zeros from row ``end`` and column DIM on.

    A descriptor knows the end of the tensor, not ``end``.
    """
    if DESCRIPTORS:
        return source.load([batch, first, head, FROM]).reshape(ROWS, COLUMNS)
    else:
        pointers, mask = rows_at(source, first, end, stride_row, stride_column, ROWS, FROM, COLUMNS, DIM)
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def rows_at(
    base, first, end, stride_row, stride_column,
    ROWS: tl.constexpr, FROM: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Pointers to ``[ROWS, COLUMNS]``, and which of them lie before row ``end`` and column DIM."""
    row, column = tl.arange(0, ROWS), FROM + tl.arange(0, COLUMNS)
    inside = (first + row < end)[:, None]
    if FROM + COLUMNS > DIM:
        inside = inside & (column < DIM)[None, :]
    pointers = (
        base + tl.cast(first, tl.int64) * stride_row + (row[:, None] * stride_row + column[None, :] * stride_column)
    )
    return pointers, inside


@triton.jit
def span(start, end, inside):
    """Of a tile's rows: the first key any sees, the last + 1, and the same of the keys that all see."""
    seeing = inside & (start < end)
    low = tl.min(tl.where(seeing, start, BEYOND), 0)
    high = tl.max(tl.where(seeing, end, 0), 0)
    all_low = tl.max(tl.where(inside, start, 0), 0)
    all_high = tl.min(tl.where(inside, end, BEYOND), 0)
    return low, high, all_low, all_high


@triton.jit
def attend(
    q0, q1, K0, K1, V0, V1, batch, head, stride_kt, stride_kd, stride_vt, stride_vd,
    start, end, low, high, all_low, all_high, scale,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    VALUE_DIM: tl.constexpr, V_0: tl.constexpr, V_1: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Online softmax of a tile of queries over keys ``low .. high - 1``, in base 2 (FlashAttention-2, algorithm 1).

    ``q0 [ROWS, D0]`` and ``q1 [ROWS, D1]`` are the tile, ``start, end [ROWS]`` its intervals, ``scale`` includes
    log2(e) and is positive. Returns the unnormalised output in two parts, the maximum and the sum of each row. Only
    tiles of keys that reach out of ``all_low .. all_high - 1`` look at the intervals.
    """
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out0 = tl.zeros([ROWS, V_0], tl.float32)
    out1 = tl.zeros([ROWS, V_1 if V_1 > 0 else 1], tl.float32)
    # Without this condition ptxas may serialise every wgmma of the function: a loop that cannot be empty is safe.
    if low < high:
        for n in range(low, high, KEYS):
            k = load_rows(K0, batch, head, n, high, stride_kt, stride_kd, KEYS, 0, D0, DIM, DESCRIPTORS)
            scores = tl.dot(q0, k.T, input_precision="ieee")
            if D1 > 0:
                k = load_rows(K1, batch, head, n, high, stride_kt, stride_kd, KEYS, D0, D1, DIM, DESCRIPTORS)
                scores = tl.dot(q1, k.T, scores, input_precision="ieee")
            if (n < all_low) | (n + KEYS > all_high):
                key = n + tl.arange(0, KEYS)
                scores = tl.where((key >= start[:, None]) & (key < end[:, None]), scores, float("-inf"))
            new = tl.maximum(largest, tl.max(scores, 1) * scale)
            weights = tl.math.exp2(scores * scale - new[:, None])
            decay = tl.math.exp2(largest - new)
            total = total * decay + tl.sum(weights, 1)
            largest = new
            out0 = out0 * decay[:, None]
            v = load_rows(V0, batch, head, n, high, stride_vt, stride_vd, KEYS, 0, V_0, VALUE_DIM, DESCRIPTORS)
            weights = weights.to(v.dtype)
            out0 = tl.dot(weights, v, out0, input_precision="ieee")
            if V_1 > 0:
                out1 = out1 * decay[:, None]
                v = load_rows(V1, batch, head, n, high, stride_vt, stride_vd, KEYS, V_0, V_1, VALUE_DIM, DESCRIPTORS)
                out1 = tl.dot(weights, v, out1, input_precision="ieee")
    return out0, out1, largest, total
