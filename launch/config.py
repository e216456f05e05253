"""What `seqpar train` can be told: one frozen dataclass, from which the command line is derived."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .options import LONGEST_WAIT, OptionError, at_least, check_seed, option, positive

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "base": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "large": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
"""Llama shapes with grouped-query attention: about 0.1M, 1.7M, 76M and 1.1B parameters."""


_S2 = ("s2_block", "s2_local", "s2_stride", "s2_dense_heads", "s2_dense_layers", "s2_allow_incomplete")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a Llama-architecture language model on real text, with every sequence split over ranks.

    Runs by itself (`seqpar train --nproc 2`) or under `torchrun --no-python ... seqpar train`, with NCCL where there
    are GPUs and gloo where there are none. Writes metrics.jsonl, loss.png, checkpoints/ and model/ under --out.
    """

    data: tuple[Path, ...] = ()
    """Text files, or folders that are searched for them. Default: the sources of Python's standard library."""
    suffixes: tuple[str, ...] = ()
    """Take only files that end so, such as .py .md, of the folders. Default: every file that is UTF-8 text."""
    model: Path | None = None
    """A local Hugging Face checkpoint with its tokenizer. Default: a preset's shape with random weights, and bytes."""
    preset: Literal["tiny", "small", "base", "large"] | None = None
    """Shape of the model where --model is not given. Default: small."""

    engine: Literal["torch", "deepspeed", "megatron"] = "torch"
    """What trains the model: PyTorch's FSDP2, DeepSpeed's ZeRO, or Megatron-Core's GPTModel with DDP."""
    zero_stage: Literal[1, 2, 3] | None = None
    """What --engine deepspeed shards: the optimizer (1), gradients too (2), parameters too (3). Default: 2."""
    init: Path | None = None
    """Start from the weights of another run, its --out folder: to continue a dense model with s2, say."""

    seq_len: int = 2048
    """Tokens in one row, over all ranks that share it; needs no divisibility."""
    batch_size: int = 2
    """Rows in one step, over all ranks."""
    steps: int = 100
    """Optimizer steps."""
    lr: float = 3e-3
    """Peak learning rate; it falls to a tenth of that along a cosine."""
    warmup: int = 10
    """Steps over which the learning rate rises to its peak."""
    weight_decay: float = 0.1
    """AdamW's weight decay, for matrices only."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""
    seed: int = 0
    """Seed of the weights, of the order of the data and of the sample."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Precision of the computation; parameters, gradients and optimizer stay fp32. Default: bf16 on GPUs, else fp32."""

    sp: int | None = None
    """Ranks that share a sequence; the others repeat them with other rows. Default: all."""
    schedule: str = "ring"
    """How keys and queries of different ranks meet: ring, allgather, ulysses, or auto for what is found fastest."""
    exchange: Literal["auto", "forward", "direct"] = "auto"
    """The ring's exchange: every shard to every rank, or only the rows that some query needs."""
    layout: str = "zigzag"
    """Who holds which tokens: zigzag, contiguous, striped, balanced, document_zigzag, whole_documents, or auto."""
    mask: Literal["causal", "window", "s2"] = "causal"
    """Who attends to whom inside a document: all earlier tokens, the last --window of them, or sparsely-sharded."""
    window: int | None = None
    """Tokens that a query sees with --mask window, itself included. Default: 1024."""
    s2_block: int | None = None
    """Tokens of a block with --mask s2, a power of two. Default: 64."""
    s2_local: int | None = None
    """Blocks that every head sees up to the query's own, with --mask s2. Default: 16."""
    s2_stride: int | None = None
    """With --mask s2, a KV head sees one in so many of the older blocks. Default: the number of sparse KV heads."""
    s2_dense_heads: int = 0
    """KV heads, the last ones, that see everything with --mask s2."""
    s2_dense_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that see everything with --mask s2."""
    s2_allow_incomplete: bool = False
    """Let there be older blocks that no head sees with --mask s2; otherwise that is refused."""
    checkpoint_activations: Literal["none", "full", "selective"] = "none"
    """Recompute layers in the backward: none, all of them, or all but their attention and its communication."""

    eval_every: int = 25
    """Steps between evaluations on the held-out text (and one at the end); 0 never evaluates."""
    eval_batches: int = 2
    """Batches of held-out text in one evaluation."""
    sample_tokens: int = 200
    """Tokens of text to generate at the end; 0 for none."""
    verify: bool = False
    """Compute the first step unsharded too, with plain Hugging Face attention, and fail where they differ."""

    out: Path | None = None
    """Folder of the results. Default: a new one under runs/, named by date and time."""
    save_every: int = 100
    """Steps between checkpoints (and one at the end); 0 saves none."""
    keep: int = 2
    """Checkpoints to keep."""
    resume: bool = False
    """Continue exactly from the last whole checkpoint under --out; the number of ranks may differ, but for ZeRO."""

    nproc: int = 1
    """Ranks to start on this machine. Leave it out under torchrun, which starts them itself."""
    threads: int | None = None
    """CPU threads of each rank. Default: this machine's cores shared out evenly."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others before it gives up."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "steps", "eval_batches", "keep", "nproc"):
            at_least(1, name, getattr(self, name))
        for name in ("warmup", "eval_every", "save_every", "sample_tokens", "weight_decay", "grad_clip"):
            at_least(0, name, getattr(self, name))
        at_least(0, "s2_dense_heads", self.s2_dense_heads)
        for name in ("sp", "threads", "window", "s2_block", "s2_local", "s2_stride"):
            if getattr(self, name) is not None:
                at_least(1, name, getattr(self, name))
        for name, most in (("lr", 1e3), ("timeout", LONGEST_WAIT)):
            positive(name, getattr(self, name), most)
        for name in ("weight_decay", "grad_clip"):
            if not math.isfinite(getattr(self, name)):
                raise OptionError(
                    f"{option(name)} is {getattr(self, name)}; expected a finite number, 0 to switch it off"
                )
        check_seed(self.seed)
        if self.model is not None and not (self.model / "config.json").is_file():
            raise OptionError(
                f"--model {self.model} holds no config.json; name the folder of a Hugging Face checkpoint"
            )
        if self.window is not None and self.mask != "window":
            raise OptionError(f"--window {self.window} got --mask {self.mask}; only --mask window has one: add it")
        given = [name for name in _S2 if getattr(self, name) not in (None, 0, (), False)]
        if given and self.mask != "s2":
            raise OptionError(f"{option(given[0])} got --mask {self.mask}; only --mask s2 has it: add it")
        if self.init is not None and (self.resume or not (self.init / "checkpoints").is_dir()):
            wrong = "--resume too" if self.resume else "a folder without checkpoints"
            raise OptionError(
                f"--init {self.init} got {wrong}; expected the --out folder of another run, to begin a new one"
            )
        if self.zero_stage is not None and self.engine != "deepspeed":
            raise OptionError(
                f"--zero-stage {self.zero_stage} got --engine {self.engine}; only --engine deepspeed has one: add it"
            )
        if self.zero_stage == 3 and self.checkpoint_activations == "selective":
            raise OptionError(
                "--checkpoint-activations selective got --zero-stage 3, which gathers other parameters when a layer is "
                "recomputed; expected none or full: change one of them"
            )
        if self.engine == "megatron" and self.layout != "zigzag":
            raise OptionError(
                f"--layout {self.layout} got --engine megatron; expected zigzag, as Megatron deals each document's "
                "tokens: drop --layout"
            )
        if self.preset is not None and self.model is not None:
            raise OptionError(f"--preset {self.preset} got --model too; the model has its shape: drop one of them")
        if self.resume and self.out is None:
            raise OptionError("--resume got no --out; expected the folder of the run to continue")
        if self.schedule == "tree":
            raise OptionError(
                "--schedule tree got training, in which every token is a query; expected ring, allgather, ulysses or "
                "auto: a tree is for `seqpar generate`"
            )
        if self.schedule != "ring" and self.exchange != "auto":
            raise OptionError(
                f"--exchange {self.exchange} got --schedule {self.schedule}; only the ring has them: drop --exchange"
            )

    @property
    def zero(self) -> int:
        """The stage of --engine deepspeed."""
        return self.zero_stage or 2

    @property
    def window_tokens(self) -> int:
        """Tokens that a query sees at most, itself included, where the mask is a window."""
        return 1024 if self.window is None else self.window

    def sequence_ranks(self, world_size: int) -> int:
        """Ranks that share one sequence among `world_size`. Raises ValueError where the numbers don't fit together."""
        sp = self.sp if self.sp is not None else world_size
        if world_size % sp:
            raise ValueError(f"--sp {sp} got {world_size} ranks; expected a multiple: choose --sp among its divisors")
        if self.batch_size % (world_size // sp):
            raise ValueError(
                f"--batch-size {self.batch_size} got {world_size // sp} groups of {sp} ranks; expected a multiple: "
                f"use --batch-size {world_size // sp}, or a larger --sp"
            )
        if self.seq_len < sp:
            raise ValueError(
                f"--seq-len {self.seq_len} is shorter than the {sp} ranks that share it; expected a token for each: "
                f"use a larger --seq-len or a smaller --sp"
            )
        return sp

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON: paths as text, tuples as lists."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
