"""Attention of few queries on the CPU, bound by reading K and V: each key once for all query heads that share it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count

import numpy as np
import torch
from torch import Tensor

CHUNK = 4096  # keys of a KV head that one thread takes at a time; not of their number, so that results repeat on any
WORTH = 1 << 21
"""Elements of K from which handing out work to threads costs less than it saves; compiling is once per process."""
MOST_ROWS = 32
"""Queries of a KV head up to which fp32 arithmetic keeps up with PyTorch's products of bf16."""


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :func:`one_pass` is the way: K and V large, both bf16 or fp32, not too many queries, and Numba there."""
    fits = {k.dtype, v.dtype} in ({torch.bfloat16}, {torch.float32})
    rows = q.shape[1] * q.shape[2] // k.shape[2]
    return fits and k.numel() >= WORTH and rows <= MOST_ROWS and has_numba()


def compile_ahead(dtype: torch.dtype, elements: int) -> None:
    """Compile now (seconds), not in the first call that wants it, for caches of so many elements of K, if any does."""
    if elements >= WORTH and dtype in (torch.bfloat16, torch.float32) and has_numba():
        from .one_pass_cpu import attention_of

        attention_of(dtype)


@cache
def has_numba() -> bool:
    """Whether Numba is there and fits the installed NumPy."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def one_pass(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """out ``[B, Tq, H, Dv]`` and lse ``[B, H, Tq]`` in fp32, of keys in any strides whose last is 1.

    K and V are read once, by as many threads as PyTorch uses, and everything is computed in fp32.

    Args:
        q: ``[B, Tq, H, D]``.
        k: ``[B, Tk, Hkv, D]``, bf16 or fp32.
        v: ``[B, Tk, Hkv, Dv]``, of the same dtype.
        scale: of the scores.
        mask: ``[Tq, Tk]`` or ``[1, H, Tq, Tk]``, added to the scaled scores.
    """
    from .one_pass_cpu import ROWS, attention_of

    batch, tokens, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    rows = heads // kv_heads * tokens
    room = -(-rows // ROWS) * ROWS
    query = q.new_zeros(batch, kv_heads, room, q.shape[-1], dtype=torch.float32)
    query[:, :, :rows] = packed(q, kv_heads)
    queries = query.mul_(scale * math.log2(math.e)).numpy()
    added = q.new_empty(0, 0, dtype=torch.float32) if mask is None else mask.reshape(-1, keys).float()
    masks = added.contiguous().numpy()
    chunks = -(-keys // CHUNK)
    outs = query.new_empty(chunks, batch, kv_heads, room, v.shape[-1])
    lses = query.new_empty(chunks, batch, kv_heads, room)
    out, lse, attend, flat_k, flat_v = outs.numpy(), lses.numpy(), attention_of(k.dtype), _flat(k), _flat(v)

    def work(item: int) -> None:
        b, h, chunk = item // (kv_heads * chunks), item // chunks % kv_heads, item % chunks
        first = chunk * CHUNK
        k_first, v_first = (b * x.stride(0) + first * x.stride(1) + h * x.stride(2) for x in (k, v))
        attend(
            queries[b, h], flat_k, k_first, k.stride(1), flat_v, v_first, v.stride(1), min(CHUNK, keys - first),
            masks, h * rows, first, out[chunk, b, h], lse[chunk, b, h],
        )  # fmt: skip

    _on_all_threads(work, batch * kv_heads * chunks)
    merged, total = _merged(outs[..., :rows, :], lses[..., :rows])
    return unpacked(merged, tokens), total.reshape(batch, heads, tokens)


def packed(q: Tensor, kv_heads: int) -> Tensor:
    """``[B, Hkv, G * Tq, D]`` of q ``[B, Tq, H, D]``: the queries of a KV head, in the order of ``[H, Tq]``."""
    batch, tokens, heads, dim = q.shape
    return q.transpose(1, 2).reshape(batch, kv_heads, heads // kv_heads * tokens, dim)


def unpacked(out: Tensor, tokens: int) -> Tensor:
    """``[B, Tq, H, Dv]`` of what :func:`packed` queries gave."""
    return out.reshape(out.shape[0], -1, tokens, out.shape[-1]).transpose(1, 2)


def two_products(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`one_pass` in the dtype of the inputs, by PyTorch alone, with the scores in memory: they are few."""
    batch, tokens, heads, _ = q.shape
    scores = packed(q, k.shape[2]) @ k.permute(0, 2, 3, 1)
    scores *= scale
    if mask is not None:
        scores = scores.view(batch, heads, tokens, -1).add_(mask).view_as(scores)
    lse = scores.logsumexp(-1)
    scores.sub_(lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp_()
    return unpacked(scores @ v.transpose(1, 2), tokens), lse.view(batch, heads, tokens)


def _flat(x: Tensor) -> np.ndarray:
    """The memory that ``x`` spans, from its first element on, as NumPy sees it; bf16 as uint16."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    flat = x.detach().as_strided((extent,), (1,))
    return (flat.view(torch.uint16) if x.dtype == torch.bfloat16 else flat).numpy()


def _merged(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Of the partials along the first dim one."""
    if len(lses) == 1:
        return outs[0], lses[0]
    top = lses.amax(0)
    weights = (lses - top.masked_fill(top == -torch.inf, 0.0)).exp_()
    total = weights.sum(0)
    # Divided by their sum: exp(lses - lse) would not add up to 1 where lse is large, and so rounded.
    shares = weights / total.masked_fill(total == 0.0, 1.0)
    return (shares.unsqueeze(-1) * outs).sum(0), top + total.log()


def _on_all_threads(work: Callable[[int], None], items: int) -> None:
    """``work(0), ..., work(items - 1)``, on this thread and others, each taking the next until none is left."""
    numbers = count()

    def take() -> None:
        while (item := next(numbers)) < items:
            work(item)

    helpers = [_pool().submit(take) for _ in range(min(torch.get_num_threads(), items) - 1)]
    take()
    for helper in helpers:  # one that has not begun by now has nothing left to do
        if not helper.cancel():
            helper.result()


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads that wait for work: starting some for each call takes as long as a short call."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="seqpar-few-queries")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of them
