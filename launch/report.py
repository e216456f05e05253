"""What a run tells: a progress bar or plain lines, a line of JSON for each step, and a plot of the loss."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .outputs import METRICS, PLOT


@dataclass(kw_only=True)
class Step:
    """One line of metrics.jsonl.

    step counts from 1. loss is the mean over `tokens`, the batch's predicted tokens on all ranks, before the step's
    update. bytes_sent and bytes_by_kind are payload that all ranks together sent for attention and agreement in this
    step; peak_memory_bytes is the largest rank's so far. eval_loss and verified are there when measured.
    """

    step: int
    loss: float
    tokens: int
    seconds: float
    tokens_per_second: float
    bytes_sent: int
    bytes_by_kind: dict[str, int]
    grad_norm: float
    lr: float
    peak_memory_bytes: int
    eval_loss: float | None = None
    verified: dict[str, float] | None = field(default=None)


class Report:
    """Progress on the terminal and results in the run's folder; on ranks other than 0 it does nothing.

    Continuing a run, it keeps the metrics of the `done` steps that the checkpoint has behind it and drops later ones.
    """

    def __init__(self, out: Path, steps: int, done: int, is_rank0: bool) -> None:
        self.out, self.steps, self.is_rank0 = out, steps, is_rank0
        self._last_line = time.monotonic()
        self._stream: TextIO | None = None
        self._progress: Progress | None = None
        if not is_rank0:
            return
        earlier = [json.dumps(line) + "\n" for line in read_metrics(out) if line["step"] <= done]
        (out / METRICS).write_text("".join(earlier))
        self._stream = (out / METRICS).open("a", buffering=1)
        if sys.stdout.isatty():
            text, bar = TextColumn("{task.description}"), BarColumn(bar_width=20)
            self._progress = Progress(text, bar, MofNCompleteColumn(), TimeRemainingColumn(), console=Console())
            self._progress.start()
            self._task = self._progress.add_task("starting", total=steps, completed=done)

    def line(self, text: str) -> None:
        """A line of text above the progress bar."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        elif self.is_rank0:
            print(text, flush=True)

    def step(self, step: Step) -> None:
        """Record a step."""
        if self._stream is None:
            return
        line = {name: value for name, value in asdict(step).items() if value is not None}
        self._stream.write(json.dumps(line) + "\n")
        summary = (
            f"loss {step.loss:.4f} · {step.tokens_per_second:,.0f} tokens/s · {in_bytes(step.bytes_sent)}/step · "
            f"peak {in_bytes(step.peak_memory_bytes)}"
        )
        if step.eval_loss is not None:
            summary += f" · held-out {step.eval_loss:.4f}"
        if self._progress is not None:
            self._progress.update(self._task, description=summary, completed=step.step)
        is_edge = step.step in (1, self.steps) or step.eval_loss is not None
        if self._progress is None and (is_edge or time.monotonic() - self._last_line > 5):
            self._last_line = time.monotonic()
            left = (self.steps - step.step) * step.seconds
            print(f"step {step.step}/{self.steps} · {summary} · {left:.0f} s left", flush=True)

    def close(self) -> None:
        """End the progress bar and the file."""
        if self._progress is not None:
            self._progress.stop()
        if self._stream is not None:
            self._stream.close()
        self._progress = self._stream = None

    def plot(self) -> Path | None:
        """Draw the loss of training and held-out text over the steps; the picture's path, on rank 0."""
        if not self.is_rank0:
            return None
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        metrics = read_metrics(self.out)
        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot([line["step"] for line in metrics], [line["loss"] for line in metrics], label="training")
        held_out = [line for line in metrics if "eval_loss" in line]
        if held_out:
            steps, losses = [line["step"] for line in held_out], [line["eval_loss"] for line in held_out]
            axes.plot(steps, losses, "o-", label="held out")
        axes.set(xlabel="step", ylabel="loss (nats per token)", title="seqpar train")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.out / PLOT, dpi=120)
        return self.out / PLOT


def read_metrics(out: Path) -> list[dict]:
    """The lines of a run's metrics, but for one that was cut off when the run died."""
    try:
        lines = (out / METRICS).read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has held so far, on the device if it is a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_bytes(number: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"
