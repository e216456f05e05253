"""Between PyTorch and a kernel: which GPU it is, how its inputs are passed, and where results may be written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from ..contract import Intervals
from .configurations import ARCHITECTURES, Tiles, tiles_for

L2_BYTES, MULTIPROCESSORS = 50 << 20, 132  # an H100's, where there is no GPU to ask: interpreted and compiled kernels


def interpreted() -> bool:
    """Whether Triton interprets kernels, on the CPU (``TRITON_INTERPRET=1`` when they were imported)."""
    return bool(triton.knobs.runtime.interpret)


def architecture() -> str:
    """Whose rows of the table the current GPU uses; ValueError for one that has none."""
    if interpreted():
        return "sm_90"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or target.arch not in ARCHITECTURES:
        expected = ", ".join(f"{arch // 10}.{arch % 10}" for arch in sorted(ARCHITECTURES))
        raise ValueError(
            f"kernel='triton': got a {target.backend} GPU of capability {target.arch}, expected one of {expected}; "
            "use kernel='reference'"
        )
    return ARCHITECTURES[target.arch]


def configured(kernel: str, q: Tensor, v: Tensor) -> Tiles:
    """The tiles that the table gives a kernel for these inputs."""
    return tiles_for(architecture(), kernel, q.dtype, q.shape[-1], v.shape[-1])


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it that of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def multiprocessors(x: Tensor) -> int:
    """How many programs the device of ``x`` can run side by side, at least."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else MULTIPROCESSORS


def heads_in_cache(k: Tensor, v: Tensor, group: int) -> int:
    """How many query heads can be worked on at once with their keys and values in half of the L2 cache."""
    l2 = torch.cuda.get_device_properties(k.device).L2_cache_size if k.is_cuda else L2_BYTES
    of_one_head = max(1, k.shape[1] * (k.shape[3] + v.shape[3]) * k.itemsize)
    return max(1, l2 // 2 // of_one_head) * group


def interval_strides(intervals: Intervals) -> tuple[int, int]:
    """Strides of dense ``[B|1, H|1, Tq]`` along batch and heads: 0 where one row serves all."""
    batch, heads, queries = intervals.start.shape
    return heads * queries if batch > 1 else 0, queries if heads > 1 else 0


def options(tiles: Tiles) -> dict[str, Any]:
    """What a launch takes from a configuration besides the sizes of tiles."""
    return {"num_warps": tiles.warps, "num_stages": tiles.stages}


def check_outputs(outputs: Mapping[str, tuple[Tensor, torch.Size]], inputs: Mapping[str, Tensor]) -> None:
    """Refuse outputs that a kernel would write wrongly: of another kind, not dense, or in memory that others use."""
    spans = {name: _memory(x) for name, x in inputs.items()}
    for name, (x, shape) in outputs.items():
        if x.shape != shape or x.dtype != torch.float32:
            raise ValueError(f"{name}: got {x.dtype} {tuple(x.shape)}, expected torch.float32 {tuple(shape)}")
        if (x.shape[-1] > 1 and x.stride(-1) != 1) or _overlaps_itself(x):
            raise ValueError(f"{name}: got strides {x.stride()}, expected dense columns and rows apart; copy it")
        first, last = spans[name] = _memory(x)
        for other, (low, high) in spans.items():
            if other != name and first < high and low < last:
                raise ValueError(f"{name}: got memory that {other} uses too, expected its own; copy one of them")


def _memory(x: Tensor) -> tuple[int, int]:
    """The addresses between which ``x`` lies."""
    if not x.numel():
        return 0, 0
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + extent * x.itemsize


def _overlaps_itself(x: Tensor) -> bool:
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False
