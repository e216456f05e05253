"""Few queries against many keys in one pass over K and V, compiled by Numba; imported only where Numba is.

What this costs beside reading K and V: for each key 2 D multiply-adds per query head, in fp32, whatever K and V are in.
K and V are read in memory order, a block at a time, once for all query heads of their KV head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

BLOCK = 64  # keys whose scores are in cache between the two products
ROWS = 4  # query heads that share what is in registers
AHEAD = 8  # keys: how far before its use a row is asked for; the processor alone looks no further than a page

_LOG2E, _LN2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
_ZERO, _NOTHING = np.float32(0), np.float32(-np.inf)
# Sums may be reordered, which is what vectors do; NaN and inf keep their meaning.
_compiled = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


@cache
def attention_of(dtype: torch.dtype) -> Callable[..., None]:
    """The compiled function for K and V of ``dtype``, bf16 (as uint16) or fp32: about 1.5 s, once per process.

    ``(q [rows, D], k, its first element, its elements from key to key, v, likewise, how many keys, mask [m, Tk], its
    row for the first of q, its first key, out [rows, Dv], lse [rows])``. q is scaled by ``scale * log2(e)``, its rows
    are a multiple of ``ROWS``; k and v are flat; row r adds row ``(first + r) % m`` of the mask; m = 0: none.
    """
    element = types.uint16 if dtype == torch.bfloat16 else types.float32
    table, flat, integer = types.float32[:, ::1], element[::1], types.int64
    signature = types.void(
        table, flat, integer, integer, flat, integer, integer, integer, table, integer, integer, table,
        types.float32[::1],
    )  # fmt: skip
    return njit(signature, nogil=True, error_model="numpy")(_attention)


def _attention(
    q: Any, k: Any, k_first: int, k_step: int, v: Any, v_first: int, v_step: int, keys: int,
    mask: Any, mask_row: int, mask_key: int, out: Any, lse: Any,
) -> None:  # fmt: skip
    rows = q.shape[0]
    scores = np.empty((rows, BLOCK), np.float32)
    top, total = np.full(rows, _NOTHING, np.float32), np.zeros(rows, np.float32)
    out[:] = _ZERO
    for block in range(0, keys, BLOCK):
        count = min(BLOCK, keys - block)
        _multiply_keys(q, k, k_first + block * k_step, k_step, count, scores)
        for row in range(rows):
            if mask.shape[0] > 0:
                first = mask_key + block
                _add_mask(scores[row], mask[(mask_row + row) % mask.shape[0]][first : first + count])
            _exponentiate(scores[row], count, top, total, row, out[row])
        _add_values(scores, v, v_first + block * v_step, v_step, count, out)
    for row in range(rows):
        if total[row] == 0:
            lse[row] = _NOTHING
            continue
        lse[row] = (top[row] + np.log2(total[row])) * _LN2
        out[row] /= total[row]


def _widened(x: Any) -> Any:
    """bf16, given as uint16, or fp32, in fp32."""


@overload(_widened, strict=False)  # it would compare annotations
def _(x: Any) -> Callable[[Any], Any]:
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


def _prefetch(_: Any, array: Any, index: Any) -> tuple[Any, Callable[..., Any]]:
    """Fetch the cache line of ``array[index]``, which need not exist, while other work goes on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), cgutils.voidptr_t)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, number(0), number(3), number(1)])  # to read, into every level, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


_ask_for: Any = intrinsic(_prefetch)


@_compiled
def _multiply_keys(q: Any, k: Any, first: int, step: int, count: int, scores: Any) -> None:
    """Scores of ``count`` keys, two at a time against ROWS queries: eight sums in registers."""
    dim = q.shape[1]
    for row in range(0, q.shape[0], ROWS):
        q0, q1, q2, q3 = q[row], q[row + 1], q[row + 2], q[row + 3]
        for j in range(0, count, 2):
            other = min(j + 1, count - 1)
            at, at_other = first + j * step, first + other * step
            if row == 0:
                for line in range(0, dim, 64 // k.itemsize):
                    _ask_for(k, at + AHEAD * step + line)
                    _ask_for(k, at_other + AHEAD * step + line)
            key, key_other = k[at : at + dim], k[at_other : at_other + dim]
            a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = _ZERO
            for d in range(dim):
                x, y = _widened(key[d]), _widened(key_other[d])
                a0 += q0[d] * x
                a1 += q0[d] * y
                b0 += q1[d] * x
                b1 += q1[d] * y
                c0 += q2[d] * x
                c1 += q2[d] * y
                d0 += q3[d] * x
                d1 += q3[d] * y
            scores[row, j], scores[row + 1, j], scores[row + 2, j], scores[row + 3, j] = a0, b0, c0, d0
            scores[row, other], scores[row + 1, other] = a1, b1
            scores[row + 2, other], scores[row + 3, other] = c1, d1


@_compiled
def _add_mask(scores: Any, mask: Any) -> None:
    for j in range(mask.shape[0]):
        scores[j] += mask[j] * _LOG2E


@_compiled
def _exponentiate(scores: Any, count: int, top: Any, total: Any, row: int, out: Any) -> None:
    """The online softmax's step: scores become weights relative to the new maximum, as the row's sums do."""
    highest = top[row]
    for j in range(count):
        highest = max(highest, scores[j])
    base = _ZERO if highest == _NOTHING else highest  # nothing seen yet: -inf - 0 still gives weight 0
    added = _ZERO
    for j in range(count):
        scores[j] = _exp2(scores[j] - base)
        added += scores[j]
    scores[count:] = _ZERO
    if highest != top[row]:
        shrink = _exp2(top[row] - base)
        total[row] *= shrink
        for d in range(out.shape[0]):
            out[d] *= shrink
        top[row] = highest
    total[row] += added


@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def _exp2(x: Any) -> Any:
    """``2 ** x`` for x <= 0 to an ulp or two, in vectors (a call of libm is not); NaN stays, below 2 ** -126 is 0.

    A whole power by the exponent's bits, times the Taylor series on [-0.5, 0.5], whose next term is 5e-9.
    """
    whole = np.floor(max(x, np.float32(-126)) + np.float32(0.5))
    f = x - whole
    series = np.float32(1.5252734e-5)
    series = series * f + np.float32(1.5403530e-4)
    series = series * f + np.float32(1.3333558e-3)
    series = series * f + np.float32(9.6181291e-3)
    series = series * f + np.float32(5.5504109e-2)
    series = series * f + np.float32(2.4022651e-1)
    series = series * f + np.float32(6.9314718e-1)
    series = series * f + np.float32(1.0)
    power = np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return _ZERO if x < np.float32(-126) else series * power


@_compiled
def _add_values(weights: Any, v: Any, first: int, step: int, count: int, out: Any) -> None:
    """Four values at a time to ROWS sums, which so are loaded and stored a quarter as often."""
    dim = out.shape[1]
    for row in range(0, out.shape[0], ROWS):
        out0, out1, out2, out3 = out[row], out[row + 1], out[row + 2], out[row + 3]
        w0, w1, w2, w3 = weights[row], weights[row + 1], weights[row + 2], weights[row + 3]
        for j in range(0, count, 4):  # beyond count, weights are 0, of values that exist
            a = first + j * step
            b = first + min(j + 1, count - 1) * step
            c, e = first + min(j + 2, count - 1) * step, first + min(j + 3, count - 1) * step
            if row == 0:
                for line in range(0, dim, 64 // v.itemsize):
                    for ahead in range(AHEAD, AHEAD + 4):
                        _ask_for(v, a + ahead * step + line)
            va, vb, vc, ve = v[a : a + dim], v[b : b + dim], v[c : c + dim], v[e : e + dim]
            # In variables, not read where they are used: for all the compiler knows, storing to out changes them.
            a0, a1, a2, a3 = w0[j], w0[j + 1], w0[j + 2], w0[j + 3]
            b0, b1, b2, b3 = w1[j], w1[j + 1], w1[j + 2], w1[j + 3]
            c0, c1, c2, c3 = w2[j], w2[j + 1], w2[j + 2], w2[j + 3]
            e0, e1, e2, e3 = w3[j], w3[j + 1], w3[j + 2], w3[j + 3]
            for d in range(dim):
                w, x, y, z = _widened(va[d]), _widened(vb[d]), _widened(vc[d]), _widened(ve[d])
                out0[d] += a0 * w + a1 * x + a2 * y + a3 * z
                out1[d] += b0 * w + b1 * x + b2 * y + b3 * z
                out2[d] += c0 * w + c1 * x + c2 * y + c3 * z
                out3[d] += e0 * w + e1 * x + e2 * y + e3 * z
