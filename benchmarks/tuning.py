"""Choose tiles for the GPU at hand, and rewrite its rows of ``kernels/triton/configurations.csv``.

Used by ``kernels.py --tune``. Processes that need no GPU compile candidates, many at once and ahead of this one, which
times on the GPU what they found worth it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from comparing import Bench, Clock, corners, fault, first_line
from contenders import Case
from measuring import device_name, median, show
from torch import Tensor

from seqpar.kernels import OutputGradient, kernel_named
from seqpar.kernels.triton import backward, configurations, few_queries, forward
from seqpar.kernels.triton.configurations import PRODUCTS, Row, Tiles
from seqpar.kernels.triton.launching import architecture
from seqpar.kernels.triton.offline import Compiled, compile_launch, compile_row

# Queries and keys in a tile that are tried, by kernel and bits; of `few`, the most queries.
SIZES: dict[tuple[str, int], tuple[tuple[int, ...], tuple[int, ...]]] = {
    ("forward", 16): ((64, 128), (32, 64, 128)),
    ("dq", 16): ((64, 128), (32, 64, 128)),
    ("dkv", 16): ((32, 64, 128), (64, 128)),
    ("dkv_atomic", 16): ((32, 64, 128), (64, 128)),
    ("few", 16): ((64,), (32, 64, 128)),
    ("forward", 32): ((32, 64), (16, 32, 64)),
    ("dq", 32): ((16, 32, 64), (16, 32)),
    ("dkv", 32): ((16, 32), (16, 32, 64)),
    ("dkv_atomic", 32): ((16, 32), (16, 32, 64)),
    ("few", 32): ((32,), (16, 32, 64)),
}
ORDER = ("forward", "dkv", "dq", "few", "dkv_atomic")  # what is tuned first, in case time runs out
LATENT = {192: (192, 128)}  # head dims of q and v on which a row is timed, where they are not its own
LENGTH = 8192
FINALISTS = 4


def candidates(row: Row) -> list[Tiles]:
    """What is tried for a row: the tiles it has, then others."""
    # Few queries read caches, whose unused rows may hold anything: the copy engine does not stop before them.
    engine = row.architecture in ("sm_90", "sm_100") and row.bits == 16 and row.kernel != "few"
    rows, keys = SIZES[row.kernel, row.bits]
    stages = (2, 3, 4) if row.head_dim <= 128 else (2, 3, 1)
    choices = product(rows, keys, (8, 4), stages, (True, False) if engine else (False,))
    others = (Tiles(*choice) for choice in choices)
    return list(dict.fromkeys([row.tiles, *(tiles for tiles in others if may_fit(row, tiles))]))


def may_fit(row: Row, tiles: Tiles) -> bool:
    """Whether what a program accumulates is no more than its registers: 255 for each of its threads."""
    dim, value_dim = LATENT.get(row.head_dim, (row.head_dim, row.head_dim))
    scores = tiles.rows * tiles.keys
    accumulated = {
        "forward": tiles.rows * value_dim + scores,
        "few": scores,
        "dq": tiles.rows * dim + 2 * scores,
        "dkv": tiles.keys * (dim + value_dim) + 2 * scores,
        "dkv_atomic": tiles.keys * (dim + value_dim) + 2 * scores,
    }
    return accumulated[row.kernel] <= 255 * 32 * tiles.warps


def may_ship(row: Row, compiled: Compiled | str) -> bool:
    """As CI has it: products as the GPU computes them fast, none serialised, no spills but a few of wide heads."""
    if isinstance(compiled, str) or compiled.serialised:
        return False
    fast = row.bits == 32 or row.kernel == "few" or compiled.products == PRODUCTS[row.architecture]
    return fast and compiled.spilled_bytes <= (0 if row.head_dim <= 128 else 64)


def variants(row: Row) -> Iterator[tuple[Row, dict[str, Any]]]:
    """What a row is used for, and how to compile it: itself first, then other inputs than those it is timed on."""
    dtype = torch.bfloat16 if row.bits == 16 else torch.float32
    yield row, {"dtype": dtype}
    yield row, {"dtype": dtype, "carries": False}
    if row.bits == 16:
        yield row, {"dtype": torch.float16}
    if row.tiles.descriptors:
        yield replace(row, tiles=replace(row.tiles, descriptors=False)), {"dtype": dtype}
    if row.head_dim == 128:
        yield from ((replace(row, head_dim=dim), {"dtype": dtype}) for dim in (80, 96))
    if row.head_dim in LATENT:
        yield row, {"dtype": dtype, "value_dim": LATENT[row.head_dim][1]}
    if row.kernel == "few":
        yield replace(row, tiles=replace(row.tiles, rows=16)), {"dtype": dtype}


class Problem:
    """What the candidates for a row are timed and checked on: causal attention, or that of 4 queries over many keys."""

    def __init__(self, row: Row, device: torch.device, length: int, make: Callable[..., Tensor] = torch.randn) -> None:
        """Of ``length`` tokens; with ``make=torch.empty`` it can be launched but not checked."""
        dim, value_dim = LATENT.get(row.head_dim, (row.head_dim, row.head_dim))
        dtype = torch.bfloat16 if row.bits == 16 else torch.float32
        case = Case(queries=length, keys=length, batch=2, kv_heads=8, dim=dim, value_dim=value_dim, dtype=dtype)
        if row.kernel == "few":
            case = replace(case, mask="full", queries=4, keys=16 * length, batch=1)
        inputs = q, k, v, dout = case.inputs(device, make)
        self.kernel, self.case, self._call = row.kernel, case, (q, k, v, case.intervals.to(device), case.scale)
        self._grads = [torch.empty(x.shape, dtype=torch.float32, device=device) for x in (q, k, v)]
        lse = torch.empty(case.batch, case.heads, case.queries, dtype=torch.float32, device=device)
        self._grad = OutputGradient(dout, lse, dout, None, lse)
        if make is not torch.empty:
            self._right = corners(case, inputs)
            partial = kernel_named("triton").forward(*self._call, None, final=True)
            self._grad = OutputGradient(partial.out, partial.lse, dout, None)
            self._grad.delta(backward.delta)

    def launch(self, tiles: Tiles) -> Callable[[], dict[str, Tensor]]:
        """A call with these tiles that gives its results by name; gradients are added to what is there."""
        (dq, dk, dv), call, grad = self._grads, self._call, self._grad

        def run() -> dict[str, Tensor]:
            if self.kernel in ("forward", "few"):
                attend = forward.forward if self.kernel == "forward" else few_queries.few_queries
                return {"out": attend(*call, None, final=True, tiles=tiles).out}
            if self.kernel == "dq":
                backward.add_dq(grad, *call, dq, tiles=tiles)
                return {"dq": dq}
            atomic = self.kernel == "dkv_atomic"
            backward.add_dkv(grad, *call, dk, dv, dq if atomic else None, tiles=tiles)
            return {"dk": dk, "dv": dv, **({"dq": dq} if atomic else {})}

        return run

    def fault(self, tiles: Tiles) -> str:
        """What is wrong with the results of these tiles, or what they raise; nothing where they are right."""
        for x in self._grads:
            x.zero_()
        try:
            return fault(self.case, self._right, self.launch(tiles)())
        except Exception as error:  # of compiling or launching: this candidate is out, and says why
            return first_line(error)


def examine(row: Row, cache: str, length: int = LENGTH) -> Compiled | str:
    """Compile a row without a GPU, and if it may ship, what :class:`Problem` launches of it into the folder ``cache``.

    Returns its own compilation, or the first of a variant that may not ship. What is raised comes back in a line: by
    processes it would be raised only when asked for.
    """
    torch.set_num_threads(1)
    launch = Problem(row, torch.device("cpu"), length, torch.empty).launch(row.tiles)

    def launch_from_cache() -> None:
        triton.knobs.cache.dir = cache
        launch()

    found = []
    try:
        for variant, options in variants(row):
            found.append(compile_row(variant, **options))
            if not may_ship(variant, found[-1]):
                return found[-1]
        compile_launch(int(row.architecture.removeprefix("sm_")), launch_from_cache)
    except Exception as error:
        return first_line(error)
    return found[0]


@contextmanager
def compiled_in(cache: str) -> Iterator[None]:
    """Launches look for their kernels in a folder."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        yield


@dataclass(frozen=True)
class Candidate:
    """A row with tiles that are tried, and where its compilation is or will be."""

    row: Row
    cache: str
    compiled: Future[Compiled | str]


def worth_timing(found: Sequence[Candidate], until: float) -> Iterator[tuple[Tiles, str]]:
    """The tiles that may ship, each as soon as it is compiled, and in which folder; NotInTime once time is up."""
    for candidate in found:
        if (left := until - time.monotonic()) < 0:
            raise NotInTime
        compiled = candidate.compiled.result(timeout=None if left == float("inf") else left)
        if may_ship(candidate.row, compiled):
            yield candidate.row.tiles, candidate.cache


def fastest(problem: Problem, tried: Iterable[tuple[Tiles, str]], clock: Clock) -> dict[Tiles, float]:
    """Seconds of the fastest few of those that give right results, timed in turn; the fastest first."""
    seconds: dict[Tiles, float] = {}
    for tiles, cache in tried:
        with compiled_in(cache):
            wrong = problem.fault(tiles)
        if wrong:
            print(f"  {tiles}: {wrong}", file=sys.stderr, flush=True)
        else:
            seconds[tiles] = median(clock({"": problem.launch(tiles)}, 3)[""])
    finalists = {str(tiles): tiles for tiles in sorted(seconds, key=seconds.__getitem__)[:FINALISTS]}
    again = clock({name: problem.launch(tiles) for name, tiles in finalists.items()}, 9) if finalists else {}
    medians = {finalists[name]: median(values) for name, values in again.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def in_order(rows: Iterable[Row]) -> list[Row]:
    """What matters most first: 16 bits before 32, head dim 128 before the others."""
    return sorted(rows, key=lambda row: (row.bits, row.head_dim != 128, row.head_dim, ORDER.index(row.kernel)))


def tune(bench: Bench) -> None:
    """Tune the rows of this GPU's architecture one after another, until time is up."""
    rows = in_order(row for row in configurations.table() if row.architecture == architecture())
    with tempfile.TemporaryDirectory() as folder:
        pool = ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=get_context("spawn"))
        try:
            tune_rows(bench, rows, pool, folder)
        finally:
            pool.shutdown(cancel_futures=True)


def tune_rows(
    bench: Bench,
    rows: Sequence[Row],
    pool: Executor,
    folder: str,
    path: Path = configurations.TABLE,
    length: int = LENGTH,
) -> None:
    """Tune rows of the table in ``path`` and write each as soon as it is known; ``pool`` compiles into ``folder``."""
    jobs = {row: [_submit(pool, replace(row, tiles=t), folder, length) for t in candidates(row)] for row in rows}
    measured, lines = f"{device_name(bench.device)} {date.today()}", []  # a column: no comma
    for row in rows:
        print(f"{row.kernel}, {row.bits} bits, head dim {row.head_dim}", file=sys.stderr, flush=True)
        try:
            found = fastest(Problem(row, bench.device, length), worth_timing(jobs[row], bench.until), bench.clock)
        except (NotInTime, BrokenProcessPool) as error:
            print(f"ended: {type(error).__name__}", file=sys.stderr)
            break
        if found:
            best = next(iter(found))
            others = [other for other in configurations.table(path) if other != row]
            configurations.write([*others, replace(row, tiles=best, measured=measured)], path)
            lines.append(_line(row, best, found))
    print(f"tuned {len(lines)} of {len(rows)} rows", file=sys.stderr)
    if lines:
        show(f"tiles for {measured}", lines)


def _submit(pool: Executor, row: Row, folder: str, length: int) -> Candidate:
    cache = tempfile.mkdtemp(dir=folder)
    return Candidate(row, cache, pool.submit(examine, row, cache, length))


def _line(row: Row, best: Tiles, found: dict[Tiles, float]) -> dict[str, object]:
    before = found.get(row.tiles)
    return {
        "kernel": row.kernel, "bits": row.bits, "head dim": row.head_dim,
        "before": _short(row.tiles), "ms before": "slower" if before is None else before * 1e3,
        "now": _short(best), "ms now": found[best] * 1e3,
    }  # fmt: skip


def _short(tiles: Tiles) -> str:
    engine = ", TMA" if tiles.descriptors else ""
    return f"{tiles.rows} x {tiles.keys}, {tiles.warps} warps, {tiles.stages} stages{engine}"
