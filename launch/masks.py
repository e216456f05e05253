"""Who attends to whom in each layer, by the options of `seqpar train`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import seqpar

from .config import TrainConfig
from .options import OptionError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def layer_masks(config: TrainConfig, shape: PretrainedConfig) -> list[seqpar.Mask]:
    """The mask of each layer inside a document. Raises OptionError where options do not fit the model."""
    layers = shape.num_hidden_layers
    if config.mask == "causal":
        return [seqpar.Causal()] * layers
    if config.mask == "window":
        return [seqpar.SlidingWindow(config.window_tokens - 1)] * layers
    wrong = [layer for layer in config.s2_dense_layers if not 0 <= layer < layers]
    if wrong:
        raise OptionError(f"--s2-dense-layers {wrong[0]} got a model of {layers} layers; expected 0 .. {layers - 1}")
    block, local, stride = s2_sizes(config, shape)
    sparse = seqpar.SparselySharded(
        block, local, stride, config.s2_dense_heads, allow_incomplete=config.s2_allow_incomplete
    )
    sparse.check(config.seq_len, config.seq_len, shape.num_key_value_heads)
    return [seqpar.Causal() if layer in config.s2_dense_layers else sparse for layer in range(layers)]


def s2_sizes(config: TrainConfig, shape: PretrainedConfig) -> tuple[int, int, int]:
    """Block, blocks of the band and stride; by default 64, 16, and the sparse KV heads, which just see everything."""
    stride = config.s2_stride or widest_stride(shape.num_key_value_heads, config.s2_dense_heads)
    return config.s2_block or 64, config.s2_local or 16, stride


def widest_stride(kv_heads: int, dense_heads: int) -> int:
    """With which heads that are not dense just see every block together."""
    return max(1, kv_heads - dense_heads)


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


def distinct(masks: Sequence[seqpar.Mask]) -> list[seqpar.Mask]:
    """Each mask once, those that leave least out first: the others' tokens are dealt as theirs."""
    return sorted(dict.fromkeys(masks), key=lambda mask: not isinstance(mask, seqpar.Causal))
