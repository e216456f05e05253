"""Text from the trained model, generated with its parameters still sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    mask: seqpar.Mask,
    vocabulary: int,
    seed: int,
    ranks: Ranks,
) -> list[int]:
    """`number` tokens after the prompt under `mask`, the same on every rank; all ranks must call it.

    Every rank computes the whole text, with a key-value cache, while parameters are gathered a layer at a time: no
    rank ever holds the whole model. Tokens from `vocabulary` on (padding of the embedding) are never chosen.
    """
    from transformers import DynamicCache

    model.eval()
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache()  # keeps every key: the mask says which are seen
    step, past, chosen = prompt, 0, []
    for _ in range(number):
        tokens = torch.tensor([step], device=ranks.device)
        plan = seqpar.plan(mask, length=len(step), kv_length=past + len(step), group=None)
        positions = torch.arange(past, past + len(step), device=ranks.device)[None]
        outputs = model(
            input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, seqpar_plan=plan
        )
        logits = outputs.logits[0, -1, :vocabulary].float().cpu() / TEMPERATURE
        token = ranks.from_rank0(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        past += len(step)
        chosen.append(token)
        step = [token]
    model.train()
    return chosen
