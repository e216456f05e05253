"""Attention workers for one run of `seqpar generate`: a job of their own on this machine, which ends with the run."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .errors import RunError
from .generate_config import GenerateConfig
from .options import option
from .spawn import end, start_job

_READY = re.compile(r"seqpar attention-worker: ready at (\S+), ")
_ROUTINE = re.compile(r"seqpar attention-worker: (worker \d+: caller \d+ (is here|left)|ready at )")
_PATIENCE = 5.0


class LocalWorkers:
    """The job, while it runs. What it says is passed on, but for who comes and goes."""

    def __init__(self, job: subprocess.Popen[str], *, all_of_it: bool) -> None:
        self._job, self._all_of_it = job, all_of_it
        self._address: str | None = None
        self._settled = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def address(self) -> str:
        """Where they are, when they are ready. Raises RunError where they fail before."""
        self._settled.wait()
        if self._address is None:
            raise RunError("the attention workers did not start; their own output says why")
        return self._address

    def _listen(self) -> None:
        assert self._job.stderr is not None, "it was started with a pipe"
        for line in self._job.stderr:
            ready = _READY.match(line)
            if ready:
                self._address = ready[1]
                self._settled.set()
            if self._all_of_it or not _ROUTINE.match(line):
                sys.stderr.write(line)
                sys.stderr.flush()
        self._settled.set()


@contextmanager
def local_workers(config: GenerateConfig) -> Iterator[LocalWorkers]:
    """The workers that --attention-workers N asks for, as long as the context lasts."""
    options = ["--listen=127.0.0.1:0", f"--nproc={config.attention_workers}", f"--deadline={config.worker_deadline}"]
    if config.worker_memory is not None:
        options.append(f"--memory={config.worker_memory!r}")
    job = start_job(["attention-worker", *options])
    try:
        yield LocalWorkers(job, all_of_it=config.debug)
    finally:
        if job.poll() is None:
            job.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(_PATIENCE)
        end([job])


def at_address(argv: Sequence[str], address: str) -> list[str]:
    """The options of a run with workers of its own, for ranks that find those at an address."""
    kept, skips = list[str](), False
    for argument in argv:
        name = argument.split("=")[0].replace("_", "-")
        if name in (option("attention_workers"), option("worker_memory")):
            skips = "=" not in argument
        elif skips:
            skips = False
        else:
            kept.append(argument)
    return [*kept, f"--attention-workers={address}"]
