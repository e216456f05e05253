"""Small models with random weights, and prompts for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig


def random_model(config: PretrainedConfig, attention: str) -> Any:
    """The same weights each time, large enough to say different things."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)  # sinks among them
    return model


def prompts_of(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Tokens and their mask, padded on the left, as `generate` wants them."""
    counts = torch.tensor(lengths)
    longest = int(counts.max())
    tokens = torch.randint(1, 97, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(longest) >= longest - counts[:, None]).long()
    return tokens * mask, mask
