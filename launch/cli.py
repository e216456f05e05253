"""The `seqpar` command line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .config import OptionError, TrainConfig
from .data import find_documents
from .errors import FAILED, RunError, describe
from .manifest import last_whole, step_of
from .outputs import CHECKPOINTS, default_out, prepare
from .spawn import Place, alone, child_place, run_ranks, torchrun_place

if TYPE_CHECKING:
    from .picture import PictureConfig

_Config = TypeVar("_Config", TrainConfig, "PictureConfig")

USAGE = """usage: seqpar COMMAND [OPTIONS]

Attention over sequences that are split over ranks.

commands:
  train    train a language model on real text, with every sequence split over ranks
  picture  draw a sparsely-sharded mask, and what each rank sends to whom under it

`seqpar COMMAND --help` lists a command's options; `seqpar --version` prints the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (by default the process's own), and return its exit code."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv) or ["--help"])
    except BrokenPipeError:
        # The reader of our output has seen enough; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _main(argv: Sequence[str]) -> int:
    command, *rest = argv
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        from importlib.metadata import version

        print(f"seqpar {version('seqpar')}")
        return 0
    commands = {"train": _train, "picture": _picture}
    if command not in commands:
        expected = " or ".join(commands)
        return _report("seqpar", ValueError(f"unknown command {command!r}; expected {expected}: see seqpar --help"))
    debug = "--debug" in rest
    try:
        return commands[command](rest)
    except KeyboardInterrupt:
        return _report(f"seqpar {command}", RunError("interrupted"))
    except BrokenPipeError:
        raise
    except Exception as error:
        return _report(f"seqpar {command}", error, debug)


def child() -> int:
    """A rank that the launcher started."""
    place, argv = child_place(sys.argv[1:])
    return run_rank(parse_train(argv), place)


def parse_train(argv: Sequence[str]) -> TrainConfig:
    """The configuration that these options of `seqpar train` make. Raises ValueError in one line for wrong ones."""
    return _parse(TrainConfig, "seqpar train", argv)


def _parse(kind: type[_Config], command: str, argv: Sequence[str]) -> _Config:
    import tyro

    _refuse_unknown(kind, command, argv)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=command, args=argv, config=(tyro.conf.FlagCreatePairsOff,), compact_help=False)
    except SystemExit as stop:
        if not stop.code:
            raise
        if isinstance(stop.__context__, OptionError):
            raise stop.__context__ from None
        raise ValueError(_first_part(complaint.getvalue()) + f"; see {command} --help") from None


def _refuse_unknown(kind: type[_Config], command: str, argv: Sequence[str]) -> None:
    known = ["--help", *(f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind))]
    for argument in argv:
        option = argument.split("=")[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"see {command} --help"
            raise ValueError(f"unknown option {argument.split('=')[0]}; {remedy}")


def _first_part(box: str) -> str:
    """The message inside the frame that tyro draws, up to its first rule."""
    words: list[str] = []
    for line in box.splitlines():
        inside = line.strip("│ ")
        if line.startswith("│") and set(inside) == {"─"}:
            break
        if line.startswith("│"):
            words.append(inside)
    return " ".join(words) or " ".join(box.split())


def _picture(argv: Sequence[str]) -> int:
    from .picture import PictureConfig, draw

    print(draw(_parse(PictureConfig, "seqpar picture", argv)))
    return 0


def _train(argv: Sequence[str]) -> int:
    config = parse_train(argv)
    place = torchrun_place()
    if place is not None:
        if config.nproc > 1:
            raise ValueError(
                f"--nproc {config.nproc} got {place.size} ranks by torchrun; leave --nproc out under torchrun"
            )
        return run_rank(config, place)
    config.sequence_ranks(config.nproc)
    find_documents(config.data, config.suffixes)
    if config.out is None:
        config = dataclasses.replace(config, out=default_out())
    prepare(config)
    if config.nproc == 1:
        with alone() as only:
            return run_rank(config, only)
    out = Path(config.out or default_out())
    return run_ranks(config.nproc, [*argv, "--out", str(out)], lambda: _advice(out, argv))


def _advice(out: Path, argv: Sequence[str]) -> str:
    checkpoint = last_whole(out / CHECKPOINTS)
    if checkpoint is None:
        return "no checkpoint was saved yet"
    options = [argument for argument in argv if argument != "--resume"]
    command = shlex.join(
        ["seqpar", "train", *options, *([] if "--out" in options else ["--out", str(out)]), "--resume"]
    )
    return f"last whole checkpoint: {checkpoint} (step {step_of(checkpoint)}); resume with: {command}"


def run_rank(config: TrainConfig, place: Place) -> int:
    """Run one rank and return its exit code. One of several that fails ends its process here."""
    try:
        from .train import run

        run(config, place)
        return 0
    except KeyboardInterrupt:
        code = _report("seqpar train", RunError("interrupted"))
    except Exception as error:
        prefix = "seqpar train" if place.size == 1 else f"seqpar train: rank {place.rank}"
        code = _report(prefix, error, config.debug)
    if place.size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _report(prefix: str, error: BaseException, debug: bool = False) -> int:
    known = describe(error)
    if known is None or debug:
        traceback.print_exception(error)
    message, code = known or (f"{type(error).__name__}: {error}", FAILED)
    print(f"{prefix}: error: {message}", file=sys.stderr, flush=True)
    return code
