"""One token's attention on a worker, over many keys, against a copy of as many bytes and against a local cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import median
from offload_setting import DIM, HEADS, fill, in_turn, new_tokens, over

import seqpar
from seqpar.kernels import kernel_named
from seqpar.offload import OffloadedCache, Workers
from seqpar.stores import Appended

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@torch.inference_mode()
def attention(address: str, keys: int, runs: int, threads: int, dtype: torch.dtype) -> dict[str, object]:
    """A row of the table; the worker at ``address`` has as many threads.

    ``worker's attention`` is the :meth:`Shard.attend` that a worker's session calls, in this process; ``offloaded`` and
    ``local`` are whole calls of a cache, which append a token; ``of it the worker's`` is what the worker says it
    computed in the offloaded one.
    """
    torch.set_num_threads(threads)
    about: dict[str, Any] = {"heads": HEADS, "head_dim": DIM, "capacity": keys + 2 * (runs + 1), "dtype": dtype}
    with Workers.join(address) as workers:
        here, there = (
            seqpar.KVCache(seqpar.Causal(), **about), OffloadedCache(seqpar.Causal(), workers=workers, **about)
        )  # fmt: skip
        for cache in (here, there):
            fill(cache, keys)
        computed = list[float]()

        def offloaded() -> float:
            inputs, before = new_tokens(1, dtype), busy(workers)
            begin = time.perf_counter()
            there.attend(*inputs)
            took = time.perf_counter() - begin
            computed.append(busy(workers) - before)
            return took

        calls = contenders(here, keys, dtype)
        seconds = in_turn({**calls, "offloaded": offloaded}, runs)
        there.release()
    size = keys * HEADS[1] * 2 * DIM * dtype.itemsize
    copy = [x * size / here.resident_bytes for x in seconds["copy"]]  # it has room for a few tokens more
    ratios = {f"{name} / copy": over(copy, seconds[name]) for name in ("flash", "worker's attention", "offloaded")}
    return {
        "KV": str(dtype).removeprefix("torch."), "threads": threads, "copy, GB/s": size / median(copy) / 1e9, **ratios,
        "local, ms": median(seconds["local"]) * 1e3, "offloaded, ms": median(seconds["offloaded"]) * 1e3,
        "of it the worker's, ms": median(computed[1:]) * 1e3,
        "offloaded / local": over(seconds["offloaded"], seconds["local"]),
    }  # fmt: skip


def contenders(cache: seqpar.KVCache, keys: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is measured in this process, over the memory of one cache."""
    shard: Any = cache._shard
    memory = shard.k[0], shard.v[0]  # [1, rows, 1, D], a head's rows next to each other
    rooms = [torch.empty_like(x) for x in memory]
    q = new_tokens(1, dtype)[0]
    k, v = (x.view(1, HEADS[1], -1, DIM)[:, :, :keys] for x in memory)
    step, kernel = shard.rooms.step((Appended(keys + 1, 1),), 1), kernel_named("auto")
    return {
        "copy": lambda: [room.copy_(x) for room, x in zip(rooms, memory, strict=True)],
        "flash": lambda: _flash(q.transpose(1, 2), k, v, 0.0, False, scale=DIM**-0.5),
        "worker's attention": lambda: shard.attend(0, step, q, scale=DIM**-0.5, kernel=kernel, among="old"),
        "local": lambda: cache.attend(*new_tokens(1, dtype)),
    }


def busy(workers: Workers) -> float:
    """Seconds for which the worker has computed attention so far."""
    (member,) = workers.alive.values()
    return float(workers.status_of(member)["busy"])
