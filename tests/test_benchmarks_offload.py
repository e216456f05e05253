"""The benchmark of attention offload, on small sizes: shares are shares, and a batch is as large as it says."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = ("offload", "offload_attention", "offload_batches", "offload_overlap", "offload_rotation", "offload_setting")
MEMORY = 192 << 20


@pytest.fixture(scope="module")
def offload() -> Iterator[ModuleType]:
    """The benchmark, which finds its neighbours as a script does; gone again, for other tests load some of them too."""
    sys.path.insert(0, str(FOLDER))
    threads = torch.get_num_threads()
    try:
        yield importlib.import_module("offload")
    finally:
        torch.set_num_threads(threads)
        sys.path.remove(str(FOLDER))
        for name in (*NAMES, "measuring"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def address(offload: ModuleType) -> Iterator[str]:
    """Of a worker in a process of its own."""
    with offload.worker(MEMORY, 1) as found:
        yield found


@pytest.fixture(scope="module")
def size(offload: ModuleType) -> object:
    """A model small enough."""
    return sys.modules["offload_setting"].Size(hidden=64, intermediate=96, layers=2, heads=(4, 2), vocabulary=32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_is_measured_whole(dtype: torch.dtype, address: str, offload: ModuleType) -> None:
    row = offload.attention(address, 256, 2, 1, dtype)
    assert min(value for value in row.values() if isinstance(value, float)) > 0
    assert row["of it the worker's, ms"] < row["offloaded, ms"], "a call has its computation within"


def test_a_worker_attends_as_a_local_cache_does(address: str, offload: ModuleType) -> None:
    attention, setting = sys.modules["offload_attention"], sys.modules["offload_setting"]
    about = {"heads": offload.HEADS, "head_dim": offload.DIM, "capacity": 300}
    here = attention.seqpar.KVCache(attention.seqpar.Causal(), **about)
    with attention.Workers.join(address) as workers:
        there = attention.OffloadedCache(attention.seqpar.Causal(), workers=workers, **about)
        for cache in (here, there):
            torch.manual_seed(0)
            setting.fill(cache, 257)
            assert cache.lengths == (257,)
        inputs = setting.new_tokens(1, torch.float32)
        torch.testing.assert_close(there.attend(*inputs), here.attend(*inputs))


def test_busy_shares_are_shares(address: str, size: object, offload: ModuleType) -> None:
    rows = offload.rotation(address, size=size, rows=1, context=64, steps=4, runs=1)
    assert [row["batches"] for row in rows] == ["1 batch of 1", "1 batch of 2", "2 batches of 1 in rotation"]
    for row in rows:
        assert 0 < row["model busy, %"] <= 100
        assert 0 < row["worker busy, %"] <= 100


def test_late_keys_and_prompts(address: str, size: object, offload: ModuleType) -> None:
    rows = offload.late_keys(address, 256, 2)
    assert rows[-1]["queries wait for them, ms"] > rows[-1]["k and v come after, ms"]
    prompts = offload.prompt(address, size=size, tokens=32, runs=1)
    assert [row["MB sent"] for row in prompts] == [0.0, *[32 * 2 * 2 * 2 * 16 * 4 / 1e6] * 2]


def test_the_largest_batch_is_refused_one_row_more(address: str, size: object, offload: ModuleType) -> None:
    batches, cap = sys.modules["offload_batches"], 96 << 20
    about = {"size": size, "cap": cap, "context": 16_384, "steps": 1, "runs": 1, "threads": 1}
    here, there = (batches.Try(**about, address=where) for where in (None, address))
    text = here.capacity * size.kv_bytes(4)
    few, outcome, full = batches.largest(here, cap // text)
    assert 0 < few <= cap // text, "memory has no room for more"
    assert (outcome.full, full) == ("", "model rank")
    many = MEMORY // text
    assert many > cap // text
    assert batches.attempt(there, many).speed > 0
    assert batches.attempt(there, many + 1).full == "worker"


def test_parts_are_kept_beside_each_other(offload: ModuleType, tmp_path: Path) -> None:
    offload.keep("attention", {"a table": [1]}, tmp_path)
    offload.keep("overlap", {"another": [2]}, tmp_path)
    offload.keep("attention", {"a table": [3]}, tmp_path)
    kept = json.loads((tmp_path / "offload.json").read_text())["parts"]
    assert {name: next(reversed(part.values())) for name, part in kept.items()} == {"attention": [3], "overlap": [2]}
    assert all({"command", "date", "cpu"} <= part.keys() for part in kept.values())
