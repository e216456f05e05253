"""What the benchmarks share: ranks that take turns, medians, a table, and results that say where they come from."""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from seqpar.comm import World, connect

RESULTS = Path(__file__).parent / "results"
Iteration = Callable[[], Any]
Setup = Callable[..., Iteration]


class Team:
    """Processes that run one iteration of something whenever told to, all at once; idle in between."""

    def __init__(self, ranks: int, threads: int, setup: Setup, *args: Any) -> None:
        """``setup(world, *args)`` runs once on each rank and returns what is timed."""
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            arguments = (theirs, f"file://{self._folder.name}/rendezvous", rank, ranks, threads, setup, args)
            process = context.Process(target=_member, args=arguments, daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self) -> tuple[float, list[Any]]:
        """One iteration: the slowest rank's seconds, and what each rank returned."""
        for pipe in self._pipes:
            pipe.send("run")
        answers = [pipe.recv() for pipe in self._pipes]
        return max(seconds for seconds, _ in answers), [result for _, result in answers]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send("end")
        for process in self._processes:
            process.join(timeout=10)
            process.kill()
        self._folder.cleanup()


@contextmanager
def teams(**members: Team) -> Iterator[dict[str, Team]]:
    """Teams that end with the block."""
    try:
        yield members
    finally:
        for team in members.values():
            team.close()


def in_turn(members: Mapping[str, Team], runs: int) -> dict[str, list[float]]:
    """Seconds of ``runs`` iterations of each team after one warm-up, A B A B ..., so that drift meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in members}
    for turn in range(runs + 1):
        for name, team in members.items():
            elapsed, _ = team.run()
            if turn:
                seconds[name].append(elapsed)
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def gpu_in_turn(calls: Mapping[str, Iteration], runs: int) -> dict[str, list[float]]:
    """Seconds that the GPU takes for ``runs`` calls of each after one warm-up, A B A B ....

    Before each, a gigabyte is overwritten: no input is in the L2 cache, and while the GPU is busy Python gets ahead, so
    that what it takes to launch a kernel does not count.
    """
    cold = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for turn in range(runs + 1):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cold.zero_()
            begin.record()
            call()
            end.record()
            if turn:
                events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) / 1e3 for begin, end in pairs] for name, pairs in events.items()}


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def machine() -> dict[str, object]:
    """Where a figure comes from."""
    model = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        model = next(
            (x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), model
        )
    return {
        "date": date.today().isoformat(),
        "cpu": f"{model}, {multiprocessing.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def show(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print a table."""
    table = Table(title=title)
    for column, value in rows[0].items():
        table.add_column(column, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        values = (row[column] for column in rows[0])
        table.add_row(*(f"{x:.3f}" if isinstance(x, float) else str(x) for x in values))
    Console(width=140).print(table)


def write(name: str, tables: Mapping[str, object], folder: Path = RESULTS) -> None:
    """Keep the figures, with the command, machine and date, in ``<folder>/<name>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"command": command(), **machine(), **tables}, indent=1) + "\n")


def command() -> str:
    """This run's, from the repository's root."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def _member(pipe: Connection, rendezvous: str, rank: int, ranks: int, threads: int, setup: Setup, args: tuple) -> None:
    torch.set_num_threads(threads)
    world: World = connect(None)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
        world = connect(dist.group.WORLD)
    iteration = setup(world, *args)
    while pipe.recv() == "run":
        if ranks > 1:
            dist.barrier()
        begin = time.perf_counter()
        result = iteration()
        pipe.send((time.perf_counter() - begin, result))
    if ranks > 1:
        dist.destroy_process_group()
