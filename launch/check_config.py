"""What `seqpar check` can be told: one frozen dataclass, from which the command line is derived."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from .options import LONGEST_WAIT, OptionError, at_least, check_seed, positive
from .outputs import check_model

_Schedule = Literal["ring", "allgather", "ulysses", "auto"]
_Layout = Literal["zigzag", "contiguous", "striped", "balanced", "document_zigzag", "whole_documents", "auto"]
SCHEDULES: tuple[str, ...] = get_args(_Schedule)
LAYOUTS: tuple[str, ...] = get_args(_Layout)


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Say whether a language model computes the same with every sequence split over ranks as it does alone.

    One batch goes forward and backward through the model twice: on all ranks with seqpar's attention, and on rank 0
    with PyTorch's own, each document alone. Compared are the loss, the logits, the output of every layer and of its
    attention, and the gradient of every parameter. Runs by itself (`seqpar check MODEL --nproc 2`) or under
    `torchrun --no-python ... seqpar check MODEL`, with NCCL where there are GPUs and gloo where there are none. Exits
    with 0 where they agree and with 1 where they don't, naming the first layer that differs. A folder without weights
    gets random ones, and one without a tokenizer takes bytes for tokens.
    """

    model: Path
    """Folder of a Hugging Face causal language model, or a `seqpar train` run's --out; --model may be left out."""

    text: Path | None = None
    """File of UTF-8 text for the batch. Default: the sources of Python's standard library."""
    seq_len: int | None = None
    """Tokens in one row, over all ranks; needs no divisibility. Default: 512, or as many as the model has positions."""
    batch_size: int = 2
    """Rows of the batch."""
    no_documents: bool = False
    """Let each row be one document, instead of several that are packed and don't see each other."""
    seed: int = 0
    """Seed of where documents end, of which text comes first, and of the weights where the folder has none."""

    schedule: _Schedule = "ring"
    """How keys and queries of different ranks meet."""
    layout: _Layout = "zigzag"
    """Who holds which tokens."""
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Precision of weights and computation. fp64 tells a fault from rounding."""

    json: bool = False
    """Print nothing but the report, as one JSON object."""

    nproc: int = 1
    """Ranks to start on this machine. Leave it out under torchrun, which starts them itself."""
    threads: int | None = None
    """CPU threads of each rank. Default: this machine's cores shared out evenly."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others before it gives up; rank 0 computes the unsharded side meanwhile."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "nproc"):
            at_least(1, name, getattr(self, name))
        if self.seq_len is not None:
            at_least(2, "seq_len", self.seq_len)  # of one token nothing is predicted
        if self.threads is not None:
            at_least(1, "threads", self.threads)
        check_seed(self.seed)
        positive("timeout", self.timeout, LONGEST_WAIT)
        if self.text is not None and not self.text.is_file():
            raise OptionError(f"--text {self.text} is no file; name a file of UTF-8 text")
        check_model(self.model)
