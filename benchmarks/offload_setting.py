"""What the benchmarks of attention offload share: a worker in a process of its own, a model, made-up contexts."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, command, machine, median, write
from torch import Tensor

import seqpar
from seqpar.kernels import kernel_named
from seqpar.offload import OffloadedCache, Worker
from seqpar.offload.meeting import host_store

HEADS, DIM = (32, 8), 128  # of single attention calls
AT_ONCE = 1 << 20  # bytes of keys and values that are appended at a time while a context is made up


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Llama, with random weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: tuple[int, int]
    vocabulary: int = 1024

    def weights_bytes(self, itemsize: int) -> int:
        """Of all weights but those of norms."""
        kv = self.hidden * self.heads[1] // self.heads[0]
        layer = self.hidden * (2 * (self.hidden + kv) + 3 * self.intermediate)
        return (self.layers * layer + 2 * self.vocabulary * self.hidden) * itemsize

    def kv_bytes(self, itemsize: int) -> int:
        """Of a token, in all layers."""
        return 2 * self.layers * self.heads[1] * (self.hidden // self.heads[0]) * itemsize


def llama(size: Size, dtype: torch.dtype = torch.float32) -> Any:
    """The model, with seqpar's attention."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from seqpar.integrations import huggingface

    huggingface.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
        num_attention_heads=size.heads[0], num_key_value_heads=size.heads[1], vocab_size=size.vocabulary,
        max_position_embeddings=1 << 20, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=huggingface.NAME, dtype=dtype).eval()


@contextmanager
def worker(memory: int, threads: int) -> Iterator[str]:
    """A worker with so many bytes and threads, in a process of its own; the address of its store."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, memory, threads), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def _serve(pipe: Connection, memory: int, threads: int) -> None:
    torch.set_num_threads(threads)
    with host_store("127.0.0.1:0") as hosted:
        serving = Worker(hosted.store, memory=memory, threads=threads)
        pipe.send(hosted.address)
        serving.run()


def fill(cache: seqpar.KVCache, tokens: int) -> None:
    """Append random keys and values to all layers and rows, the same ones over and over, without attending to any."""
    dims, dtype = cache._head_dim, cache._dtype
    step = max(1, AT_ONCE // (cache.batch * cache.kv_heads * sum(dims) * dtype.itemsize))
    shapes = [(1, min(step, tokens), cache.kv_heads, dim) for dim in dims]
    k, v = (torch.randn(shape, dtype=dtype).expand(cache.batch, -1, -1, -1) for shape in shapes)
    for first in range(0, tokens, step):
        count = min(step, tokens - first)
        for layer in range(cache.layers):
            cache._append(
                None, k[:, :count], v[:, :count], layer, [count] * cache.batch, None, None, kernel_named("auto")
            )  # fmt: skip
        if isinstance(cache, OffloadedCache):  # what has not left yet takes memory here
            for member in cache._workers.alive.values():
                member.channel.flush()


def set_context(generation: Any, tokens: int) -> None:
    """Give a cache of transformers' ``generate`` a text of so many tokens, made up by :func:`fill`, or cut short."""
    for cache in generation.caches.values():
        if cache.length > tokens:
            cache.truncate(tokens)
        elif cache.length < tokens:
            fill(cache, tokens - cache.length)
    generation._seen = tokens


def decode(model: Any, generation: Any, steps: int) -> None:
    """So many greedy steps, of all rows."""
    prompt = torch.zeros(generation.batch, generation._seen + 1, dtype=torch.int64)
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, past_key_values=generation, max_new_tokens=steps, do_sample=False)


def new_tokens(count: int, dtype: torch.dtype) -> list[Tensor]:
    """q ``[1, T, H, D]``, and k and v ``[1, T, Hkv, D]``."""
    return [torch.randn(1, count, heads, DIM).to(dtype) for heads in (HEADS[0], HEADS[1], HEADS[1])]


def in_turn(calls: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of ``runs`` calls of each after one to warm up, A B A B ..., so that drift meets all alike.

    A call that returns a float has measured itself, and says its seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(runs + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            said = call()
            took = time.perf_counter() - begin
            if turn:
                seconds[name].append(said if isinstance(said, float) else took)
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def over(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of a turn's ratio."""
    return median([a / b for a, b in zip(above, below, strict=True)])


def keep(part: str, tables: Mapping[str, object], folder: Path = RESULTS) -> None:
    """Write a part's tables, with its own command, date and machine, beside those of other parts."""
    path = folder / "offload.json"
    before = json.loads(path.read_text())["parts"] if path.exists() else {}
    about = {"command": command(), **machine()}
    write("offload", {"parts": {**before, part: {**about, **tables}}}, folder)
