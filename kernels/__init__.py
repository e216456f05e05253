"""Kernels: local attention over key intervals, behind one contract (:mod:`seqpar.kernels.contract`)."""

from __future__ import annotations

from .automatic import AutoKernel, Choice
from .contract import Intervals, Kernel, OutputGradient, Partial, accumulator_dtype, merge_
from .cpu import CpuFlash
from .few_queries_cpu import compile_ahead
from .flash import DIRECTIONS, FlashKernel, Shape
from .library import AtenFlash, CudnnFlash, PackagedFlash
from .reference import ReferenceKernel
from .triton import TritonKernel

_BACKENDS: tuple[Kernel, ...] = (
    ReferenceKernel(),
    FlashKernel("cpu", CpuFlash()),
    TritonKernel(),
    TritonKernel(deterministic=False),
    FlashKernel("library", CudnnFlash(), AtenFlash()),
    FlashKernel("library:cudnn", CudnnFlash()),
    FlashKernel("library:flash", AtenFlash()),
    FlashKernel("library:flash_attn", PackagedFlash()),
)
AUTO = AutoKernel({kernel.name: kernel for kernel in _BACKENDS})
_KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (AUTO, *_BACKENDS)}
KERNEL_NAMES = tuple(_KERNELS)


def kernel_named(name: str) -> Kernel:
    """The kernel ``name``, one of ``KERNEL_NAMES``."""
    if name not in _KERNELS:
        raise ValueError(f"kernel: got {name!r}, expected one of {', '.join(KERNEL_NAMES)}")
    return _KERNELS[name]


__all__ = [
    "AUTO",
    "DIRECTIONS",
    "KERNEL_NAMES",
    "Choice",
    "Intervals",
    "Kernel",
    "OutputGradient",
    "Partial",
    "Shape",
    "accumulator_dtype",
    "compile_ahead",
    "kernel_named",
    "merge_",
]
