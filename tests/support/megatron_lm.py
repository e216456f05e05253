"""Run a script of Megatron-LM on the CPU, as `seqpar megatron` runs it: python megatron_lm.py SCRIPT ARGUMENTS..."""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# What Megatron-LM asks of a GPU besides what Megatron-Core asks; all of it is told, none of it is used.
_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 8,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: mock.Mock(major=9, minor=0, total_memory=1e9),
    "get_rng_state": lambda *_: torch.zeros(1),
    "memory_stats": lambda *_: defaultdict(int),
    "stream": lambda *_: contextlib.nullcontext(),
    "Event": mock.MagicMock,
    "Stream": mock.MagicMock,
    "nvtx": mock.MagicMock(),
    **{name: mock.Mock(return_value=0) for name in ("memory_allocated", "max_memory_allocated", "memory_reserved")},
    **{name: mock.Mock(return_value=0) for name in ("max_memory_reserved", "set_device", "manual_seed", "empty_cache")},
    **{name: mock.MagicMock() for name in ("set_rng_state", "reset_peak_memory_stats", "current_stream")},
}


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from seqpar.launch import megatron
    from support.jobs_megatron import on_cpu

    script = megatron.prepare(sys.argv[1:])
    from megatron.core.models.gpt import GPTModel

    build = GPTModel.__init__

    def same_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        torch.manual_seed(1)  # earlier warm-ups draw numbers by the size of a rank's shard
        build(self, *args, **kwargs)

    with contextlib.ExitStack() as patches:
        patches.enter_context(on_cpu())
        for name, told in _CUDA.items():
            patches.enter_context(mock.patch(f"torch.cuda.{name}", told))
        patches.enter_context(mock.patch("megatron.core.datasets.utils.compile_helpers"))  # the wheel has them
        patches.enter_context(mock.patch("megatron.legacy.fused_kernels.load"))
        patches.enter_context(mock.patch.object(GPTModel, "__init__", same_weights))
        megatron.run(script)


if __name__ == "__main__":
    main()
