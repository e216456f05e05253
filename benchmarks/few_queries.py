"""One token's attention on the CPU against a copy of the same K and V: ``python benchmarks/few_queries.py``.

Everything is in one process, in turn: a plain copy of K and V, PyTorch's flash kernel on the heads as they are and with
a KV head's query heads packed as tokens, ours without Numba, and ours. Ratios are of one turn, and their median is
shown: KV bytes per second of attention, of those that the copy moves (it also writes them: reading alone is faster). On
a machine that others use, the best turn of each tells more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from unittest.mock import patch

import torch
import tyro
from measuring import median, show, write
from torch import Tensor

from seqpar.kernels import Intervals, few_queries_cpu, kernel_named

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    keys: int = 65_536
    """Keys in the cache."""
    heads: tuple[int, int] = (32, 8)
    """Query heads and KV heads."""
    dim: int = 128
    """Of a head."""
    queries: int = 1
    """Query tokens."""
    threads: tuple[int, ...] = (1, 2)
    """PyTorch's threads, one table row each."""
    runs: int = 15
    """Turns, after one to warm up."""


def contenders(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """By name; q ``[1, Tq, H, D]``, k and v ``[1, T, Hkv, D]`` with each KV head's rows next to each other."""
    tokens, keys = q.shape[1], k.shape[1]
    room = torch.empty_like(k), torch.empty_like(v)
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    rows = few_queries_cpu.packed(q, k.shape[2])
    seen = Intervals(*(torch.full((1, 1, tokens), n, dtype=torch.int32) for n in (0, keys)))
    kernel, scale = kernel_named("cpu"), q.shape[-1] ** -0.5

    def without_numba() -> object:
        with patch.object(few_queries_cpu, "has_numba", lambda: False):
            return kernel.forward(q, k, v, seen, scale, None)

    return {
        "copy": lambda: [to.copy_(x) for to, x in zip(room, (k, v), strict=True)],
        "ours": lambda: kernel.forward(q, k, v, seen, scale, None),
        "flash, packed": lambda: _flash(rows, key, value, 0.0, False, scale=scale),
        "ours, PyTorch alone": without_numba,
        "flash": lambda: _flash(query, key, value, 0.0, False, scale=scale),
    }


def errors(q: Tensor, k: Tensor, v: Tensor, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Relative, against fp64."""
    scores = few_queries_cpu.packed(q.double(), k.shape[2]) @ k.permute(0, 2, 3, 1).double() * q.shape[-1] ** -0.5
    want = few_queries_cpu.unpacked(scores.softmax(-1) @ v.transpose(1, 2).double(), q.shape[1])
    flash = calls["flash"]()[0].transpose(1, 2)  # type: ignore[index]
    ours = calls["ours"]().out  # type: ignore[attr-defined]
    return {name: float((x - want).norm() / want.norm()) for name, x in (("flash", flash), ("ours", ours))}


def measure(options: Options, dtype: torch.dtype, threads: int) -> dict[str, object]:
    """A row of the table."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads = options.heads
    q = torch.randn(1, options.queries, heads, options.dim, generator=generator).to(dtype)
    k, v = (
        torch.randn(1, kv_heads, options.keys, options.dim, generator=generator).to(dtype).transpose(1, 2)
        for _ in range(2)
    )
    calls, name_of_dtype = contenders(q, k, v), str(dtype).removeprefix("torch.")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(options.runs + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    size = k.nbytes + v.nbytes
    ratios = {
        f"{name} / copy": median([a / b for a, b in zip(seconds["copy"], values, strict=True)])
        for name, values in seconds.items()
        if name != "copy"
    }
    best = min(seconds["copy"]) / min(seconds["ours"])
    return {
        "KV": name_of_dtype, "threads": threads, "MB": size / 1e6, "copy ms": median(seconds["copy"]) * 1e3,
        "ours ms": median(seconds["ours"]) * 1e3, "ours GB/s": size / median(seconds["ours"]) / 1e9, **ratios,
        "ours / copy, best of each": best,
        **{f"error of {name}": f"{value:.1e}" for name, value in errors(q, k, v, calls).items()},
    }  # fmt: skip


def main() -> None:
    """Each dtype on each number of threads."""
    options = tyro.cli(Options, description=__doc__)
    begin = time.perf_counter()
    for dtype in (torch.bfloat16, torch.float32):
        few_queries_cpu.compile_ahead(dtype, few_queries_cpu.WORTH)
    compiling = time.perf_counter() - begin
    with torch.no_grad():
        rows = [measure(options, dtype, n) for dtype in (torch.bfloat16, torch.float32) for n in options.threads]
    heads = f"{options.heads[0]}/{options.heads[1]} heads x {options.dim}"
    title = f"{options.queries} token over {options.keys:,} keys, {heads}: KV bytes/s of the copy's"
    show(title, rows)
    print(f"compiling both, once per process: {compiling:.1f} s; Numba: {few_queries_cpu.has_numba()}")
    write("few_queries", {title: rows, "seconds to compile": compiling})


if __name__ == "__main__":
    main()
