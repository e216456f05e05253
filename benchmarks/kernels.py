"""The Triton kernels on a GPU against cuDNN, FlashAttention and FlexAttention; and the tables that depend on the GPU.

Run ``python benchmarks/kernels.py`` on an idle GPU of 80 GB, or with the names of some groups only. Every contender has
to be right on a small copy of a case before it is timed. ``--tune`` chooses this GPU's tiles anew
(``kernels/triton/configurations.csv``), ``--choices`` measures anew what ``auto`` picks from (``kernels/choices.csv``).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from choosing import choose
from comparing import Bench, Value, measure, rates
from contenders import DOCUMENTS, WINDOW, Case, repeatable
from measuring import RESULTS, device_name, gpu_in_turn, show, write
from tuning import tune

from seqpar.kernels import AUTO, Shape
from seqpar.kernels.choices import TABLE as CHOICES
from seqpar.kernels.flash import Direction
from seqpar.kernels.triton.configurations import TABLE as CONFIGURATIONS

OURS = ("triton", "triton_atomic")
LIBRARIES = ("library:cudnn", "library:flash", "sdpa:cudnn", "sdpa:flash")
SHORT, LONG, LONGER = 4096, 16_384, 65_536
BATCHES, QUERIES = (1, 8), (1, 4, 16)  # of few queries


class Goal(NamedTuple):
    """What the project asks for, and what came of it; None where there is no figure."""

    what: str
    asked: float
    got: float | None


def ratio(a: Value, b: Value) -> float | None:
    """``a / b``, where both are figures."""
    return None if isinstance(a, str) or isinstance(b, str) else a / b


def figure(value: Value) -> float | None:
    """A figure, or None."""
    return None if isinstance(value, str) else value


class Report(NamedTuple):
    """One group's table, and its goals."""

    title: str
    rows: list[dict[str, Value]]
    goals: list[Goal]


# The groups.


def shapes(bench: Bench, length: int, kv_heads: int, flex: bool = True) -> Report:
    """All masks, forward and backward, 65,536 tokens at once."""
    names, rows, goals, dense = (*OURS, *LIBRARIES, *(["flex"] * flex)), [], [], {}
    for mask in ("full", "causal", "window", "documents"):
        case = Case(mask=mask, queries=length, keys=length, batch=LONGER // length, kv_heads=kv_heads)
        for direction, seconds in measure(bench, case, names).items():
            rate = rates(case, direction, seconds)
            rows.append({"mask": mask, "pass": direction, **rate})
            where = f"{mask} {direction}"
            if mask == "full":
                dense[direction] = rate["triton"]
            elif mask == "causal":
                asked = {"forward": {"triton": 480.0}, "backward": {"triton": 300.0, "triton_atomic": 360.0}}
                for name, least in asked[direction].items():
                    goals.append(Goal(f"{where}: {name}, TFLOP/s", least, figure(rate[name])))
            else:
                goals.append(Goal(f"{where}: triton / triton full", 0.85, ratio(rate["triton"], dense[direction])))
                if flex:
                    goals.append(Goal(f"{where}: triton / flex", 1.3, ratio(rate["triton"], rate["flex"])))
    about = f"a window of {WINDOW:,}, {len(DOCUMENTS)} documents in each {sum(DOCUMENTS):,}"
    return Report(f"TFLOP/s, bf16, head dim 128, {length:,} tokens, 32/{kv_heads} heads ({about})", rows, goals)


def automatic(bench: Bench) -> Report:
    """``auto`` on dense shapes, as PyTorch is set by default and where it is told to repeat bitwise."""
    rows, goals, names = [], [], ("auto", "triton", *LIBRARIES)
    for mask, length in (("causal", LONG), ("full", LONG), ("causal", SHORT), ("full", SHORT)):
        case = Case(mask=mask, queries=length, keys=length, batch=LONG // length, kv_heads=8)
        found = [(direction, "", seconds) for direction, seconds in measure(bench, case, names).items()]
        with repeatable():
            found += [("backward", ", repeatable", measure(bench, case, names, ["backward"])["backward"])]
        for direction, setting, seconds in found:
            rate = rates(case, direction, seconds)
            best = max((x for x in (rate[name] for name in LIBRARIES) if not isinstance(x, str)), default="none")
            chosen = choice(case, bench.device, direction, bool(setting))
            rows.append({"mask": mask, "tokens": f"{length:,}", "pass": direction + setting, "chosen": chosen, **rate})
            what = f"{mask} {length:,} {direction}{setting}: auto / best library"
            goals.append(Goal(what, 0.98, ratio(rate["auto"], best)))
    return Report("auto: TFLOP/s, bf16, head dim 128, 32/8 heads", rows, goals)


def choice(case: Case, device: torch.device, direction: Direction, repeats: bool) -> str:
    """Which kernel ``auto`` picks."""
    shape = Shape(device, case.dtype, case.batch, case.heads, case.kv_heads, case.dim, case.value_dim)
    if not repeats:
        return AUTO.choose(shape, case.intervals, direction).kernel
    with repeatable():
        return AUTO.choose(shape, case.intervals, direction).kernel


def few_queries(bench: Bench, keys: int = 131_072) -> Report:
    """Attention that reads much and computes little, beside a copy of device memory."""
    rows, goals, names = [], [], ("triton", "sdpa:cudnn", "sdpa:flash")
    source = torch.empty(keys << 14, dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    for batch in BATCHES:
        for queries in QUERIES:
            case = Case(mask="full", queries=queries, keys=keys, batch=batch, kv_heads=8)
            seconds = measure(bench, case, names, ["forward"], {"copy": lambda: target.copy_(source)})["forward"]
            read = keys * batch * case.kv_heads * (case.dim + case.value_dim) * case.dtype.itemsize
            moved = dict.fromkeys(names, read) | {"copy": 2 * source.numel()}
            speed = {name: x if isinstance(x, str) else moved[name] / x / 1e9 for name, x in seconds.items()}
            rows.append({"batch": str(batch), "queries": str(queries), **speed})
            goals.append(
                Goal(f"batch {batch}, {queries} queries: triton / copy", 0.8, ratio(speed["triton"], speed["copy"]))
            )
    return Report(
        f"few queries of {keys:,} keys, bf16, 32/8 heads: GB/s of keys and values; copy: read and written", rows, goals
    )


def variants(bench: Bench, title: str, cases: Mapping[str, Case]) -> Report:
    """Some causal cases, forward and backward."""
    rows, names = [], (*OURS, "sdpa:cudnn", "sdpa:flash", "sdpa:efficient")
    for label, case in cases.items():
        for direction, seconds in measure(bench, case, names).items():
            rows.append({"case": label, "pass": direction, **rates(case, direction, seconds)})
    return Report(f"{title}: TFLOP/s, causal, {LONG:,} tokens, 32/32 heads", rows, [])


DTYPES = {"fp16": Case(dtype=torch.float16), "fp32": Case(dtype=torch.float32)}
DIMS = {f"{dim}/{value}": Case(dim=dim, value_dim=value) for dim, value in ((64, 64), (96, 96), (192, 128), (256, 256))}
GROUPS: dict[str, Callable[[Bench], Report]] = {
    "16k": partial(shapes, length=LONG, kv_heads=32),
    "16k-gqa": partial(shapes, length=LONG, kv_heads=8),
    "few": few_queries,
    "auto": automatic,
    "dims": partial(variants, title="head dims, bf16", cases=DIMS),
    "dtypes": partial(variants, title="dtypes, head dim 128", cases=DTYPES),
    "64k": partial(shapes, length=LONGER, kv_heads=32),
    "64k-gqa": partial(shapes, length=LONGER, kv_heads=8),
}
QUICK: dict[str, Callable[[Bench], Report]] = {
    "16k": partial(shapes, length=LONG, kv_heads=32, flex=False),
    "few": few_queries,
}


# Tables.


def cell(value: Value) -> str:
    """A figure in 3 digits; of a reason its beginning, the rest is under the table."""
    if isinstance(value, str):
        return value if len(value) < 20 else value[:19] + "…"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def present(report: Report) -> None:
    """Print a group's tables, and in full what took the place of figures."""
    show(report.title, [{name: cell(value) for name, value in row.items()} for row in report.rows])
    reasons = {f"{name}: {x}" for row in report.rows for name, x in row.items() if isinstance(x, str) and cell(x) != x}
    for reason in sorted(reasons):
        print(f"  {reason}")
    if report.goals:
        show("goals", [_goal(goal) for goal in report.goals])


def _goal(goal: Goal) -> dict[str, str]:
    got, met = ("-", "-") if goal.got is None else (cell(goal.got), "yes" if goal.got >= goal.asked else "no")
    return {"goal": goal.what, "asked": cell(goal.asked), "got": got, "met": met}


def results(reports: Mapping[str, Report]) -> dict[str, object]:
    """What is kept of the groups."""
    about = {"triton": triton.__version__, "cudnn": torch.backends.cudnn.version(), "documents": DOCUMENTS}
    groups = {
        name: {"title": r.title, "rows": r.rows, "goals": [goal._asdict() for goal in r.goals]}
        for name, r in reports.items()
    }
    return {**about, "groups": groups}


def compare(bench: Bench, groups: Mapping[str, Callable[[Bench], Report]], name: str, folder: Path) -> None:
    """Measure the groups; print and keep each as soon as it is there."""
    reports: dict[str, Report] = {}
    for group, run in groups.items():
        print(group, file=sys.stderr, flush=True)
        reports[group] = run(bench)
        present(reports[group])
        write(name, results(reports), folder)


def gpu_name(name: str) -> str:
    """``h100-80gb-hbm3`` of ``NVIDIA H100 80GB HBM3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def keep(table: Path, folder: Path | None) -> None:
    """A copy of a table of the package, to be brought home from a machine that is only lent."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(table, folder)


def options(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    """What to do. By argparse, which a lent machine has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="about a minute: 16k without flex, and few")
    parser.add_argument("--tune", action="store_true", help="choose this GPU's tiles anew")
    parser.add_argument("--choices", action="store_true", help="measure anew what auto picks from")
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing new after so many")
    parser.add_argument("--out", type=Path, help="folder for results, and for copies of tables that were rewritten")
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    if unknown := set(chosen.groups) - set(GROUPS):
        parser.error(f"groups: got {', '.join(sorted(unknown))}, expected some of {', '.join(GROUPS)}")
    return chosen


def main(chosen: argparse.Namespace) -> None:
    """Measure, print and keep."""
    if not torch.cuda.is_available():
        raise SystemExit("kernels.py: got no GPU, expected an NVIDIA GPU that this PyTorch can use")
    # Matrix products that repeat, which the reference needs where PyTorch is told to.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda", torch.cuda.current_device())
    bench = Bench(device, gpu_in_turn, 3 if chosen.quick else 5, time.monotonic() + 60 * chosen.minutes)
    if chosen.tune or chosen.choices:
        for wanted, rewrite, table in ((chosen.tune, tune, CONFIGURATIONS), (chosen.choices, choose, CHOICES)):
            if wanted:
                rewrite(bench)
                keep(table, chosen.out)
        return
    known = QUICK if chosen.quick else GROUPS
    groups = {name: run for name, run in known.items() if not chosen.groups or name in chosen.groups}
    partly = "" if groups.keys() == GROUPS.keys() else "-" + "-".join(groups)
    compare(bench, groups, f"kernels-{gpu_name(device_name(device))}{partly}", chosen.out or RESULTS)


if __name__ == "__main__":
    main(options())
