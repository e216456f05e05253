"""Runs of `seqpar train` by every engine, whose ranks are forked from one process that has imported the frameworks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from . import train


def fork_engines(runs: Sequence[train.Run], folder: Path) -> list[train.Finished]:
    """As `train.fork_ranks`, which finds that the runs are made already."""
    code = "import sys; sys.path.pop(0); sys.path.append(sys.argv[1]); from support.jobs_engines import _main; _main()"
    jobs = json.dumps([asdict(run) for run in runs], default=str)
    with train.once(folder) as first:
        if first:
            command = [sys.executable, "-W", "ignore", "-c", code, Path(train.__file__).parent.parent, folder]
            subprocess.run(command, input=jobs, text=True, timeout=400, check=True)
    return train.fork_ranks(runs, folder)


def _main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401

    import seqpar.integrations.megatron  # noqa: F401

    train._server()
