"""The folder that a run writes to."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from .config import TrainConfig
from .manifest import checkpoints

METRICS, PLOT, CHECKPOINTS = "metrics.jsonl", "loss.png", "checkpoints"


def default_out() -> Path:
    """A new folder's path under runs/, named by date and time."""
    return Path("runs", time.strftime("%Y-%m-%d-%H%M%S"))


def prepare(config: TrainConfig) -> Path:
    """Make the run's folder and try to write in it.

    Raises ValueError where that fails, where there is an earlier run and no --resume, or --resume and no earlier run.
    """
    out = config.out if config.out is not None else default_out()
    folder = out / CHECKPOINTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder), tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out} can't be written: {error.strerror}; name a folder that can") from error
    if config.resume and not checkpoints(folder):
        raise ValueError(f"--resume found no checkpoint under {folder}; leave --resume out, or name the run's --out")
    if not config.resume and ((out / METRICS).exists() or checkpoints(folder)):
        raise ValueError(f"--out {out} already holds a run; continue it with --resume, or name another folder")
    return out


def remove_partial(directory: Path) -> None:
    """Remove what a checkpoint that was interrupted while being written left behind."""
    for path in directory.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
