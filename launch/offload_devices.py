"""Published sizes of models and figures of devices, by name, for `seqpar plan-offload`."""

from __future__ import annotations

import re
from typing import NamedTuple

from .offload_costs import Shape

PRICES_OF = "2024 and 2025"
"""When the example prices were on the lists."""


class Figures(NamedTuple):
    """One device as its data sheet has it: dense bf16 TFLOP/s, GB, GB/s; and an example of a price, $ per hour."""

    tflops: float
    memory: float
    bandwidth: float
    price: float


# From NVIDIA's and AMD's data sheets, without sparsity. H100's and H20's prices are about those that Lamina reckons
# with, the others what clouds asked for on demand, per device.
DEVICES = {
    "h100-sxm": Figures(989, 80, 3350, 11.06),
    "h200": Figures(989, 141, 4800, 10.60),
    "a100-80gb": Figures(312, 80, 2039, 5.12),
    "mi300x": Figures(1307, 192, 5300, 6.00),
    "h20": Figures(148, 96, 4000, 4.63),
    "l40s": Figures(362, 48, 864, 1.86),
    "a10": Figures(125, 24, 600, 1.01),
    "l4": Figures(121, 24, 300, 0.80),
}

# A socket's DDR channel moves 8 bytes a transfer. Besides, per channel: fp32 TFLOP/s of the vector units (96 cores of
# an EPYC 9654, 32 FLOP a cycle, 2.4 GHz, 12 channels), one module of 64 GB, and an example price.
_CPU = re.compile(r"cpu-([1-9]\d?)xddr[45]-([1-9]\d{3})")
_CPU_EXAMPLE = "cpu-12xddr5-4800"
_CHANNEL = Figures(0.6, 64, 8e-3, 0.60)

MODELS = {
    "llama-3-8b": Shape(layers=32, heads=32, kv_heads=8, head_dim=128, parameters=8_030_261_248),
    "llama-3-70b": Shape(layers=80, heads=64, kv_heads=8, head_dim=128, parameters=70_553_706_496),
    "llama-3-405b": Shape(layers=126, heads=128, kv_heads=8, head_dim=128, parameters=405_853_388_800),
    "llama-33b": Shape(layers=60, heads=52, kv_heads=52, head_dim=128, parameters=32_528_943_616),
    "llama-65b": Shape(layers=80, heads=64, kv_heads=64, head_dim=128, parameters=65_285_660_672),
    "mistral-7b": Shape(layers=32, heads=32, kv_heads=8, head_dim=128, parameters=7_248_023_552),
    "qwen3-8b": Shape(layers=36, heads=32, kv_heads=8, head_dim=128, parameters=8_190_735_360),
    "qwen3-32b": Shape(layers=64, heads=64, kv_heads=8, head_dim=128, parameters=32_762_123_264),
    "qwen3-30b-a3b": Shape(
        layers=48, heads=32, kv_heads=4, head_dim=128, parameters=30_532_122_624, active=3_353_032_704
    ),
}


def figures_of(name: str) -> Figures | None:
    """Of the device of this name, or of a CPU host by its memory (`cpu-12xddr5-4800`); None for an unknown one."""
    host = _CPU.fullmatch(name)
    if host is None:
        return DEVICES.get(name)
    channels, transfers = int(host[1]), int(host[2])
    tflops, memory, width, price = _CHANNEL
    return Figures(channels * tflops, channels * memory, channels * transfers * width, round(channels * price, 2))


def device_names() -> str:
    """For an error that lists them."""
    return f"{', '.join(DEVICES)}, or a CPU host by its memory, as {_CPU_EXAMPLE}"
