"""Checkpoints of a sharded run: written aside, renamed when whole, and loaded on any number of ranks."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from .distributed import Ranks
from .engines import Engine
from .errors import RunError
from .manifest import checkpoints, last_whole, name_of, read_manifest, whole_checkpoints, write_manifest
from .outputs import CHECKPOINTS


class Checkpoints:
    """The checkpoints of one run.

    directory: seen by all ranks. identity: what a run must share with the checkpoint it continues, by name. options:
    what it may change, which is then said. keep: how many to keep.
    """

    def __init__(
        self, directory: Path, identity: dict[str, Any], options: dict[str, Any], keep: int, ranks: Ranks
    ) -> None:
        self.directory, self.identity, self.options, self.keep, self.ranks = directory, identity, options, keep, ranks

    def save(self, step: int, engine: Engine) -> None:
        """Save the state after `step` steps; raises RunError where it can't be written, and keeps the earlier ones."""
        final, partial = self.directory / name_of(step), self.directory / f".{name_of(step)}"
        try:
            engine.save(partial)
        except dcp.api.CheckpointException as error:
            raise RunError(self._failed(final, cause(error))) from error
        except OSError as error:
            raise RunError(self._failed(final, str(error))) from error

        def finish() -> str:
            try:
                write_manifest(
                    partial, {"step": step, "ranks": self.ranks.size, "options": self.options, **self.identity}
                )
                if final.exists():
                    shutil.rmtree(final)
                partial.rename(final)
                kept = whole_checkpoints(self.directory)[: self.keep]
                for old in checkpoints(self.directory):
                    if old not in kept:
                        shutil.rmtree(old)
            except OSError as error:
                raise RunError(self._failed(final, str(error))) from error
            return ""

        self.ranks.on_rank0(finish)

    def _failed(self, path: Path, reason: str) -> str:
        last = last_whole(self.directory)
        kept = f"the last whole one is {last}" if last else "there is no whole one"
        return f"checkpoint {path} can't be written: {reason}; {kept}: free space or mend the folder, then --resume"

    def to_continue(self) -> Path:
        """The newest whole checkpoint, the same on every rank, for an engine to load.

        Raises ValueError where there is none, or where it belongs to a different run, naming the field.
        """
        return Path(self.ranks.on_rank0(self._choose))

    def load_weights(self, run: Path, model: nn.Module) -> None:
        """Load only the weights, from the newest whole checkpoint of another run's folder, into a whole model.

        Raises ValueError where there is none, or where it is of a model of another shape, naming the field.
        """

        def choose() -> str:
            path = last_whole(run / CHECKPOINTS)
            if path is None:
                raise ValueError(
                    f"--init found no whole checkpoint under {run / CHECKPOINTS}; name another run's --out"
                )
            self._check_same(path, [name for name in self.identity if name.startswith("model ")])
            return str(path)

        path = Path(self.ranks.on_rank0(choose))
        parameters = get_model_state_dict(model)
        dcp.load({"model": parameters}, checkpoint_id=path)
        set_model_state_dict(model, parameters)

    def _check_same(self, path: Path, names: Iterable[str]) -> None:
        manifest = {"engine": "torch", **read_manifest(path)}  # which those made before there were others do not say
        for name in names:
            if manifest.get(name) != self.identity[name]:
                raise ValueError(
                    f"checkpoint {path} was made with {name} {manifest.get(name)}, this run has {self.identity[name]}; "
                    f"expected the same: give the same {name}, or start anew with another --out"
                )

    def _choose(self) -> str:
        path = last_whole(self.directory, report=lambda line: print(f"seqpar train: {line}", flush=True))
        if path is None:
            raise ValueError(f"--resume found no whole checkpoint under {self.directory}; start anew in another --out")
        self._check_same(path, self.identity)
        before = read_manifest(path).get("options", {})
        for name in sorted(self.options.keys() & before.keys()):
            if self.options[name] != before[name]:
                option = name.replace("_", "-")
                print(
                    f"seqpar train: --{option} is {self.options[name]} from here on; it was {before[name]}", flush=True
                )
        return str(path)


def cause(error: dcp.api.CheckpointException) -> str:
    """What the first failing rank reported, without its traceback."""
    rank, (reason, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {reason}"
