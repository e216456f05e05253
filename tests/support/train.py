"""Runs of `seqpar train` for tests: the real command, and many small runs whose ranks are forked from one process."""

from __future__ import annotations

import fcntl
import json
import os
import random
import resource
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

COMMAND = Path(sysconfig.get_path("scripts"), "seqpar")
SMALL = ("--preset", "tiny", "--seq-len", "331", "--threads", "1", "--sample-tokens", "0", "--timeout", "60")


def write_texts(folder: Path, documents: int = 30) -> Path:
    """Documents of words, of very different lengths, with some letters beyond ASCII."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnopqrstuvwxyzåß语", k=choose.randint(1, 9))) for _ in range(300)]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = " ".join(choose.choices(words, k=choose.choice((1, 20, 150, 700))))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def run_command(*arguments: object, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """The installed `seqpar` command, with its output as text."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, check=False, **options
    )


@contextmanager
def once(folder: Path) -> Iterator[bool]:
    """Whether this is the first of pytest's workers to come here; the others wait for it to be done."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not (folder / "done").exists()
        (folder / "done").touch()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of so many ranks with these options of `seqpar train`.

    by_rank: options that only some ranks get, besides. largest_file: bytes; writing a longer file fails.
    """

    ranks: int
    options: Sequence[object]
    by_rank: dict[int, Sequence[object]] = field(default_factory=dict)
    largest_file: int | None = None


@dataclass(frozen=True)
class Finished:
    """Exit codes by rank, and everything that the ranks wrote."""

    codes: list[int]
    output: str


def fork_ranks(runs: Sequence[Run], folder: Path, *, timeout: float = 240) -> list[Finished]:
    """One run after another, all of them forked from one process that imports what they need once."""
    code = "import sys; sys.path.pop(0); sys.path.append(sys.argv[1]); from support.train import _server; _server()"
    tests, jobs = Path(__file__).parent.parent, json.dumps([asdict(run) for run in runs], default=str)
    with once(folder) as first:
        if first:
            command = [sys.executable, "-c", code, tests, folder]
            subprocess.run(command, input=jobs, text=True, timeout=timeout, check=True)
    return [
        Finished(json.loads((folder / f"{number}.codes").read_text()), (folder / f"{number}.output").read_text())
        for number in range(len(runs))
    ]


def _server() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401

    import seqpar.launch.train  # noqa: F401

    folder = Path(sys.argv[2])
    for number, run in enumerate(json.load(sys.stdin)):
        ranks = [os.fork() or _rank(folder / str(number), rank, run) for rank in range(run["ranks"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]
        (folder / f"{number}.codes").write_text(json.dumps(codes))


def _rank(path: Path, rank: int, run: dict[str, Any]) -> int:
    from seqpar.launch.cli import parse_train, run_rank
    from seqpar.launch.spawn import Place

    output = os.open(path.with_suffix(".output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if run["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (run["largest_file"], run["largest_file"]))
    options = [str(option) for option in [*run["options"], *run["by_rank"].get(str(rank), ())]]
    place = Place(rank, run["ranks"], rank, run["ranks"], f"file://{path.with_suffix('.store')}")
    code = run_rank(parse_train(options), place)
    sys.stdout.flush()
    os._exit(code)


def losses(out: Path) -> list[float]:
    """The loss of each step of a run."""
    return [line["loss"] for line in metrics(out)]


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
