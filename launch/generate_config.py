"""What `seqpar generate` can be told: one frozen dataclass, from which the command line is derived."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from .options import LONGEST_WAIT, OptionError, at_least, check_seed, option, positive
from .outputs import check_model, is_run

_Schedule = Literal["tree", "ring", "allgather", "ulysses", "auto"]
_Layout = Literal["zigzag", "contiguous", "striped", "balanced", "auto"]
SCHEDULES: tuple[str, ...] = get_args(_Schedule)
LAYOUTS: tuple[str, ...] = get_args(_Layout)


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
    """Seed of sampling."""
    ignore_eos: bool = False
    """Go on after a token that ends a text, to exactly --max-new-tokens."""

    chunk: int = 4096
    """Tokens of the prompts that go through the model at a time, over all ranks; bounds memory."""
    schedule: _Schedule = "tree"
    """How keys and queries of different ranks meet in the prompts' first chunk; later ones meet the cache as a tree."""
    layout: _Layout = "zigzag"
    """Who holds which tokens of a chunk."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Precision of weights, computation and cache. Default: bf16 on GPUs, else fp32."""

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
        for name in ("max_new_tokens", "chunk", "nproc"):
            at_least(1, name, getattr(self, name))
        for name in ("top_k", "threads"):
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
        check_model(self.model)

    @property
    def is_run(self) -> bool:
        """Whether --model is the folder of a run."""
        return is_run(self.model)
