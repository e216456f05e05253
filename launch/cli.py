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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from . import megatron
from .attention_worker_config import AttentionWorkerConfig
from .check_config import CheckConfig
from .config import TrainConfig
from .data import find_documents
from .errors import FAILED, RunError, describe
from .generate_config import GenerateConfig
from .local_workers import LocalWorkers, at_address, local_workers
from .manifest import last_whole, step_of
from .options import OptionError, option
from .outputs import CHECKPOINTS, default_out, newest_checkpoint, prepare
from .prompts import read_prompts
from .spawn import Place, alone, child_place, end_with_launcher, run_ranks, torchrun_place

if TYPE_CHECKING:
    from .picture import PictureConfig
    from .plan_offload import PlanOffloadConfig

_RankConfig = TrainConfig | GenerateConfig | CheckConfig | AttentionWorkerConfig
_Config = TypeVar(
    "_Config", TrainConfig, GenerateConfig, CheckConfig, AttentionWorkerConfig, "PictureConfig", "PlanOffloadConfig"
)

USAGE = """usage: seqpar COMMAND [OPTIONS]

Attention over sequences that are split over ranks.

commands:
  train             train a language model on real text, with every sequence split over ranks
  generate          continue text with a language model, its key-value cache split over ranks or on workers
  attention-worker  hold keys and values for `generate`, and attend to them
  check             run a model sharded and unsharded, and say whether they agree, layer by layer
  megatron          run a script of Megatron-LM as it is, with seqpar's attention and flags
  picture           draw a sparsely-sharded mask, and what each rank sends to whom under it
  plan-offload      say what attention on workers costs: bandwidth, time, batch, tokens per dollar

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
    commands = {
        "train": _train,
        "generate": _generate,
        "attention-worker": _attention_worker,
        "check": _check,
        "megatron": _megatron,
        "picture": _picture,
        "plan-offload": _plan_offload,
    }
    if command not in commands:
        *names, last = commands
        expected = f"{', '.join(names)} or {last}"
        return _report(None, ValueError(f"unknown command {command!r}; expected {expected}: see seqpar --help"))
    debug = "--debug" in rest or command == "megatron"  # whose script brings errors of its own
    try:
        return commands[command](rest)
    except KeyboardInterrupt:
        return _report(command, RunError("interrupted"))
    except BrokenPipeError:
        raise
    except Exception as error:
        return _report(command, error, debug=debug)


def child() -> int:
    """A rank that the launcher started: of the command that comes first, with its options."""
    place, (command, *argv) = child_place(sys.argv[1:])
    parse: dict[str, Callable[[Sequence[str]], _RankConfig]] = {
        "train": parse_train,
        "generate": parse_generate,
        "check": parse_check,
        "attention-worker": parse_attention_worker,
    }
    return run_rank(parse[command](argv), place)


def job() -> int:
    """A command that another one started beside itself, and that ends with it."""
    end_with_launcher()
    return main()


def parse_train(argv: Sequence[str]) -> TrainConfig:
    """The configuration that these options of `seqpar train` make. Raises ValueError in one line for wrong ones."""
    return _parse(TrainConfig, "seqpar train", argv)


def parse_generate(argv: Sequence[str]) -> GenerateConfig:
    """The configuration that these options of `seqpar generate` make. Raises ValueError in one line for wrong ones."""
    return _parse(GenerateConfig, "seqpar generate", _one_each(argv, ("--prompt", "--prompt-file")), append=True)


def parse_attention_worker(argv: Sequence[str]) -> AttentionWorkerConfig:
    """The configuration that these options of `seqpar attention-worker` make. Raises ValueError in one line."""
    return _parse(AttentionWorkerConfig, "seqpar attention-worker", argv)


def parse_check(argv: Sequence[str]) -> CheckConfig:
    """The configuration that these options of `seqpar check` make. Raises ValueError in one line for wrong ones."""
    return _parse(CheckConfig, "seqpar check", _named(argv, CheckConfig, "--model"))


def _named(argv: Sequence[str], kind: type[CheckConfig], name: str) -> list[str]:
    """Put the option's name before the first argument that belongs to none: `MODEL` as `--model=MODEL`."""
    spread, wanted, is_value = list[str](), not any(x.split("=")[0] == name for x in argv), False
    flags = [option(field.name) for field in dataclasses.fields(kind) if field.type == "bool"]
    for argument in argv:
        is_option = argument.startswith("--")
        if wanted and not is_option and not is_value and argument != "-h":
            spread.append(f"{name}={argument}")
            wanted = False
        else:
            spread.append(argument)
        is_value = is_option and "=" not in argument and argument.replace("_", "-") not in flags
    return spread


def _one_each(argv: Sequence[str], options: Sequence[str]) -> list[str]:
    """Repeat each of these options for every one of its values: `--prompt a b` as `--prompt=a --prompt=b`."""
    spread: list[str] = []
    current = None
    for argument in argv:
        if argument.startswith("-"):
            name = argument.split("=")[0].replace("_", "-")
            current = name if name in options else None
            spread.append(argument)
        elif current is None:
            spread.append(argument)
        else:
            if spread[-1].replace("_", "-") == current:
                spread.pop()
            spread.append(f"{current}={argument}")
    return spread


def _parse(kind: type[_Config], command: str, argv: Sequence[str], *, append: bool = False) -> _Config:
    import tyro

    _refuse_unknown(kind, command, argv)
    # With append, an option of several values takes one each time it is given.
    settings = (tyro.conf.FlagCreatePairsOff, *([tyro.conf.UseAppendAction] if append else []))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=command, args=argv, config=settings, compact_help=False)
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


def _plan_offload(argv: Sequence[str]) -> int:
    from .plan_offload import PlanOffloadConfig, told

    print(told(_parse(PlanOffloadConfig, "seqpar plan-offload", argv)))
    return 0


def _train(argv: Sequence[str]) -> int:
    config = parse_train(argv)
    place = _by_torchrun(config.nproc)
    if place is not None:
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
    return run_ranks(config.nproc, ["train", *argv, "--out", str(out)], lambda: _advice(out, argv))


def _generate(argv: Sequence[str]) -> int:
    config = parse_generate(argv)
    place = _by_torchrun(config.nproc)
    if place is not None:
        if config.num_workers:
            raise ValueError(
                f"--attention-workers {config.attention_workers} got ranks by torchrun; expected HOST:PORT of workers "
                "that are there: start them with seqpar attention-worker, or leave torchrun out and use --nproc"
            )
        return run_rank(config, place)
    prompts = read_prompts(config)
    config.check_shares(len(prompts), config.nproc)
    if config.is_run:
        newest_checkpoint(config.model)
    if config.num_workers:
        with local_workers(config) as workers:
            return _generate_here(config, argv, workers)
    return _generate_here(config, argv)


def _generate_here(config: GenerateConfig, argv: Sequence[str], workers: LocalWorkers | None = None) -> int:
    if config.nproc == 1:
        with alone() as only:
            return run_rank(config, only, workers)
    if workers is not None:
        argv = at_address(argv, workers.address())
    return run_ranks(config.nproc, ["generate", *argv], lambda: "mend its cause and run the command again")


def _attention_worker(argv: Sequence[str]) -> int:
    config = parse_attention_worker(argv)
    place = _by_torchrun(config.nproc)
    if place is not None:
        return run_rank(config, place)
    from .worker_job import run_workers

    return run_workers(config, argv)


def _check(argv: Sequence[str]) -> int:
    config = parse_check(argv)
    place = _by_torchrun(config.nproc)
    if place is not None:
        return run_rank(config, place)
    if config.nproc == 1:
        with alone() as only:
            return run_rank(config, only)
    return run_ranks(config.nproc, ["check", *argv], lambda: "the lines above say why")


def _megatron(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(megatron.USAGE)
        return 0
    try:
        script = megatron.prepare(argv)
    except ValueError as error:
        return _report("megatron", error)
    megatron.run(script)
    return 0


def _by_torchrun(nproc: int) -> Place | None:
    """This rank's place where torchrun started it. Raises ValueError where --nproc asks for ranks besides."""
    place = torchrun_place()
    if place is not None and nproc > 1:
        raise ValueError(f"--nproc {nproc} got {place.size} ranks by torchrun; leave --nproc out under torchrun")
    return place


def _advice(out: Path, argv: Sequence[str]) -> str:
    checkpoint = last_whole(out / CHECKPOINTS)
    if checkpoint is None:
        return "no checkpoint was saved yet"
    options, skipped = list[str](), False
    for argument in argv:
        if not skipped and argument != "--resume" and argument.split("=")[0] != "--init":
            options.append(argument)
        skipped = argument == "--init"
    given = any(argument.split("=")[0] == "--out" for argument in options)
    command = shlex.join(["seqpar", "train", *options, *([] if given else ["--out", str(out)]), "--resume"])
    return f"last whole checkpoint: {checkpoint} (step {step_of(checkpoint)}); resume with: {command}"


def run_rank(config: _RankConfig, place: Place, workers: LocalWorkers | None = None) -> int:
    """Run one rank and return its exit code. One of several that fails ends its process here, and so does any worker.

    workers: of a rank that has some of its own.
    """
    commands = {TrainConfig: "train", GenerateConfig: "generate", CheckConfig: "check"}
    command = commands.get(type(config), "attention-worker")
    is_worker = isinstance(config, AttentionWorkerConfig)
    rank = place.rank if place.size > 1 else None
    try:
        code = _run(config, place, workers)
    except KeyboardInterrupt:
        code = _report(command, RunError("interrupted"))
    except BrokenPipeError:
        if rank is None:
            raise
        code = FAILED
    except Exception as error:
        code = _report(command, error, rank, debug=config.debug)
    else:
        if not is_worker:
            return code
    if rank is not None or is_worker:  # whose threads may be in calls that Python can't end well
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(config: _RankConfig, place: Place, workers: LocalWorkers | None) -> int:
    if isinstance(config, TrainConfig):
        from .train import run as train

        train(config, place)
    elif isinstance(config, GenerateConfig):
        from .generate import run as generate

        generate(config if workers is None else config.with_workers_at(workers.address()), place)
    elif isinstance(config, AttentionWorkerConfig):
        from .attention_worker import run as attention_worker

        return attention_worker(config, place)
    else:
        from .check import run as check

        return 0 if check(config, place) else FAILED  # and rank 0 has said why
    return 0


def _report(command: str | None, error: BaseException, rank: int | None = None, *, debug: bool = False) -> int:
    known = describe(error, command)
    if known is None or debug:
        traceback.print_exception(error)
    message, code = known or (f"{type(error).__name__}: {error}", FAILED)
    prefix = "seqpar" + (f" {command}" if command else "") + (f": rank {rank}" if rank is not None else "")
    print(f"{prefix}: error: {message}", file=sys.stderr, flush=True)
    return code
