"""How `seqpar generate` has `model.generate` choose the next token, and where a row of tokens ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from .generate_config import GenerateConfig
    from .loading import Source
    from .text import Text


def closing_tokens(config: GenerateConfig, source: Source) -> tuple[int, ...]:
    """Tokens that end a row."""
    return () if config.ignore_eos else source.ends


def forget_settings(model: PreTrainedModel) -> None:
    """Drop the folder's own generation settings, which would fill in whatever is not asked for."""
    generates: Any = model
    generates.generation_config = type(model.generation_config)()


def settings(config: GenerateConfig, source: Source) -> GenerationConfig:
    """Everything that decides the next token; those that stand for nothing are never it."""
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature:
        top_p = 1.0 if config.top_p is None else config.top_p
        sampling = {
            "do_sample": True,
            "temperature": config.temperature,
            "top_k": config.top_k or 0,
            "top_p": top_p,
        }
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        eos_token_id=list(closing_tokens(config, source)) or None,
        pad_token_id=source.text.padding,
        suppress_tokens=list(range(source.text.vocabulary, source.embeddings)) or None,
        **sampling,
    )


def rows_of(output: Tensor, ends: Sequence[int]) -> list[list[int]]:
    """Generated tokens [B, N], each row's up to the first that closes the text, if any."""
    return [_until_end(row, ends) for row in output.tolist()]


def said(
    prompts: Sequence[Sequence[int]], rows: Sequence[list[int]], text: Text, ends: Sequence[int]
) -> dict[str, Any]:
    """What a result says of the tokens generated after each prompt, by its fields."""
    return {
        "texts": [
            text.after(prompt, [token for token in row if token not in ends])
            for prompt, row in zip(prompts, rows, strict=True)
        ],
        "tokens": list(rows),
        "finished": ["end" if row[-1] in ends else "length" for row in rows],
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "generated_tokens": [len(row) for row in rows],
    }


def now(device: torch.device) -> float:
    """The time in seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]
