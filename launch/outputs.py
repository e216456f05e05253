"""The folder that a run writes to."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .config import TrainConfig
from .manifest import checkpoints, last_whole
from .options import OptionError

METRICS, PLOT, CHECKPOINTS, MODEL = "metrics.jsonl", "loss.png", "checkpoints", "model"

OPTIONS = "seqpar.json"
"""In the folder of a run's model: what else it takes to use it, its mask above all."""


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
    model = out / MODEL
    if model.is_dir() and any(model.iterdir()) and not (model / OPTIONS).exists():
        raise ValueError(f"--out {out} holds a folder {MODEL}/ that is no run's; name another folder")
    if config.resume and not checkpoints(folder):
        raise ValueError(f"--resume found no checkpoint under {folder}; leave --resume out, or name the run's --out")
    if not config.resume and ((out / METRICS).exists() or checkpoints(folder)):
        raise ValueError(f"--out {out} already holds a run; continue it with --resume, or name another folder")
    return out


def is_run(path: Path) -> bool:
    """Whether this is the folder of a run that left its model."""
    return (path / MODEL / OPTIONS).is_file()


def check_model(path: Path) -> None:
    """Raise OptionError unless this is the folder of a run, or of a Hugging Face model."""
    if is_run(path) or (path / "config.json").is_file():
        return
    if (path / CHECKPOINTS).is_dir():
        raise OptionError(
            f"--model {path} is a run that left no {MODEL}/{OPTIONS}; expected what `seqpar train` writes when it "
            "starts: resume the run, which writes it"
        )
    raise OptionError(
        f"--model {path} holds no config.json, and is no run; name the folder of a Hugging Face model, or the "
        "--out folder of a `seqpar train` run"
    )


def newest_checkpoint(out: Path, report: Callable[[str], None] = lambda line: None) -> Path:
    """The newest whole checkpoint of a run. Raises ValueError where there is none.

    `report` gets a line about each newer one that isn't whole.
    """
    path = last_whole(out / CHECKPOINTS, report)
    if path is None:
        raise ValueError(
            f"--model {out} is a run without a whole checkpoint; expected one under {out / CHECKPOINTS}: let the run "
            "reach its first --save-every, or name another run"
        )
    return path


def remove_partial(directory: Path) -> None:
    """Remove what a checkpoint that was interrupted while being written left behind."""
    for path in directory.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
