"""What the compiler makes of every shipped configuration, without a GPU: registers, spills, shared memory, products.

Run ``python benchmarks/compiled.py`` to compile the whole table (some minutes) and rewrite the one in
``docs/kernels.md``; with ``--choose`` first, to choose anew every row that no GPU has measured: the first of
:data:`CANDIDATES` that compiles without spilling and without serialised products.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TypeGuard

import torch
import triton
import tyro
from measuring import show, write
from rich.progress import track
from triton.runtime.errors import OutOfResources

from seqpar.kernels.triton import configurations
from seqpar.kernels.triton.configurations import ARCHITECTURES, KERNELS, PRODUCTS, Row, Tiles
from seqpar.kernels.triton.offline import Compiled, compile_row

DOCS = Path(__file__).parents[1] / "docs" / "kernels.md"
BEGIN, END = "<!-- written by benchmarks/compiled.py -->\n", "<!-- end -->\n"
HEAD_DIMS = {16: (64, 128, 192, 256), 32: (64, 128, 256)}  # by bits
COMPILED = "compiled"  # what a row says of itself that no GPU has measured

# (rows, keys, warps), the likely best first: large tiles read less, and 8 warps hold what 4 would spill.
_SMALL = [(64, 64, 8), (64, 64, 4), (64, 32, 8), (64, 32, 4), (32, 32, 8), (32, 32, 4)]
_BACKWARD = [(64, 128, 8), (64, 64, 8), (64, 64, 4), (128, 32, 8), (32, 128, 8), (32, 64, 8), (64, 32, 8), (32, 64, 4)]
_BACKWARD += [(64, 32, 4), (32, 32, 8), (32, 32, 4)]
_FP32_BACKWARD = [(32, 32, 8), (16, 32, 8), (32, 16, 8), (16, 16, 8), (16, 16, 4)]
CANDIDATES: dict[tuple[str, int], list[tuple[int, int, int]]] = {
    ("forward", 16): [(128, 128, 8), (128, 64, 8), (128, 64, 4), (128, 32, 8), *_SMALL],
    ("dq", 16): [(128, 64, 8), (64, 64, 8), (64, 64, 4), (128, 32, 8), *_SMALL[2:]],
    ("dkv", 16): _BACKWARD,
    ("dkv_atomic", 16): _BACKWARD,
    ("few", 16): [(64, 64, 4), (64, 32, 4), (32, 64, 4), (32, 32, 4), (16, 32, 4)],
    ("forward", 32): [(64, 32, 8), (32, 32, 8), (32, 16, 8), (16, 16, 8)],
    ("dq", 32): [(32, 32, 8), (32, 16, 8), (16, 16, 8), (16, 16, 4)],
    ("dkv", 32): _FP32_BACKWARD,
    ("dkv_atomic", 32): _FP32_BACKWARD,
    ("few", 32): [(32, 32, 8), (16, 32, 8), (16, 16, 8), (16, 16, 4)],
}


def candidates(architecture: str, kernel: str, bits: int) -> Iterator[Tiles]:
    """Tiles to try, in order: rather smaller ones than none on their way while others are computed with.

    The copy engine's descriptors are for 16-bit tiles from Hopper on.
    """
    descriptors = [True, False] if architecture in ("sm_90", "sm_100") and bits == 16 and kernel != "few" else [False]
    stages = (3, 2) if kernel == "few" else (2, 1)
    for stage, (rows, keys, warps), by_engine in product(stages, CANDIDATES[kernel, bits], descriptors):
        yield Tiles(rows, keys, warps, stage, by_engine)


def compiled(row: Row) -> Compiled | None:
    """A row compiled for the dtype it stands for; None where it does not fit the GPU."""
    torch.set_num_threads(1)
    try:
        return compile_row(row, torch.bfloat16 if row.bits == 16 else torch.float32)
    except OutOfResources:
        return None


def fits(row: Row, result: Compiled | None) -> bool:
    """Whether a configuration may be shipped: wide heads may spill a little."""
    return is_fast(row, result) and result.spilled_bytes <= (0 if row.head_dim <= 128 else 64)


def fits_as_used(row: Row, result: Compiled | None) -> bool:
    """Whether it may be shipped as it is, and for tensors that the copy engine cannot read."""
    if not fits(row, result):
        return False
    by_pointers = replace(row, tiles=replace(row.tiles, descriptors=False))
    return not row.tiles.descriptors or fits(by_pointers, compiled(by_pointers))


def is_fast(row: Row, result: Compiled | None) -> TypeGuard[Compiled]:
    """Whether it computes its products as its GPU can; those of few queries wait for memory anyway."""
    if result is None or result.serialised:
        return False
    return row.bits == 32 or row.kernel == "few" or result.products == PRODUCTS[row.architecture]


def choose(row: Row) -> Row:
    """The row with the first tiles that fit; with those that spill least where none do."""
    spills: list[tuple[int, Row]] = []
    for tiles in candidates(row.architecture, row.kernel, row.bits):
        result = compiled(changed := replace(row, tiles=tiles))
        if fits_as_used(changed, result):
            return changed
        if is_fast(row, result):
            spills.append((result.spilled_bytes, changed))
    return min(spills, key=lambda spill: spill[0])[1]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compile."""

    choose: bool = False
    """First choose the tiles of every row that no GPU has measured."""
    workers: int = 2
    """Processes that compile side by side."""


def main(options: Options) -> None:
    """Compile, print and write the table."""
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        if options.choose:
            known = {(r.architecture, r.kernel, r.bits, r.head_dim): r for r in configurations.table()}
            rows = [
                known.get(key) or Row(*key, Tiles(16, 16, 4, 1), COMPILED)
                for bits, dims in HEAD_DIMS.items()
                for key in product(dict.fromkeys(ARCHITECTURES.values()), KERNELS, (bits,), dims)
            ]
            unmeasured = [row for row in rows if row.measured == COMPILED]
            chosen = track(pool.map(choose, unmeasured), "choosing", len(unmeasured))
            configurations.write([row for row in rows if row.measured != COMPILED] + [*chosen])
        rows = list(configurations.table())
        results = list(track(pool.map(compiled, rows), "compiling", len(rows)))
    lines = [_line(row, result) for row, result in zip(rows, results, strict=True)]
    show("shipped configurations", lines)
    write("compiled", {"configurations": lines})
    _document(lines)


def _line(row: Row, result: Compiled | None) -> dict[str, object]:
    assert result is not None, f"{row} does not fit its GPU"
    tiles = asdict(row.tiles)
    return {
        "GPU": row.architecture, "kernel": row.kernel, "bits": row.bits, "head dim": row.head_dim,
        "rows x keys": f"{tiles['rows']} x {tiles['keys']}", "warps": tiles["warps"], "stages": tiles["stages"],
        "TMA": "yes" if tiles["descriptors"] else "", "registers": result.registers,
        "spilled, B": result.spilled_bytes, "shared, KiB": round(result.shared_bytes / 1024, 1),
        "products": result.products,
    }  # fmt: skip


def _document(lines: list[dict[str, object]]) -> None:
    head, _, rest = DOCS.read_text().partition(BEGIN)
    rows = ["| " + " | ".join(str(value) for value in line.values()) + " |" for line in lines]
    header = "| " + " | ".join(lines[0]) + " |"
    table = "\n".join([header, "|---" * len(lines[0]) + "|", *rows])
    source = f"Compiled by Triton {triton.__version__} on {date.today()}, bf16 and fp32, with a carry:"
    DOCS.write_text(f"{head}{BEGIN}\n{source}\n\n{table}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(tyro.cli(Options))
