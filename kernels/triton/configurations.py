"""Which tiles each kernel uses on which GPU: ``configurations.csv``, one row for each.

``benchmarks/kernels.py --tune`` measures candidates on the GPU at hand, checks each numerically and rewrites the rows
of its architecture. What has not been measured is the likely best that compiles well (``benchmarks/compiled.py``).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("configurations.csv")
KERNELS = ("forward", "dq", "dkv", "dkv_atomic", "few")
MAX_HEAD_DIM = 256
FEW_QUERIES = 16  # up to which a KV head's queries share a tile, and their keys are spread over the GPU
DTYPES = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}
# Compute capability -> whose rows it uses. GPUs of 8.6, 8.9 and 12.x have 99 KiB of shared memory for a block.
ARCHITECTURES = {80: "sm_80", 87: "sm_80", 86: "sm_86", 89: "sm_86", 120: "sm_86", 121: "sm_86"}
ARCHITECTURES |= {90: "sm_90", 100: "sm_100", 103: "sm_100"}
# How its tensor cores are addressed: the instruction that computes 16-bit products fast.
PRODUCTS = {"sm_80": "mma", "sm_86": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}


@dataclass(frozen=True)
class Tiles:
    """How a kernel divides its work.

    Attributes:
        rows: queries in a tile; of ``few``, the most.
        keys: keys in a tile.
        warps: warps of a program.
        stages: tiles on their way from memory at once.
        descriptors: load tiles by the copy engine (TMA; Hopper and later) where tensors are aligned for it.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "keys", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}: got {value}, expected a power of two")
        if min(self.rows, self.keys) < 16 or self.stages < 1:
            raise ValueError(f"got {self}, expected tiles of at least 16 x 16 and at least 1 stage")


@dataclass(frozen=True)
class Row:
    """One row of the table: the tiles of a kernel for inputs of ``bits`` and head dims up to ``head_dim``."""

    architecture: str
    kernel: str
    bits: int
    head_dim: int
    tiles: Tiles
    measured: str
    """Where the choice comes from: the GPU's name and a date, or ``compiled``."""


@cache
def tiles_for(architecture: str, kernel: str, dtype: torch.dtype, dim: int, value_dim: int) -> Tiles:
    """The configured tiles of a kernel for these head dims."""
    bits, widest = DTYPES[dtype], max(dim, value_dim)
    rows = [row for row in table() if (row.architecture, row.kernel, row.bits) == (architecture, kernel, bits)]
    fitting = [row for row in rows if row.head_dim >= widest]
    assert fitting, f"no configuration of {kernel} for {architecture}, {bits} bits, head dim {widest}"
    return min(fitting, key=lambda row: row.head_dim).tiles


@cache
def table(path: Path = TABLE) -> tuple[Row, ...]:
    """The table in ``path``; ValueError names a line that is not as it should be."""
    rows = []
    with path.open(newline="") as file:
        for number, entry in enumerate(csv.DictReader(file, skipinitialspace=True), start=2):
            try:
                rows.append(_row(entry))
            except ValueError as error:
                raise ValueError(f"{path.name}, line {number}: got {entry}, {error}") from error
    return tuple(rows)


def write(rows: Iterable[Row], path: Path = TABLE) -> None:
    """Write the table, sorted, in columns."""
    order = list(dict.fromkeys(ARCHITECTURES.values()))
    ranked = sorted(rows, key=lambda r: (order.index(r.architecture), KERNELS.index(r.kernel), r.bits, r.head_dim))
    lines = [_columns()]
    for row in ranked:
        tiles = [str(int(value)) for value in asdict(row.tiles).values()]
        lines.append([row.architecture, row.kernel, str(row.bits), str(row.head_dim), *tiles, row.measured])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = "\n".join(", ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in lines)
    path.write_text(text + "\n")
    table.cache_clear()
    tiles_for.cache_clear()


def _columns() -> list[str]:
    names = [field.name for field in fields(Row)]
    where = names.index("tiles")
    return [*names[:where], *(field.name for field in fields(Tiles)), *names[where + 1 :]]


def _row(entry: dict[str, str]) -> Row:
    if list(entry) != _columns() or None in entry.values():
        raise ValueError(f"expected the columns {', '.join(_columns())}")
    entry = {name: value.strip() for name, value in entry.items()}
    if entry["architecture"] not in ARCHITECTURES.values() or entry["kernel"] not in KERNELS:
        raise ValueError(f"expected an architecture of {set(ARCHITECTURES.values())} and a kernel of {KERNELS}")
    numbers = {field.name: int(entry[field.name]) for field in fields(Tiles)}
    tiles = Tiles(numbers["rows"], numbers["keys"], numbers["warps"], numbers["stages"], bool(numbers["descriptors"]))
    bits, head_dim = int(entry["bits"]), int(entry["head_dim"])
    return Row(entry["architecture"], entry["kernel"], bits, head_dim, tiles, entry["measured"])
