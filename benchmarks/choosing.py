"""Measure what ``auto`` picks from on the GPU at hand, and rewrite its part of ``kernels/choices.csv``.

Used by ``kernels.py --choices``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import torch
import triton
from comparing import Bench, measure, rates
from contenders import Case, repeatable
from measuring import device_name, show

from seqpar.kernels import DIRECTIONS, kernel_named
from seqpar.kernels.automatic import architecture
from seqpar.kernels.choices import KERNELS, TABLE, Row, read_choices, write_choices
from seqpar.kernels.flash import Direction, FlashKernel

HEAD_DIMS = ((128, 128), (64, 64), (256, 256), (192, 128))
LENGTHS = (1024, 4096, 16_384, 65_536)


def choose(bench: Bench, path: Path = TABLE, lengths: Sequence[int] = LENGTHS, heads: int = 32) -> None:
    """Measure and write; rows for which there was no time stay as they were."""
    measured: list[Row] = []
    for (dim, value_dim), length, kind in product(HEAD_DIMS, lengths, ("causal", "full")):
        if time.monotonic() > bench.until:
            break
        print(f"{dim}/{value_dim} {length:,} {kind}", file=sys.stderr, flush=True)
        # As many tokens whatever the length; of long ones a few heads fill the GPU.
        batch, some = max(1, 16_384 // length), heads if length <= 16_384 else heads // 4
        case = Case(mask=kind, queries=length, keys=length, batch=batch, heads=some, kv_heads=some // 4)
        for direction in DIRECTIONS:
            measured += speeds(bench, replace(case, dim=dim, value_dim=value_dim), direction)
    replaced = {(row.case, row.length) for row in measured}
    write_choices([*(row for row in read_choices(path) if (row.case, row.length) not in replaced), *measured], path)
    if measured:
        show(f"what auto picks from on {device_name(bench.device)}", [_line(row) for row in measured])


def speeds(bench: Bench, case: Case, direction: Direction) -> list[Row]:
    """A row for each kernel that takes the case, gives right results, and the same ones every time."""
    if direction == "backward" and not torch.are_deterministic_algorithms_enabled():
        with repeatable():
            return speeds(bench, case, direction)
    seconds = measure(bench, case, [name for name in KERNELS if repeats(name, direction)], [direction])[direction]
    where = architecture(bench.device), 8 * case.dtype.itemsize, case.dim, case.value_dim, case.mask, direction
    rows = []
    for name, rate in rates(case, direction, seconds).items():
        if isinstance(rate, str):
            print(f"  {name}: {rate}", file=sys.stderr, flush=True)
        else:
            measured = f"{device_name(bench.device)}, {versions(name)}, {date.today()}"
            rows.append(Row(*where, case.queries, name, float(f"{rate:.4g}"), measured))
    return rows


def repeats(name: str, direction: Direction) -> bool:
    """Whether a kernel gives the same bits every time, as PyTorch is set now."""
    kernel = kernel_named(name)
    return kernel.repeats(direction) if isinstance(kernel, FlashKernel) else True


def versions(name: str) -> str:
    """What a kernel's speed depends on besides the GPU."""
    if name == "library:flash_attn":
        return " ".join(filter(None, map(_installed, ("flash-attn", "flash-attn-3", "flash-attn-4"))))
    return {
        "triton": f"triton {triton.__version__}",
        "library:cudnn": f"cuDNN {torch.backends.cudnn.version()}",
        "library:flash": f"torch {torch.__version__}",
    }[name]


def _installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _line(row: Row) -> dict[str, object]:
    return {
        "head dims": f"{row.head_dim}/{row.value_dim}", "kind": row.kind, "pass": row.direction,
        "tokens": row.length, "kernel": row.kernel, "TFLOP/s": row.tflops,
    }  # fmt: skip
