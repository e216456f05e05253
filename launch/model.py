"""The model: a Hugging Face causal language model with seqpar's attention, its parameters sharded over all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import seqpar

from .config import PRESETS, TrainConfig
from .distributed import Ranks
from .text import SEPARATOR, ByteText, Text, TokenizerText

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_BYTE_VOCABULARY = 264


def load_text(config: TrainConfig) -> Text:
    """The tokenizer of --model, or bytes."""
    return ByteText() if config.model is None else TokenizerText.load(config.model)


def model_config(config: TrainConfig) -> PretrainedConfig:
    """The Hugging Face configuration of --model, or of the preset."""
    from transformers import AutoConfig, LlamaConfig

    if config.model is None:
        preset = PRESETS[config.preset or "small"]
        return LlamaConfig(
            **preset,
            initializer_range=preset["hidden_size"] ** -0.5,
            vocab_size=_BYTE_VOCABULARY,
            max_position_embeddings=config.seq_len,
            bos_token_id=SEPARATOR,
            eos_token_id=SEPARATOR,
            tie_word_embeddings=False,
        )
    return AutoConfig.from_pretrained(config.model, local_files_only=True)


def model_fields(shape: PretrainedConfig) -> dict[str, object]:
    """What makes the model's shape, by name: what its configuration has besides what every configuration has."""
    from transformers import PretrainedConfig

    generic = PretrainedConfig().to_dict().keys()
    return {f"model {name}": value for name, value in sorted(shape.to_dict().items()) if name not in generic}


def build(config: TrainConfig, shape: PretrainedConfig, attention: str) -> PreTrainedModel:
    """The whole model in fp32 on the CPU, the same on every rank: random weights from the seed, or --model's."""
    from transformers import AutoModelForCausalLM

    if config.model is None:
        torch.manual_seed(config.seed)
        return AutoModelForCausalLM.from_config(shape, attn_implementation=attention, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        config.model, attn_implementation=attention, dtype=torch.float32, local_files_only=True
    )


def shard(model: PreTrainedModel, config: TrainConfig, ranks: Ranks, dtype: torch.dtype) -> None:
    """Shard every decoder layer, and then the rest, over all ranks, in place.

    A parameter [N, ...] becomes a DTensor of ceil(N / ranks) rows each. Dual: its gathers in forward and backward are
    answered by a reduce-scatter that averages gradients. Computes in `dtype`, reduces and keeps parameters in fp32.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for name, _ in decoder_layers(model):
        layer = checkpointed(model, name, config.checkpoint_activations)
        fully_shard(layer, mesh=ranks.world, mp_policy=policy)
    fully_shard(model, mesh=ranks.world, mp_policy=policy)
    nn.Module.to(model, ranks.device)
    model.train()


def decoder_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The model's repeated blocks, by name."""
    kinds = set(model._no_split_modules or ())
    return [(name, module) for name, module in model.named_modules() if type(module).__name__ in kinds]


def checkpointed(model: nn.Module, name: str, how: str) -> nn.Module:
    """The layer of that name, made to be recomputed in the backward as --checkpoint-activations says.

    selective keeps its attention's results, so that nothing is sent twice.
    """
    layer = model.get_submodule(name)
    if how != "none":
        options = {"context_fn": seqpar.checkpoint_context} if how == "selective" else {}
        layer = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT, **options)
        model.set_submodule(name, layer)
    return layer
