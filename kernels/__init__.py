"""Kernels: local attention over key intervals, behind one contract (:mod:`seqpar.kernels.contract`)."""

from __future__ import annotations

import torch

from .contract import Intervals, Kernel, OutputGradient, Partial, accumulator_dtype, merge_
from .cpu import CpuKernel
from .reference import ReferenceKernel

_KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (ReferenceKernel(), CpuKernel())}
KERNEL_NAMES = ("auto", *_KERNELS)


def kernel_named(name: str, device: torch.device) -> Kernel:
    """The kernel ``name`` (one of ``KERNEL_NAMES``); ``auto`` takes ``cpu`` on the CPU, ``reference`` elsewhere."""
    if name == "auto":
        name = "cpu" if device.type == "cpu" else "reference"
    if name not in _KERNELS:
        raise ValueError(f"kernel: got {name!r}, expected one of {', '.join(KERNEL_NAMES)}")
    return _KERNELS[name]


__all__ = [
    "KERNEL_NAMES",
    "Intervals",
    "Kernel",
    "OutputGradient",
    "Partial",
    "accumulator_dtype",
    "kernel_named",
    "merge_",
]
