"""Examples as somebody would run them."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, ranks: int, folder: Path, *options: object) -> str:
    """What an example prints; by torchrun, on a free port, where there is more than one rank."""
    start = [sys.executable]
    if ranks > 1:
        torchrun = Path(sysconfig.get_path("scripts"), "torchrun")
        start = [torchrun, "--nproc-per-node", ranks, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [str(x) for x in (*start, EXAMPLES / name, *options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
