"""``auto``: the kernel that is fastest for a block, among those that can take it and whose results repeat bitwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .choices import Case, Row, measured
from .contract import Intervals, Kernel, OutputGradient, Partial
from .flash import DIRECTIONS, Direction, FlashKernel, Shape
from .triton.configurations import FEW_QUERIES


class Choice(NamedTuple):
    """A kernel's name, and why it was chosen."""

    kernel: str
    why: str


def pick(
    architecture: str,
    dtype: torch.dtype,
    head_dims: tuple[int, int],
    intervals: Intervals,
    direction: Direction,
    measured: Mapping[Case, Sequence[Row]],
    usable: Callable[[str], bool],
) -> Choice:
    """The kernel for a block, and why.

    Args:
        architecture: ``sm_90`` for a GPU of capability 9.0, else the device's type.
        dtype: of q, k and v.
        head_dims: of q and v.
        intervals: of the block.
        direction: which pass.
        measured: kernels' speed, the fastest first. Where these head dims were measured, the nearest length counts.
        usable: whether a library takes the block, here and now, and gives the same bits every time.
    """
    if architecture == "cpu":
        return Choice("cpu", "the one for the CPU")
    if not architecture.startswith("sm_") or dtype == torch.float64:
        return Choice("reference", f"{str(dtype).removeprefix('torch.')} on {architecture}")
    if dtype.itemsize != 2:
        return Choice("triton", "32 bits")
    if intervals.start.shape[-1] <= FEW_QUERIES:
        return Choice("triton", "few queries")
    block = intervals.plain
    if block is None:
        return Choice("triton", "more than a rectangle or triangle")
    rows = measured.get((architecture, 16, *head_dims, block.kind, direction), ())
    if not rows:
        return Choice("triton", f"not measured on {architecture}")
    pairs = (block.rows.stop - block.rows.start) * (block.keys.stop - block.keys.start)
    length = min((row.length for row in rows), key=lambda length: abs(math.log(length * length / pairs)))
    for row in rows:
        if row.length == length and (row.kernel == "triton" or usable(row.kernel)):
            return Choice(row.kernel, f"{row.tflops:.0f} TFLOP/s at {length:,} tokens")
    return Choice("triton", "no other that was measured is usable")


class AutoKernel:
    """``cpu`` on the CPU; on CUDA the fastest measured for plain 16-bit blocks, else ``triton``; see :func:`pick`."""

    name = "auto"

    def __init__(self, kernels: Mapping[str, Kernel]) -> None:
        self._kernels = kernels

    def choose(self, shape: Shape, intervals: Intervals, direction: Direction) -> Choice:
        """The kernel for a block of such a call, on its device and as PyTorch is set now."""

        def usable(name: str) -> bool:
            library = self._kernels[name]
            assert isinstance(library, FlashKernel), f"{name} is no library"
            return library.repeats(direction) and not library.refusal(shape, intervals)

        head_dims = shape.dim, shape.value_dim
        return pick(architecture(shape.device), shape.dtype, head_dims, intervals, direction, measured(), usable)

    def check(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Intervals]) -> None:
        """Whatever the chosen kernels refuse."""
        for intervals in blocks:
            for kernel in {self._kernel(q, k, v, intervals, direction) for direction in DIRECTIONS}:
                kernel.check(q, k, v, [intervals])

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        intervals: Intervals,
        scale: float,
        carry: Partial | None,
        final: bool = False,
    ) -> Partial:
        """See :class:`~seqpar.kernels.contract.Kernel`."""
        return self._kernel(q, k, v, intervals, "forward").forward(q, k, v, intervals, scale, carry, final)

    def backward(
        self,
        grad: OutputGradient,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        intervals: Intervals,
        scale: float,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """See :class:`~seqpar.kernels.contract.Kernel`."""
        self._kernel(q, k, v, intervals, "backward").backward(grad, q, k, v, intervals, scale, dq, dk, dv)

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, direction: Direction) -> Kernel:
        return self._kernels[self.choose(Shape.of(q, k, v), intervals, direction).kernel]


def architecture(device: torch.device) -> str:
    """``sm_90`` for a GPU of capability 9.0, else the device's type."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else device.type
