"""What `seqpar check` runs: a model with whatever weights its folder has, and a batch of packed documents."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from seqpar.integrations import huggingface

from .check_config import CheckConfig
from .config import TrainConfig
from .data import Batch, find_documents
from .loading import Source, load_model, read_source
from .masks import layer_masks
from .outputs import is_run
from .runs import read_run
from .text import ByteText, Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEQ_LEN = 512
"""Tokens in one row where --seq-len is not given, and the model has positions for them."""

# Layouts that take one way to cut rows into documents only.
_BY_DOCUMENT = ("document_zigzag", "whole_documents")
_PIECE = 1 << 16
"""Characters of text that are made tokens at a time."""
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")


def read_model(path: Path, report: Callable[[str], None]) -> tuple[Source, TrainConfig | None]:
    """The model in a folder, and of a run the configuration that has its mask.

    Raises ValueError for what is missing or can't be read. `report` gets a line about what is passed over.
    """
    if is_run(path):
        run = read_run(path, report)
        masks = layer_masks(run.mask, run.shape)
        return Source(path, run.folder, run.shape, run.text, masks, ends=(), checkpoint=run.checkpoint), run.mask
    if _holds(path, _TOKENIZER):
        return read_source(path, report), None
    from transformers import AutoConfig

    try:
        shape = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {path} has a config that can't be read ({_first_line(error)}); expected that of a Hugging Face "
            "model, as save_pretrained writes it: use such a one"
        ) from error
    report("tokens are bytes: the folder has no tokenizer")
    return Source(path, path, shape, ByteText(), masks=None, ends=()), None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(". ")


def has_weights(source: Source) -> bool:
    """Whether the folder has weights, or the run a checkpoint."""
    return source.checkpoint is not None or _holds(source.folder, _WEIGHTS)


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def build_model(source: Source, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """The whole model with seqpar's attention, on this rank's device; with random weights where there are none.

    Raises ValueError where weights don't fit, and where the model's attention can't be taken over.
    """
    if has_weights(source):
        return _with_experts_for(dtype, load_model(source, dtype, device))
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"attn_implementation": huggingface.NAME, "dtype": dtype}
    torch.manual_seed(seed)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(source.shape), **options)
        reason = "" if type(model)._supports_attention_backend else f"{type(model).__name__} doesn't let it be replaced"
    except (ValueError, ImportError) as error:
        reason = _first_line(error)
    if reason:
        raise ValueError(
            f"--model {source.path} can't be run with seqpar's attention ({reason}); expected a causal language model "
            "whose attention transformers can replace: use another model"
        )
    nn.Module.to(model, device)
    return _with_experts_for(dtype, model.eval())


def _with_experts_for(dtype: torch.dtype, model: PreTrainedModel) -> PreTrainedModel:
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the fused products have no fp64
    return model


def read_batch(config: CheckConfig, source: Source, ranks: int) -> Batch:
    """Rows of text, cut into documents.

    Raises ValueError where the text can't be read or is too short, where its tokens aren't the model's, where rows are
    longer than the model's positions, and where a rank would get no token.
    """
    positions = source.positions
    length = config.seq_len or min(SEQ_LEN, positions or SEQ_LEN)
    if positions is not None and length > positions:
        raise ValueError(
            f"--seq-len is {length}; expected {positions} at most, for the model has that many positions "
            "(max_position_embeddings): use a smaller one"
        )
    if length < ranks:
        raise ValueError(
            f"--seq-len is {length} for {ranks} ranks; expected a token for each: use a larger one, or fewer ranks"
        )
    tokens = _tokens(config, source.text, length * config.batch_size).view(config.batch_size, length)
    highest = int(tokens.max())
    if highest >= source.embeddings:
        if not isinstance(source.text, ByteText):
            raise ValueError(
                f"--model got a tokenizer that makes token {highest} of the text, and embeddings of "
                f"{source.embeddings} tokens; expected one for each: use the model's own tokenizer"
            )
        tokens = tokens % source.embeddings  # what they say is all the same to the check
    choose = random.Random(config.seed)
    rows = [[0, length] if config.no_documents else _bounds(length, choose) for _ in tokens]
    if config.layout in _BY_DOCUMENT:
        rows = rows[:1] * len(rows)
    return Batch(tokens, rows)


def _bounds(length: int, choose: random.Random) -> list[int]:
    """Where the documents of a row begin and end: a long one of half the row or more, and ever shorter ones."""
    pieces = []
    while length:
        pieces.append(choose.randint((length + 1) // 2, length))
        length -= pieces[-1]
    choose.shuffle(pieces)
    return [0, *accumulate(pieces)]


def _tokens(config: CheckConfig, text: Text, number: int) -> torch.Tensor:
    """The first tokens of the text, [number] int64."""
    found, have = [], 0
    for piece in _pieces(config):
        found.append(text.encode(piece).long())
        have += len(found[-1])
        if have >= number:
            return torch.cat(found)[:number]
    named = f"--text {config.text}" if config.text else "--text: Python's standard library"
    raise ValueError(
        f"{named} holds {have} tokens; expected {number} or more, for --batch-size {config.batch_size} "
        f"rows of {number // config.batch_size}: add text, or use a smaller --seq-len or --batch-size"
    )


def _pieces(config: CheckConfig) -> Iterator[str]:
    """The text, some of it at a time."""
    if config.text is None:
        documents = find_documents(())
        random.Random(config.seed).shuffle(documents)
        yield from (document.read() or "" for document in documents)
        return
    try:
        with config.text.open(encoding="utf-8", newline="") as file:
            while piece := file.read(_PIECE):
                yield piece
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {config.text} is not UTF-8; expected text: convert it") from error
    except OSError as error:
        raise ValueError(f"--text {config.text} can't be read: {error.strerror}; name a file of text") from error
