"""Compile the kernels for a GPU that is not there, as a launch on it would, and read what came of them.

Triton needs no GPU to compile: ptxas comes with it. A driver that claims to be some GPU, and launches nothing, makes
every launcher of this package compile what it would have run.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from ..contract import Intervals, OutputGradient, Partial
from . import backward, few_queries, forward
from .configurations import Row

# The largest shared memory of one block, in bytes (CUDA C++ Programming Guide, "Technical Specifications").
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
_KERNELS = (
    forward.forward_kernel, few_queries.few_kernel, few_queries.merge_kernel,
    backward.delta_kernel, backward.dq_kernel, backward.dkv_kernel,
)  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one kernel.

    Attributes:
        registers: per thread.
        spilled_bytes: of registers, stored to memory and loaded again, per thread.
        shared_bytes: shared memory of a block.
        products: the instruction that computes matrix products: ``wgmma``, ``tcgen05``, ``mma``, or ``none``.
        serialised: ptxas's warnings that wgmma wait for each other (C75xx).
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: str
    serialised: tuple[str, ...]


def compile_row(row: Row, dtype: torch.dtype, value_dim: int | None = None, carries: bool = True) -> Compiled:
    """Compile one row of the table for its architecture, for inputs of its head dim."""
    dim, value_dim = row.head_dim, value_dim or row.head_dim
    queries, keys, heads, kv_heads = 16 if row.kernel == "few" else 256, 256, 8, 2  # as many rows as tiles have

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(1, *shape, dtype=dtype)

    q, k = empty(queries, heads, dim, dtype=dtype), empty(keys, kv_heads, dim, dtype=dtype)
    v, out = empty(keys, kv_heads, value_dim, dtype=dtype), empty(queries, heads, value_dim, dtype=dtype)
    intervals = Intervals(empty(1, queries, dtype=torch.int32), empty(1, queries, dtype=torch.int32))
    lse = empty(heads, queries)
    carry = Partial(out.float(), lse) if carries else None
    grad = OutputGradient(out, lse, out, None, lse)
    dq, dk, dv = (torch.empty(x.shape) for x in (q, k, v))
    inputs, tiles = (q, k, v, intervals, 1.0), row.tiles
    launches: dict[str, tuple[Any, Callable[[], Any]]] = {
        "forward": (forward.forward_kernel, lambda: forward.forward(*inputs, carry, tiles=tiles)),
        "few": (few_queries.few_kernel, lambda: few_queries.few_queries(*inputs, carry, tiles=tiles)),
        "dq": (backward.dq_kernel, lambda: backward.add_dq(grad, *inputs, dq, tiles=tiles)),
        "dkv": (backward.dkv_kernel, lambda: backward.add_dkv(grad, *inputs, dk, dv, tiles=tiles)),
        "dkv_atomic": (backward.dkv_kernel, lambda: backward.add_dkv(grad, *inputs, dk, dv, dq, tiles=tiles)),
    }
    kernel, launch = launches[row.kernel]
    return compile_launch(int(row.architecture.removeprefix("sm_")), launch)[kernel.__name__]


def compile_launch(arch: int, launch: Callable[[], Any]) -> dict[str, Compiled]:
    """Everything that ``launch()`` would run on a GPU of compute capability ``arch``, compiled, by kernel name."""
    before, claimed, log = triton.runtime.driver._active, _Claimed(arch), io.StringIO()
    triton.runtime.driver.set_active(claimed)
    try:
        with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
            # An empty cache: ptxas says what it has to say only when it runs.
            triton.knobs.cache.dir = cache
            triton.knobs.nvidia.dump_ptxas_log = True
            with redirect_stdout(log):
                launch()
            kernels = [found for kernel in _KERNELS for found in kernel.device_caches.pop(claimed, [{}])[0].values()]
    finally:
        triton.runtime.driver.set_active(before)
    return {kernel.name: _read(kernel, log.getvalue()) for kernel in kernels}


def _read(kernel: Any, log: str) -> Compiled:
    about = log.split(f"Compiling entry function '{kernel.name}'")[1].split("Compiling entry function")[0]
    registers = re.search(r"Used (\d+) registers", about)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", about)
    assert registers, f"ptxas said nothing of registers: {about}"
    assert spilled, f"ptxas said nothing of spills: {about}"
    ptx = kernel.asm["ptx"]
    products = next((name for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if name in ptx), "none")
    return Compiled(
        registers=int(registers[1]),
        spilled_bytes=max(int(spilled[1]), int(spilled[2])),
        shared_bytes=kernel.metadata.shared,
        products=products.split(".")[0],
        serialised=tuple(line.strip() for line in log.splitlines() if re.search(r"C75\d\d", line)),
    )


class _Claimed(DriverBase):
    """Claims to be a GPU, with its limits; its launcher launches nothing. It is also its own device."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self._arch = arch
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[arch]},
            load_binary=lambda name, binary, shared, device: (object(), None, 0, 0, 1024),
        )

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is launched")

    def get_current_device(self) -> _Claimed:
        return self

    def get_current_stream(self, device: object) -> int:
        return 0

    def launcher_cls(self, src: object, metadata: object) -> Callable[..., None]:
        return lambda *args: None
