"""One kernel against the dense oracle, block by block, as rings call it: forward with carry, backward of each alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.kernels import Intervals, Kernel, OutputGradient

from .oracle import dense_attention, error

BATCH, QUERIES, BLOCKS = 2, 37, (23, 1, 41)


@dataclass(frozen=True)
class Shape:
    """Heads and head dims of q and v."""

    heads: int = 2
    kv_heads: int = 2
    dim: int = 8
    value_dim: int = 8


SHAPES = {
    "mha": Shape(),
    "gqa": Shape(heads=6, kv_heads=2),
    "mqa": Shape(heads=3, kv_heads=1),
    "narrow_v": Shape(value_dim=5),
    "wide_v": Shape(heads=4, dim=6, value_dim=11),
    "odd": Shape(dim=7, value_dim=7),
}
ROWS = {
    "shared": (False, ""),
    "per_batch": (True, ""),
    "per_head": (False, "heads"),
    "per_kv_head": (False, "kv_heads"),
    "per_both": (True, "heads"),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_intervals(
    shape: Shape, rows: str, keys: int, seed: int, queries: int = QUERIES, batch: int = BATCH
) -> Intervals:
    """Both bounds non-decreasing, ragged, many rows empty, some of them in the middle."""
    per_batch, per_head = ROWS[rows]
    size = batch if per_batch else 1, getattr(shape, per_head) if per_head else 1, queries
    start, end = (torch.randint(-5, keys + 3, size, generator=generator(seed + i)) for i in range(2))
    start, end = (bound.clamp(0, keys).sort(-1).values.to(torch.int32) for bound in (start, end))
    return Intervals(start, torch.maximum(start, end))


def pairs(intervals: Intervals, keys: int) -> Tensor:
    """bool ``[B|1, H|1, Tq, keys]``."""
    key = torch.arange(keys)
    return (key >= intervals.start.unsqueeze(-1)) & (key < intervals.end.unsqueeze(-1))


def oracle(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention under a mask per head: ``seen [B|1, G, Tq, Tk]``, each for H/G neighbours."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).split(1, 2) for x in (k, v))
    seen = seen.repeat_interleave(q.shape[2] // seen.shape[1], 1).unbind(1)
    heads = [dense_attention(*one, scale=scale) for one in zip(q.split(1, 2), k, v, seen, strict=True)]
    return torch.cat([out for out, _ in heads], 2), torch.cat([lse for _, lse in heads], 1)


def assert_exact(got: Tensor, expected: Tensor, bound: float) -> None:
    assert torch.equal(got == -torch.inf, expected == -torch.inf)
    assert error(got, expected) <= bound


def run_blocks(
    backend: Kernel,
    dtype: torch.dtype,
    shape: Shape,
    blocks: list[Intervals],
    sizes: tuple[int, ...],
    bound: float,
    grads: str,
    scale: float = 0.4,
    batch: int = BATCH,
    device: str = "cpu",
) -> None:
    """Blocks of keys one after another with carry, and each block's backward alone, against all keys at once."""
    g, queries = generator(7), blocks[0].start.shape[-1]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(device, dtype)

    q = normal(batch, queries, shape.heads, shape.dim)
    k = [normal(batch, n, shape.kv_heads, shape.dim) for n in sizes]
    v = [normal(batch, n, shape.kv_heads, shape.value_dim) for n in sizes]
    dout = normal(batch, queries, shape.heads, shape.value_dim) * (grads != "dlse")
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    dlse = None if grads == "dout" else normal(batch, shape.heads, queries).to(accumulator)
    before = [x.clone() for x in (q, dout, *k, *v)]

    partial = None
    for keys, values, intervals in zip(k, v, blocks, strict=True):
        partial = backend.forward(q, keys, values, intervals, scale, partial)
    assert partial.out.dtype == partial.lse.dtype == accumulator
    grad = OutputGradient(partial.out.to(dtype), partial.lse, dout, dlse)
    # Gradients are added to what is there.
    dq, *dkv = already = [torch.full(x.shape, 0.5, dtype=accumulator, device=device) for x in (q, *k, *v)]
    for i, intervals in enumerate(blocks):
        backend.backward(grad, q, k[i], v[i], intervals, scale, dq, dkv[i], dkv[len(blocks) + i])
    assert all(torch.equal(x, y) for x, y in zip((q, dout, *k, *v), before, strict=True)), "inputs are left alone"

    leaves = [x.double().requires_grad_() for x in (q, torch.cat(k, 1), torch.cat(v, 1))]
    seen = [
        pairs(intervals, n).repeat_interleave(shape.heads // intervals.start.shape[1], 1).expand(batch, -1, -1, -1)
        for intervals, n in zip(blocks, sizes, strict=True)
    ]
    out, lse = oracle(*leaves, torch.cat(seen, -1).to(device), scale)
    objective = (out * dout.double()).sum()
    if dlse is not None:
        objective = objective + (lse * dlse)[lse.isfinite()].sum()
    expected = torch.autograd.grad(objective, leaves)
    assert_exact(partial.out, out.detach(), bound)
    assert_exact(partial.lse, lse.detach(), bound)
    got = [x - 0.5 for x in already]
    got = [got[0], torch.cat(got[1 : 1 + len(k)], 1), torch.cat(got[1 + len(k) :], 1)]
    for x, y in zip(got, expected, strict=True):
        assert_exact(x, y, bound)
