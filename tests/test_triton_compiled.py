"""What ships compiles for every GPU it ships for, without one: no spills, shared memory that fits, fast products.

In processes of their own: here the kernels are interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from seqpar.kernels.triton.configurations import ARCHITECTURES, KERNELS, PRODUCTS, Row, table
from support.compiling import compiled, compiled_launches


@pytest.fixture(scope="module")
def compiler() -> Iterator[Executor]:
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("TRITON_INTERPRET", raising=False)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield pool


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("architecture", dict.fromkeys(ARCHITECTURES.values()))
def test_every_shipped_configuration_compiles(
    architecture: str, kernel: str, compiler: Executor, pytestconfig: pytest.Config
) -> None:
    """Too much shared memory would raise, as on the GPU. All rows on sm_90; elsewhere two head dims in 16 bits."""
    rows = [row for row in table() if (row.architecture, row.kernel) == (architecture, kernel)]
    assert {row.bits for row in rows} == {16, 32}
    if architecture != "sm_90" and not pytestconfig.getoption("--full-grid"):
        rows = [row for row in rows if row.bits == 16 and row.head_dim in (128, 256)]
    for row, result in zip(rows, compiler.map(compiled, rows), strict=True):
        assert result.serialised == (), row
        assert result.spilled_bytes == 0 or row.head_dim > 128, (row, result)
        # Few queries wait for memory, whatever computes their products.
        assert result.products == PRODUCTS[architecture] or row.bits == 32 or kernel == "few", row


VARIANTS = {
    "head_dim_80": {"head_dim": 80},
    "head_dim_96": {"head_dim": 96},
    "latent_attention": {"head_dim": 192, "value_dim": 128},
    "fp16": {"dtype": torch.float16},
    "without_carry": {"carries": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_compile_on_hopper(variant: str, compiler: Executor) -> None:
    """Head dims in two parts, the other 16-bit dtype, the first block of a ring."""
    options = dict(VARIANTS[variant])
    wanted = options.pop("head_dim", 128)
    fitting = min(dim for dim in {row.head_dim for row in table()} if dim >= wanted)
    rows = [row for row in table() if (row.architecture, row.bits, row.head_dim) == ("sm_90", 16, fitting)]
    assert len(rows) == len(KERNELS)
    rows = [replace(row, head_dim=wanted) for row in rows]
    for row, result in zip(rows, compiler.map(compiled, rows, [options] * len(rows)), strict=True):
        assert result.serialised == (), row
        assert result.spilled_bytes == 0 or wanted > 128, (row, result)


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_rows_for_the_copy_engine_compile_without_it(architecture: str, compiler: Executor) -> None:
    """Tensors whose strides it does not take are loaded by pointers, in the same tiles."""
    rows = [row for row in table() if row.architecture == architecture and row.tiles.descriptors]
    assert {row.head_dim for row in rows} >= {64, 128}
    rows = [replace(row, tiles=replace(row.tiles, descriptors=False)) for row in rows if row.head_dim <= 128]
    for row, result in zip(rows, compiler.map(compiled, rows), strict=True):
        assert result.serialised == (), row
        assert result.spilled_bytes == 0, (row, result)


def test_few_rows_compile(compiler: Executor) -> None:
    """A decoding step has fewer rows than the table's tiles."""
    few = [row for row in table() if (row.architecture, row.kernel, row.bits) == ("sm_90", "few", 16)]
    rows = [replace(row, tiles=replace(row.tiles, rows=16)) for row in few]
    for row, result in zip(rows, compiler.map(compiled, rows), strict=True):
        assert result.spilled_bytes == 0 or row.head_dim > 128, (row, result)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_kernels_beside_the_table_compile(arch: int, compiler: Executor) -> None:
    for name, result in compiler.submit(compiled_launches, arch).result().items():
        assert result.spilled_bytes == 0, name


def test_too_much_shared_memory_is_seen(compiler: Executor) -> None:
    """The test above can fail."""
    row = next(row for row in table() if row.architecture == "sm_86" and row.bits == 16 and row.head_dim == 256)
    with pytest.raises(Exception, match="shared memory, Required"):
        compiler.submit(compiled, replace(row, kernel="forward", tiles=replace(row.tiles, keys=256))).result()


def test_spills_and_serialised_products_are_seen(compiler: Executor) -> None:
    """So can that."""
    row = Row("sm_90", "dkv", 16, 128, next(iter(table())).tiles, "")
    result = compiler.submit(compiled, replace(row, tiles=replace(row.tiles, rows=128, keys=128, warps=4))).result()
    assert result.spilled_bytes
