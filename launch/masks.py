"""Who attends to whom in each layer, by the options of `seqpar train`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import seqpar
from seqpar.integrations.options import AttentionOptions

from .config import TrainConfig
from .options import OptionError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def layer_masks(config: TrainConfig, shape: PretrainedConfig) -> list[seqpar.Mask]:
    """The mask of each layer inside a document. Raises OptionError where options do not fit the model."""
    layers, kv_heads = shape.num_hidden_layers, shape.num_key_value_heads
    wrong = [layer for layer in config.s2_dense_layers if not 0 <= layer < layers]
    if wrong:
        raise OptionError(f"--s2-dense-layers {wrong[0]} got a model of {layers} layers; expected 0 .. {layers - 1}")
    masks = mask_options(config).layer_masks(layers, kv_heads)
    for mask in masks:
        mask.check(config.seq_len, config.seq_len, kv_heads)
    return masks


def mask_options(config: TrainConfig) -> AttentionOptions:
    """The mask as adapters have it, whose options have the same names and defaults but for the window's."""
    names = [field.name for field in dataclasses.fields(AttentionOptions)]
    given = {name: getattr(config, name) for name in names if name.startswith(("mask", "s2_"))}
    given["window"] = config.window_tokens if config.mask == "window" else None
    return AttentionOptions(**{name: value for name, value in given.items() if value is not None})


def s2_sizes(config: TrainConfig, shape: PretrainedConfig) -> tuple[int, int, int]:
    """Block, blocks of the band and stride; by default 64, 16, and the sparse KV heads, which just see everything."""
    mask = mask_options(config).sparse(shape.num_key_value_heads)
    return mask.block, mask.local_blocks, mask.stride


def describe(config: TrainConfig, shape: PretrainedConfig) -> str:
    """The mask, as it is compared between a run and the checkpoint that it continues."""
    if config.mask == "causal":
        return "causal"
    if config.mask == "window":
        return f"window of {config.window_tokens}"
    block, local, stride = s2_sizes(config, shape)
    dense = ", ".join(map(str, sorted(config.s2_dense_layers))) or "none"
    heads = config.s2_dense_heads
    return f"s2 of block {block}, {local} local, stride {stride}, {heads} dense heads, dense layers {dense}"


def seen_pairs(config: TrainConfig, shape: PretrainedConfig, length: int) -> list[Tensor | None]:
    """For each layer, the pairs of a document of `length` tokens as bool [1, H|1, L, L]; None where it is causal.

    From the definition, for the unsharded check; nothing of seqpar's masks is used.
    """
    if config.mask == "causal":
        return [None] * shape.num_hidden_layers
    token = torch.arange(length)
    query, key = token[:, None], token[None, :]
    causal = key <= query
    if config.mask == "window":
        return [(causal & (query - key < config.window_tokens))[None, None]] * shape.num_hidden_layers
    block, local, stride = s2_sizes(config, shape)
    kv_heads = shape.num_key_value_heads
    heads = []
    for head in range(kv_heads):
        seen = query // block - key // block < local
        if head >= kv_heads - config.s2_dense_heads:
            seen = torch.ones_like(seen)
        heads.append(causal & (seen | (key // block % stride == head % stride)))
    sparse = torch.stack(heads).repeat_interleave(shape.num_attention_heads // kv_heads, 0)[None]
    dense = set(config.s2_dense_layers)
    return [None if layer in dense else sparse for layer in range(shape.num_hidden_layers)]
