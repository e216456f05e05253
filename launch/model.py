"""The model: a Hugging Face causal language model with seqpar's attention, its parameters sharded over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import seqpar

from .config import PRESETS, TrainConfig
from .distributed import Ranks

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SEPARATOR = 256
"""Token that opens and closes a document where tokens are bytes."""

_BYTE_VOCABULARY = 264


@dataclass(frozen=True)
class Text:
    """How text becomes tokens, [L] int32 with the document's opening and closing tokens, and back.

    vocabulary: tokens from this on stand for nothing, being the padding of an embedding.
    """

    encode: Callable[[str], torch.Tensor]
    decode: Callable[[Iterable[int]], str]
    vocabulary: int


def load_text(config: TrainConfig) -> Text:
    """The tokenizer of --model, or bytes."""
    if config.model is None:
        return Text(_encode_bytes, _decode_bytes, SEPARATOR + 1)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {config.model} holds no tokenizer that can be read; expected the folder of a Hugging Face "
            f"checkpoint with its tokenizer, as save_pretrained writes it"
        ) from error
    opening = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    closing = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def encode(text: str) -> torch.Tensor:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return torch.tensor([*opening, *tokens, *closing], dtype=torch.int32)

    return Text(encode, lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)), len(tokenizer))


def _encode_bytes(text: str) -> torch.Tensor:
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0)
    edge = torch.tensor([SEPARATOR], dtype=torch.int32)
    return torch.cat([edge, content.int(), edge])


def _decode_bytes(tokens: Iterable[int]) -> str:
    return bytes(token for token in tokens if token < SEPARATOR).decode(errors="replace")


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
    for name, layer in decoder_layers(model):
        if config.checkpoint_activations != "none":
            layer = checkpointed(layer, selective=config.checkpoint_activations == "selective")
            model.set_submodule(name, layer)
        fully_shard(layer, mesh=ranks.world, mp_policy=policy)
    fully_shard(model, mesh=ranks.world, mp_policy=policy)
    nn.Module.to(model, ranks.device)
    model.train()


def decoder_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The model's repeated blocks, by name."""
    kinds = set(model._no_split_modules or ())
    return [(name, module) for name, module in model.named_modules() if type(module).__name__ in kinds]


def checkpointed(layer: nn.Module, *, selective: bool) -> nn.Module:
    """The layer, recomputed in the backward; selective keeps its attention's results, so that nothing is sent twice."""
    options = {"context_fn": seqpar.checkpoint_context} if selective else {}
    return checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT, **options)
