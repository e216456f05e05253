"""What `seqpar generate` can be told: one frozen dataclass, from which the command line is derived."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

from .attention_worker_config import LONGEST_CALL, MOST_GIB, check_address
from .options import LONGEST_WAIT, OptionError, at_least, check_seed, option, positive
from .outputs import check_model, is_run

_Schedule = Literal["tree", "ring", "allgather", "ulysses", "auto"]
_Layout = Literal["zigzag", "contiguous", "striped", "balanced", "auto"]
SCHEDULES: tuple[str, ...] = get_args(_Schedule)
LAYOUTS: tuple[str, ...] = get_args(_Layout)

_OF_WORKERS = frozenset(
    {
        "batches",
        "ledger",
        "offload_heads",
        "offload_local",
        "offload_segments",
        "worker_deadline",
        "worker_loss",
        "worker_memory",
    }
)

MOST_WORKERS = 256
"""More on one machine is a port whose host was forgotten."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue text with a language model, its key-value cache sharded over all ranks.

    Runs by itself (`seqpar generate --nproc 2`) or under `torchrun --no-python ... seqpar generate`, with NCCL where
    there are GPUs and gloo where there are none. Text goes to stdout, what it took to stderr. Of one prompt text is
    printed as it comes, of several when all are done.
    """

    model: Path
    """Folder of a Hugging Face causal language model with its tokenizer, or a `seqpar train` run's --out folder."""
    prompt: tuple[str, ...] = ()
    """Text to continue; several are a batch. One that begins with a dash is written --prompt=TEXT."""
    prompt_file: tuple[Path, ...] = ()
    """Files of UTF-8 text, each of them one prompt as it is, after those of --prompt."""

    max_new_tokens: int = 200
    """Tokens to generate for each prompt, at most."""
    temperature: float = 0.0
    """Of sampling; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Sample among so many of the likeliest tokens. Default: all."""
    top_p: float | None = None
    """Sample among the likeliest tokens that have this probability together. Default: all."""
    seed: int = 0
    """Seed of sampling. Batches that attention workers serve, by rank and in rotation, draw from this and the next."""
    ignore_eos: bool = False
    """Go on after a token that ends a text, to exactly --max-new-tokens."""

    chunk: int = 4096
    """Tokens of the prompts that go through the model at a time, over all ranks; bounds memory."""
    schedule: _Schedule | None = None
    """How keys and queries of different ranks meet in the prompts' first chunk; later ones meet the cache as a tree,
    which is also the default."""
    layout: _Layout | None = None
    """Who holds which tokens of a chunk. Default: zigzag."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Precision of weights, computation and cache. Default: bf16 on GPUs, else fp32."""

    attention_workers: str | None = None
    """Keep keys and values, and compute the attention over them, on workers: HOST:PORT of `seqpar attention-worker`; or
    a number of workers to start on this machine, which end with the run. Each rank then has its own of the prompts."""
    batches: int = 1
    """With 2, each rank's prompts are two batches in rotation: one computes while the other waits for its workers."""
    offload_heads: int | None = None
    """Ranges of KV heads that each prompt is cut into, for different workers. Default: one for each worker."""
    offload_segments: int = 1
    """Segments of the text that each range of heads is cut into, for different workers."""
    offload_local: int = 0
    """So many of a prompt's heads x segments parts stay with the model."""
    worker_memory: float | None = None
    """GiB for keys and values of each worker that is started. Default: 80% of what is free, shared out evenly."""
    worker_deadline: float = 30.0
    """Seconds that a worker may take for a call; then it counts as lost."""
    worker_loss: Literal["fail", "recompute"] = "recompute"
    """When a worker is lost: end with an error; or rebuild what it held on the others, from the tokens, and go on with
    the same text."""
    ledger: bool = False
    """Print who holds which keys and values, after the prompts are read."""

    json: bool = False
    """Print nothing but one JSON object at the end: texts, tokens, counts, times and bytes."""

    nproc: int = 1
    """Ranks to start on this machine. Leave it out under torchrun, which starts them itself."""
    threads: int | None = None
    """CPU threads of each rank. Default: this machine's cores shared out evenly."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others before it gives up."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "chunk", "nproc", "batches", "offload_segments"):
            at_least(1, name, getattr(self, name))
        for name in ("top_k", "threads", "offload_heads"):
            if getattr(self, name) is not None:
                at_least(1, name, getattr(self, name))
        if not 0 <= self.temperature < float("inf"):
            raise OptionError(
                f"--temperature is {self.temperature}; expected 0, the likeliest token each time, or a positive number"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise OptionError(f"--top-p is {self.top_p}; expected a probability, more than 0 and at most 1")
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and not self.temperature:
                raise OptionError(
                    f"{option(name)} {getattr(self, name)} got --temperature 0, which takes the likeliest token each "
                    f"time; expected a positive --temperature: add one, or drop {option(name)}"
                )
        check_seed(self.seed)
        positive("timeout", self.timeout, LONGEST_WAIT)
        if not self.prompt and not self.prompt_file:
            raise OptionError("--prompt and --prompt-file are both missing; expected one prompt or more: give either")
        self._check_workers()
        check_model(self.model)

    def _check_workers(self) -> None:
        at_least(0, "offload_local", self.offload_local)
        if self.batches > 2:
            raise OptionError(f"--batches is {self.batches}; expected 1 or 2")
        positive("worker_deadline", self.worker_deadline, LONGEST_CALL)
        if self.worker_memory is not None:
            positive("worker_memory", self.worker_memory, MOST_GIB)
        if self.attention_workers is None:
            for field in fields(self):
                if field.name in _OF_WORKERS and getattr(self, field.name) != field.default:
                    raise OptionError(
                        f"{option(field.name)} got no --attention-workers; expected some: add them, or drop "
                        f"{option(field.name)}"
                    )
            return
        if self.num_workers is None:
            check_address("attention_workers", self.attention_workers)
        else:
            at_least(1, "attention_workers", self.num_workers)
            if self.num_workers > MOST_WORKERS:
                raise OptionError(
                    f"--attention-workers is {self.num_workers}; expected at most {MOST_WORKERS} to start here, or "
                    "HOST:PORT of those that are there"
                )
        for name in ("schedule", "layout"):
            if getattr(self, name) is not None:
                raise OptionError(
                    f"{option(name)} {getattr(self, name)} got --attention-workers, with which each rank reads its own "
                    f"prompts; drop {option(name)}"
                )
        if self.worker_memory is not None and self.num_workers is None:
            raise OptionError(
                f"--worker-memory got workers that are there, at {self.attention_workers}; expected a number of them "
                "to start: drop it, and give --memory to those that are there"
            )

    @property
    def num_workers(self) -> int | None:
        """How many attention workers to start, where --attention-workers says a number."""
        given = self.attention_workers
        return int(given) if given is not None and given.isdecimal() else None

    def with_workers_at(self, address: str) -> GenerateConfig:
        """The same with the workers that were started."""
        return replace(self, attention_workers=address, worker_memory=None)

    def check_shares(self, prompts: int, ranks: int) -> None:
        """Raise ValueError where attention workers serve fewer prompts than there are ranks and batches."""
        if self.attention_workers is None or prompts >= ranks * self.batches:
            return
        wanted = f"{ranks} ranks" + (" of 2 batches" if self.batches > 1 else "")
        remedy = "drop --batches 2" if prompts >= ranks else f"use {prompts} ranks at most"
        raise ValueError(
            f"--prompt: got {prompts} prompts for {wanted}, each with prompts of its own; expected "
            f"{ranks * self.batches} or more: {remedy}"
        )

    @property
    def is_run(self) -> bool:
        """Whether --model is the folder of a run."""
        return is_run(self.model)
