"""The largest batch under a limit on a model rank's memory, with its cache there and on a worker, and the throughput.

Each try is a process of its own whose data segment the system limits (RLIMIT_DATA): a batch is too large where memory
is refused, by the system to the model rank or by the worker to the cache, or where the process is killed by it.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import median
from offload_rotation import Rotation
from offload_setting import Size, decode, llama, set_context

from seqpar.integrations import huggingface
from seqpar.kernels.few_queries_cpu import WORTH, one_pass
from seqpar.offload import Turns, Workers
from seqpar.offload.placement import NoRoom

SIZE = Size(hidden=1024, intermediate=4096, layers=8, heads=(16, 4))
CONTEXTS = (1024, 4096, 16_384)


@dataclass(frozen=True, kw_only=True)
class Try:
    """A batch to decode."""

    size: Size
    cap: int
    """Bytes of data that the model rank may have besides what its imports take."""
    context: int
    steps: int
    runs: int
    threads: int
    address: str | None
    """Of the worker that has the cache; None: the model rank has it."""
    batches: int = 1
    """In rotation."""

    @property
    def capacity(self) -> int:
        """Tokens of a row that there must be room for."""
        return self.context + self.steps + 1


class Outcome(NamedTuple):
    """Of a try: who had no room left, or nobody and tokens per second."""

    full: str = ""
    speed: float = 0.0


def attempt(what: Try, rows: int) -> Outcome:
    """Decode ``rows`` texts in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["seqpar", "transformers.models.llama.modeling_llama"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_process, args=(theirs, what, rows), daemon=True)
    process.start()
    theirs.close()
    try:
        found = ours.recv()
        process.join(10)
    except EOFError:
        process.join(10)
        found = Outcome("model rank") if (process.exitcode or 0) < 0 else f"exit code {process.exitcode}"
    finally:
        process.kill()
    if isinstance(found, str):
        raise RuntimeError(f"a batch of {rows}: {found}")
    print(f"{what.context} tokens, {rows} rows: {found}", file=sys.stderr, flush=True)
    return found


def largest(what: Try, guess: int) -> tuple[int, Outcome, str]:
    """The largest batch, what came of it, and who had no room for one more; by trying, from ``guess`` on."""
    low, high, best, full = 0, 0, Outcome(), ""
    rows = max(1, guess)
    while not high or high - low > 1:
        found = attempt(what, rows)
        if found.full:
            high, full = rows, found.full
        else:
            low, best = rows, found
        rows = (low + high) // 2 if high else low + 1
    return low, best, full


def _process(pipe: Connection, what: Try, rows: int) -> None:
    torch.set_num_threads(what.threads)
    try:
        found: Outcome | str = Outcome(speed=_offloaded(what, rows) if what.address else _here(what, rows))
    except NoRoom:
        found = Outcome("worker")
    except Exception as error:
        memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        found = Outcome("model rank") if memory else f"{type(error).__name__}: {error}"
    pipe.send(found)


def limit(cap: int) -> None:
    """Let this process have ``cap`` more bytes of data than now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + cap, now + cap))


def _here(what: Try, rows: int) -> float:
    """Tokens per second, the median of several runs of some steps."""
    # Neither the compiler's memory nor the stacks of threads are what is asked.
    keys = torch.zeros(1, WORTH // 8, 1, 8)
    one_pass(keys[:, :1], keys, keys, 1.0, None)
    keys.add_(1.0)
    del keys
    limit(what.cap)
    model, speeds = llama(what.size), []
    cache = huggingface.sharded_cache(model, capacity=what.capacity, batch=rows)
    for turn in range(what.runs + 1):
        set_context(cache, what.context)
        begin = time.perf_counter()
        decode(model, cache, what.steps if turn else 1)
        speeds.append(rows * what.steps / (time.perf_counter() - begin))
    return median(speeds[1:])


def _offloaded(what: Try, rows: int) -> float:
    """Likewise. Connections are made before memory is limited: their threads' stacks are large, but hardly used."""
    assert what.address is not None, "of a worker"
    _until_free(what.address)
    turns = Turns()
    with turns.mine():
        workers = [Workers.join(what.address, turns=turns) for _ in range(what.batches)]
    limit(what.cap)
    rotation, speeds = Rotation(llama(what.size), turns, workers, rows // what.batches, what.capacity), []
    for turn in range(what.runs + 1):
        rotation.set_context(what.context)
        speeds.append(rows * what.steps / rotation.run(what.steps if turn else 1)["seconds"])
    rotation.close()
    return median(speeds[1:])


def _until_free(address: str) -> None:
    """Until the worker has freed what a try before had there."""
    with Workers.join(address) as workers:
        (member,) = workers.alive.values()
        end = time.monotonic() + 10
        while shards := int(workers.status_of(member)["shards"]):
            if time.monotonic() > end:
                raise ValueError(f"worker: got {shards} shards of others, expected none; it is not only ours")
            time.sleep(0.05)


def batches(
    address: str, memory: int, *, size: Size = SIZE, cap: int = 640 << 20, contexts: tuple[int, ...] = CONTEXTS,
    steps: int = 8, runs: int = 3,
) -> list[dict[str, object]]:  # fmt: skip
    """A row for each context; the worker at ``address`` has ``memory`` bytes and one thread."""
    rows: list[dict[str, object]] = []
    for context in contexts:
        about: dict[str, Any] = {"size": size, "cap": cap, "context": context, "steps": steps, "runs": runs}
        here = Try(**about, threads=1, address=None)
        text = here.capacity * size.kv_bytes(4)
        few, one, full = largest(here, max(0, cap - size.weights_bytes(4)) // text)
        both = attempt(Try(**about, threads=2, address=None), few) if few else Outcome()
        there = Try(**about, threads=1, address=address)
        many, offloaded, full_there = largest(there, memory // text)
        turning = attempt(Try(**about, threads=1, address=address, batches=2), many // 2 * 2)
        fastest = max(one.speed, both.speed)
        rows.append(
            {
                "context": context, "rows here": few, "full": full, "tokens/s": one.speed, "2 threads": both.speed,
                "rows on a worker": many, "full there": full_there, "tokens/s offloaded": offloaded.speed,
                "in rotation": turning.speed, "gain": turning.speed / fastest if fastest else "none fits here",
            }
        )  # fmt: skip
    return rows
