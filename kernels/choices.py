"""How fast each kernel was, on which GPU and for which plain blocks: ``choices.csv``, one row for each.

Rows are measurements, one kernel after the other in one run. Backwards are measured as they repeat bitwise: under
``torch.use_deterministic_algorithms(True)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path

from .flash import Direction

TABLE = Path(__file__).with_name("choices.csv")
KERNELS = ("triton", "library:cudnn", "library:flash", "library:flash_attn")
VALID = {"bits": (16,), "kind": ("full", "causal"), "direction": ("forward", "backward"), "kernel": KERNELS}
Case = tuple[str, int, int, int, str, str]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        architecture: ``sm_90`` for a GPU of capability 9.0.
        bits: of an input's element.
        head_dim, value_dim: of q and v.
        kind: all pairs of a rectangle, or a causal triangle.
        direction: which pass.
        length: queries, and keys.
        kernel: which one it was.
        tflops: how fast.
        measured: the GPU's name, what the kernel's version was, and a date.
    """

    architecture: str
    bits: int
    head_dim: int
    value_dim: int
    kind: str
    direction: Direction
    length: int
    kernel: str
    tflops: float
    measured: str

    def __post_init__(self) -> None:
        for name, valid in VALID.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {valid}")
        if not self.architecture.startswith("sm_"):
            raise ValueError(f"architecture: got {self.architecture!r}, expected one such as 'sm_90'")
        for name in ("head_dim", "value_dim", "length", "tflops"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a positive number")

    @property
    def case(self) -> Case:
        """What is compared with each other, besides the length."""
        return self.architecture, self.bits, self.head_dim, self.value_dim, self.kind, self.direction


COLUMNS = tuple(field.name for field in fields(Row))


@cache
def measured(path: Path = TABLE) -> dict[Case, tuple[Row, ...]]:
    """The rows in ``path`` by case, the fastest first."""
    rows = sorted(read_choices(path), key=lambda row: -row.tflops)
    return {case: tuple(row for row in rows if row.case == case) for case in {row.case for row in rows}}


def read_choices(path: Path = TABLE) -> tuple[Row, ...]:
    """The rows in ``path``; ValueError names a line that is not as it should be."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        values = [value.strip() for value in line.split(",", len(COLUMNS) - 1)]
        if line.startswith("#") or values == list(COLUMNS):
            continue
        try:
            rows.append(_row(values))
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {error} (in {line!r})") from error
    return tuple(rows)


def write_choices(rows: Iterable[Row], path: Path = TABLE) -> None:
    """Write the rows, sorted, in columns, under the comments of ``path``; they are used from then on."""
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    table = [COLUMNS, *(tuple(map(str, astuple(row))) for row in sorted(rows, key=astuple))]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    lines = [", ".join(value.rjust(width) for value, width in zip(line, widths, strict=True)) for line in table]
    path.write_text("\n".join([*comments, *lines]) + "\n")
    measured.cache_clear()


def _row(values: list[str]) -> Row:
    if len(values) != len(COLUMNS):
        raise ValueError(f"got {len(values)} columns, expected {', '.join(COLUMNS)}")
    numbers = {"bits": int, "head_dim": int, "value_dim": int, "length": int, "tflops": float}
    return Row(**{name: numbers.get(name, str)(value) for name, value in zip(COLUMNS, values, strict=True)})
