"""A Llama's tensors by the names of transformers, and the same ones as Megatron-Core's GPTModel has them.

Both directions are linear and keep every number: they hold for weights and for gradients. Megatron keeps the queries,
keys and values of a group of heads next to each other in one matrix, group after group, and the two matrices that enter
an MLP in another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WHOLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_OF_A_LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}


def names(shape: PretrainedConfig) -> dict[str, tuple[str, ...]]:
    """Each parameter of the GPTModel, and those of transformers that it is made of."""
    found: dict[str, tuple[str, ...]] = {theirs: (ours,) for theirs, ours in _WHOLE.items()}
    if shape.tie_word_embeddings:
        del found["output_layer.weight"]
    for layer in range(shape.num_hidden_layers):
        for theirs, ours in _OF_A_LAYER.items():
            found[f"decoder.layers.{layer}.{theirs}"] = tuple(f"model.layers.{layer}.{name}" for name in ours)
    return found


def to_megatron(tensors: Mapping[str, Tensor], shape: PretrainedConfig) -> dict[str, Tensor]:
    """From those of transformers."""
    return {theirs: _joined([tensors[name] for name in ours], shape) for theirs, ours in names(shape).items()}


def to_transformers(tensors: Mapping[str, Tensor], shape: PretrainedConfig) -> dict[str, Tensor]:
    """From those of the GPTModel, of whose memory some are parts."""
    made: dict[str, Tensor] = {}
    for theirs, ours in names(shape).items():
        made.update(zip(ours, _parted(tensors[theirs], len(ours), shape), strict=True))
    return made


def _joined(parts: list[Tensor], shape: PretrainedConfig) -> Tensor:
    if len(parts) == 3:  # queries [H * D, E], keys and values [Hkv * D, E], as [Hkv, (H / Hkv + 2) * D, E]
        groups = shape.num_key_value_heads
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _parted(whole: Tensor, number: int, shape: PretrainedConfig) -> list[Tensor]:
    if number == 3:
        groups = shape.num_key_value_heads
        heads = shape.num_attention_heads // groups
        rows = whole.shape[0] // groups // (heads + 2)
        parts = whole.unflatten(0, (groups, -1)).split([heads * rows, rows, rows], 1)
        return [part.flatten(0, 1) for part in parts]
    return list(whole.chunk(number)) if number > 1 else [whole]
