"""How busy a model and its attention worker are, with one batch and with two in rotation."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from measuring import median
from offload_attention import busy
from offload_setting import Size, decode, llama, set_context

from seqpar.integrations import huggingface
from seqpar.offload import Turns, Workers

SIZE = Size(hidden=2048, intermediate=8192, layers=2, heads=(16, 4))
BALANCED, ATTEMPTS = 0.1, 5
MOST = 32_768


class Rotation:
    """Batches of one model, each with connections and a thread of its own, which take turns."""

    def __init__(self, model: Any, turns: Turns, workers: Sequence[Workers], rows: int, capacity: int) -> None:
        """``workers``: the connections of each batch, which has ``rows``."""
        self.model, self.rows, self.turns, self.workers = model, rows, turns, list(workers)
        with self.turns.mine():
            self.generations = [
                huggingface.offloaded_cache(model, each, capacity=capacity, batch=rows) for each in self.workers
            ]

    @classmethod
    def of(cls, model: Any, address: str, *, batches: int, rows: int, capacity: int) -> Rotation:
        """With connections to the worker at ``address``."""
        turns = Turns()
        with turns.mine():
            workers = [Workers.join(address, turns=turns) for _ in range(batches)]
        return cls(model, turns, workers, rows, capacity)

    def set_context(self, tokens: int) -> None:
        """Texts of so many tokens, made up."""
        with self.turns.mine():
            for generation in self.generations:
                set_context(generation, tokens)

    def run(self, steps: int) -> dict[str, float]:
        """So many steps of every batch: how long, and for how long the model and the worker were busy."""
        start = threading.Barrier(len(self.generations) + 1)

        def one(generation: Any) -> None:
            torch.set_num_threads(1)  # each thread has its own number
            start.wait()
            with self.turns.mine():
                decode(self.model, generation, steps)

        with ThreadPoolExecutor(len(self.generations)) as pool:
            with self.turns.mine():
                worker = busy(self.workers[0])
            model = self.turns.busy
            runs = [pool.submit(one, generation) for generation in self.generations]
            start.wait()
            begin = time.perf_counter()
            for run in runs:
                run.result()
            took = time.perf_counter() - begin
            model = self.turns.busy - model
            with self.turns.mine():
                worker = busy(self.workers[0]) - worker
        return {"seconds": took, "model": model, "worker": worker}

    def close(self) -> None:
        """Free what workers keep."""
        with self.turns.mine():
            for generation, workers in zip(self.generations, self.workers, strict=True):
                generation.release()
                workers.close()


def balanced(rotation: Rotation, context: int, steps: int) -> int:
    """The context at which model and worker, in rotation, are busy for as long, within :data:`BALANCED`."""
    for _ in range(ATTEMPTS):
        rotation.set_context(context)
        rotation.run(1)
        runs = [rotation.run(max(1, steps // 4)) for _ in range(3)]
        ratio = median([run["model"] / run["worker"] for run in runs])
        if abs(ratio - 1) <= BALANCED / 2:
            return context
        context = max(64, min(MOST, int(context * ratio)))
    return context


def rotation(
    address: str, *, size: Size = SIZE, rows: int = 4, context: int = 8192, steps: int = 16, runs: int = 3
) -> list[dict[str, object]]:  # fmt: skip
    """One batch, one of twice as many rows, and two in rotation, in turn; model and worker have a thread each."""
    torch.set_num_threads(1)
    model, capacity = llama(size), MOST + steps + 1
    two = Rotation.of(model, address, batches=2, rows=rows, capacity=capacity)
    context = balanced(two, context, steps)
    contenders = {
        f"1 batch of {rows}": Rotation.of(model, address, batches=1, rows=rows, capacity=capacity),
        f"1 batch of {2 * rows}": Rotation.of(model, address, batches=1, rows=2 * rows, capacity=capacity),
        f"2 batches of {rows} in rotation": two,
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for turn in range(runs + 1):
        for name, each in contenders.items():
            each.set_context(context)
            result = each.run(steps if turn else 1)
            if turn:
                found[name].append(result)
    for each in contenders.values():
        each.close()
    rows_of = {name: len(each.generations) * each.rows for name, each in contenders.items()}
    speeds = {name: [steps * rows_of[name] / x["seconds"] for x in results] for name, results in found.items()}
    first = next(iter(speeds.values()))
    return [
        {
            "batches": name, "context": context, "tokens/s": median(speeds[name]),
            "of 1 batch's": median([a / b for a, b in zip(speeds[name], first, strict=True)]),
            **{f"{x} busy, %": 100 * median([run[x] / run["seconds"] for run in results]) for x in ("model", "worker")},
            "model / worker": median([x["model"] / x["worker"] for x in results]),
        }
        for name, results in found.items()
    ]  # fmt: skip
