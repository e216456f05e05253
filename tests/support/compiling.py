"""What a process that compiles is asked to do. Kernels are imported there: here they may be interpreted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from seqpar.kernels import OutputGradient
from seqpar.kernels.triton.configurations import Row

if TYPE_CHECKING:
    from seqpar.kernels.triton.offline import Compiled


def compiled(row: Row, options: dict[str, Any] | None = None) -> Compiled:
    """A row of the table, for inputs of its head dim, bf16 or fp32 unless told otherwise."""
    from seqpar.kernels.triton.offline import compile_row

    dtype = torch.bfloat16 if row.bits == 16 else torch.float32
    return compile_row(row, **{"dtype": dtype, **(options or {})})


def compiled_launches(arch: int) -> dict[str, Compiled]:
    """The kernels that have no row: delta, and the merge of few queries (by way of them)."""
    from seqpar.kernels import Intervals, Partial
    from seqpar.kernels.triton import backward, few_queries
    from seqpar.kernels.triton.configurations import ARCHITECTURES, tiles_for
    from seqpar.kernels.triton.offline import compile_launch

    out = torch.empty(1, 9, 4, 192, dtype=torch.bfloat16)
    lse = torch.empty(1, 4, 9)
    grad = OutputGradient(out, lse, out, lse)
    intervals = Intervals(*torch.zeros(2, 1, 1, 9, dtype=torch.int32))
    tiles = tiles_for(ARCHITECTURES[arch], "few", out.dtype, 192, 192)
    carry = Partial(out.float(), lse)
    results = compile_launch(arch, lambda: backward.delta(grad))
    results |= compile_launch(
        arch, lambda: few_queries.few_queries(out, out, out, intervals, 1.0, carry, final=True, tiles=tiles)
    )
    assert {"delta_kernel", "merge_kernel"} <= results.keys()
    return results
