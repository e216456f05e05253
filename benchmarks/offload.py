"""Attention on workers in processes of their own: ``python benchmarks/offload.py``, parts of it by ``--parts``.

- ``attention``: one token over many keys: KV bytes per second of what a worker computes and of a whole call over gloo,
  against a plain copy of as many bytes; and the time of a call against a local cache with as many threads.
- ``rotation``: how busy the model and its worker are with one batch and with two in turn, where both take as long.
- ``batches``: the largest batch under a limit on the model rank's memory, with its cache there and on a worker.
- ``overlap``: keys that come later than queries, where these went ahead; and a prompt whose keys stream to a worker.

What is compared is measured in turn. Contexts are made up: keys and values are random, and written without attending to
what went before. Each part is kept with its command and date, beside the others. Needs ``pip install -e .[hf]``, two
cores, and about 10 GB of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from measuring import show
from offload_attention import attention
from offload_batches import CONTEXTS, batches
from offload_overlap import late_keys, prompt
from offload_rotation import rotation
from offload_setting import DIM, HEADS, keep, worker

Part = Literal["attention", "rotation", "batches", "overlap"]
MEMORY = 12 << 30  # of a worker, where it is not what is asked


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    parts: tuple[Part, ...] = ("attention", "rotation", "batches", "overlap")
    """Which parts."""
    keys: int = 65_536
    """Keys that a token attends to in ``attention``; a quarter of them in ``overlap``."""
    threads: tuple[int, ...] = (1, 2)
    """Of a worker, and of what it is compared with, in ``attention``."""
    runs: int = 9
    """Turns of each contender in ``attention`` and ``overlap``, after one to warm up; elsewhere a third of them."""
    steps: int = 16
    """Tokens that each row generates in a turn of ``rotation``; half of them in ``batches``."""
    cap: int = 640
    """MiB of data that the model rank may have in ``batches``, with the weights and besides imports."""
    memory: int = 4096
    """MiB for keys and values that the worker has in ``batches``."""
    contexts: tuple[int, ...] = CONTEXTS
    """Tokens of each row in ``batches``."""


def tables_of(part: Part, options: Options) -> dict[str, list[dict[str, object]]]:
    """A part's tables, by title."""
    few = max(1, options.runs // 3)
    if part == "attention":
        rows = []
        for threads in options.threads:
            with worker(MEMORY, threads) as address:
                for dtype in (torch.bfloat16, torch.float32):
                    rows.append(attention(address, options.keys, options.runs, threads, dtype))
        return {f"1 token over {options.keys:,} keys, {HEADS[0]}/{HEADS[1]} heads x {DIM}: KV bytes/s": rows}
    if part == "batches":
        with worker(options.memory << 20, 1) as address:
            rows = batches(
                address, options.memory << 20, cap=options.cap << 20, contexts=options.contexts,
                steps=options.steps // 2, runs=few,
            )  # fmt: skip
        return {f"batches: {options.cap} MiB on the model rank, {options.memory} MiB on a worker, 1 thread each": rows}
    with worker(MEMORY, 1) as address:
        if part == "rotation":
            return {"model and worker, 1 thread each": rotation(address, steps=options.steps, runs=few)}
        return {
            f"1 token over {options.keys // 4:,} keys, fp32": late_keys(address, options.keys // 4, options.runs),
            "a prompt": prompt(address, runs=few),
        }


def main() -> None:
    """Measure, show and keep each part."""
    options = tyro.cli(Options, description=__doc__)
    for part in options.parts:
        tables = tables_of(part, options)
        for title, rows in tables.items():
            show(title, rows)
        keep(part, tables)


if __name__ == "__main__":
    main()
