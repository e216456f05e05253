"""Settings of every test run: one thread per rank, interpreted GPU kernels where there is no GPU, and the same examples
from hypothesis every time."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

settings.register_profile(
    "seqpar",
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("seqpar")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--full-grid``, which takes some minutes more; and a Megatron-LM to test its scripts."""
    parser.addoption("--full-grid", action="store_true", help="every mask x layout x schedule x ranks x head count")
    parser.addoption("--megatron-lm", metavar="FOLDER", help="a checkout of Megatron-LM whose pretrain_gpt.py is run")
    parser.addoption("--frames", type=int, default=300, help="how many mutated frames the decoder has to refuse")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many cases of the grid were held against the oracle."""
    properties = [p for report in terminalreporter.getreports("passed") for p in report.user_properties]
    cases = sum(value for name, value in properties if name == "grid_cases")
    if cases:
        terminalreporter.write_line(f"grid of masks, layouts, schedules, ranks and head counts: {cases:,} cases exact")
