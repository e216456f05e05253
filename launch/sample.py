"""Text from the trained model, generated with its parameters still sharded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

import seqpar

from .distributed import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEMPERATURE = 0.8


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt: list[int],
    number: int,
    *,
    masks: Sequence[seqpar.Mask],
    vocabulary: int,
    seed: int,
    ranks: Ranks,
) -> list[int]:
    """`number` tokens after the prompt under each layer's mask, the same on every rank; all ranks must call it.

    Every rank computes the whole text, with a key-value cache, while parameters are gathered a layer at a time: no
    rank ever holds the whole model. Tokens from `vocabulary` on (padding of the embedding) are never chosen.
    """
    from transformers import DynamicCache

    model.eval()
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache()  # keeps every key: the mask says which are seen
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    step, past, chosen = prompt, 0, []
    for _ in range(number):
        tokens = torch.tensor([step], device=ranks.device)
        sizes: dict[str, Any] = {"length": len(step), "kv_length": past + len(step), "heads": heads}
        plans = {mask: seqpar.plan(mask, group=None, **sizes) for mask in dict.fromkeys(masks)}
        positions = torch.arange(past, past + len(step), device=ranks.device)[None]
        outputs = model(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            seqpar_plan=[plans[mask] for mask in masks],
        )
        logits = outputs.logits[0, -1, :vocabulary].float().cpu() / TEMPERATURE
        token = ranks.from_rank0(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        past += len(step)
        chosen.append(token)
        step = [token]
    model.train()
    return chosen
