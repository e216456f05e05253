"""Ranks as real processes over gloo, found through a file, killed when one of them fails or hangs."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from seqpar.comm import StrictWorld, connect

_processes = multiprocessing.get_context("forkserver")
# What many jobs import, once instead of on every rank.
_processes.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed", "seqpar", "transformers.models.llama.modeling_llama"]
)


def run_gloo(size: int, function: Callable, *args: Any, strict: bool = False, timeout: float = 120.0) -> list[Any]:
    """Run ``function(world, *args)`` on ``size`` processes; what each returned, by rank.

    ``function`` must be importable (from ``support``, say). A rank that raises, dies or exceeds ``timeout`` seconds
    ends all of them and fails the test with its report.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _processes.Process(target=_rank_main, args=(rank, size, folder, strict, function, args), daemon=True)
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        try:
            _watch(ranks, time.monotonic() + timeout, Path(folder))
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]


def _watch(ranks: list[BaseProcess], deadline: float, folder: Path) -> None:
    while any(process.exitcode is None for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.005)
    # Of several reports the first is the cause; the others tell of a peer that went away.
    reports = sorted(folder.glob("*.error"))
    for rank, process in enumerate(ranks):
        if process.exitcode and not any(report.stem.endswith(f"-{rank}") for report in reports):
            raise AssertionError(f"rank {rank} of {len(ranks)} died with exit code {process.exitcode}")
    if reports:
        rank = int(reports[0].stem.split("-")[1])
        raise AssertionError(f"rank {rank} of {len(ranks)} raised:\n{reports[0].read_text()}")
    hung = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
    if hung:
        raise AssertionError(f"ranks {hung} of {len(ranks)} still ran at the deadline")


def _rank_main(rank: int, size: int, folder: str, strict: bool, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        world = StrictWorld(dist.group.WORLD) if strict else connect(dist.group.WORLD)
        torch.save(function(world, *args), f"{folder}/{rank}.pt")
        dist.barrier()
    except BaseException:
        report = Path(f"{folder}/{time.monotonic_ns():020}-{rank}.writing")
        report.write_text(traceback.format_exc())
        report.rename(report.with_suffix(".error"))
        os._exit(1)
    dist.destroy_process_group()
