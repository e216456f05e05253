"""The prompts of `seqpar generate`: read, made tokens, checked for their length, and padded to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .generate_config import GenerateConfig

if TYPE_CHECKING:
    import torch

    from .text import Text


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts' text, in order. Raises ValueError naming the file where one can't be read or is no text."""
    prompts = list(config.prompt)
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # how Python keeps bytes of the command line that are no text
            raise ValueError("--prompt is not UTF-8; expected text: convert it") from error
    for path in config.prompt_file:
        try:
            prompts.append(path.read_bytes().decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file {path} is not UTF-8; expected text: convert it") from error
        except OSError as error:
            raise ValueError(
                f"--prompt-file {path} can't be read: {error.strerror}; name a file of text, or give the text itself "
                "with --prompt"
            ) from error
    return prompts


def encode_prompts(
    prompts: Sequence[str], text: Text, *, max_new_tokens: int, positions: int | None, embeddings: int
) -> list[list[int]]:
    """Each prompt's tokens.

    positions, embeddings: how many tokens in a row the model takes, where it says so, and how many different ones.
    Raises ValueError for a prompt of no tokens, one with tokens that the model doesn't have, and one that is too long
    with the tokens to come.
    """
    encoded = [text.prompt(prompt) for prompt in prompts]
    for number, tokens in enumerate(encoded, 1):
        which = f"prompt {number} of {len(encoded)}" if len(encoded) > 1 else "the prompt"
        if not tokens:
            raise ValueError(f"--prompt: {which} has no tokens; expected one or more: write some text")
        if max(tokens) >= embeddings:
            raise ValueError(
                f"--model got a tokenizer that makes token {max(tokens)} of {which}, and embeddings of {embeddings} "
                "tokens; expected one for each: use the model's own tokenizer"
            )
        if positions is not None and len(tokens) + max_new_tokens > positions:
            fits = positions - len(tokens)
            remedy = f"use --max-new-tokens {fits} or fewer, or a shorter prompt" if fits > 0 else "shorten the prompt"
            raise ValueError(
                f"--max-new-tokens is {max_new_tokens} after {len(tokens)} tokens of {which}; expected {max(fits, 0)} "
                f"at most, for the model has {positions} positions (max_position_embeddings): {remedy}"
            )
    return encoded


def left_padded(prompts: Sequence[Sequence[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, T] int64, shorter prompts padded on their left, and a mask [B, T], 1 for tokens and 0 for padding."""
    import torch

    longest = max(map(len, prompts))
    tokens = [[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens), torch.tensor(mask)
