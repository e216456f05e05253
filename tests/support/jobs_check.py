"""Small models with faults, as `seqpar check` gets them on every rank; run as threads (loopback)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from seqpar.comm import World
from seqpar.integrations import huggingface
from seqpar.launch.check import check_model, own_layer_masks, with_own_attention
from seqpar.launch.check_findings import Findings
from seqpar.launch.data import Batch

LENGTH, WINDOW, VOCABULARY = 71, 9, 258
DOCUMENTS = [[0, 13, 14, 40, LENGTH], [0, 60, LENGTH]]
SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=WINDOW),
    "gpt-oss": lambda: GptOssConfig(
        **SHAPE,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
}


def model_of(kind: str) -> PreTrainedModel:
    """With random weights and seqpar's attention."""
    huggingface.register()
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(SHAPES[kind](), attn_implementation=huggingface.NAME).eval()


def checked(
    world: World,
    model: PreTrainedModel,
    fault: Callable[[PreTrainedModel], None] | None = None,
    *,
    both: bool = False,
    **options: Any,
) -> Findings | None:
    """What the check finds of a model, with a fault on the sharded side, or on both."""
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))

    def build(*, faulty: bool) -> PreTrainedModel:
        built = copy.deepcopy(model)
        if faulty and fault is not None:
            fault(built)
        return built

    return check_model(
        lambda: build(faulty=True),
        lambda: with_own_attention(build(faulty=both)),
        Batch(tokens, options.pop("documents", DOCUMENTS)),
        options.pop("masks", None) or own_layer_masks(model.config),
        world,
        device=torch.device("cpu"),
        **options,
    )


@torch.no_grad()
def _change(parameter: Tensor) -> None:
    parameter.view(-1)[0] += 0.5


def other_scaling(model: PreTrainedModel) -> None:
    """The attention of layer 1 divides its scores by something else."""
    model.model.layers[1].self_attn.scaling *= 1.5


def other_weight(model: PreTrainedModel) -> None:
    """A weight in the MLP of layer 1."""
    _change(model.model.layers[1].mlp.down_proj.weight)


def other_embedding(model: PreTrainedModel) -> None:
    """The embedding of every token."""
    with torch.no_grad():
        model.model.embed_tokens.weight *= 1.01


def other_head(model: PreTrainedModel) -> None:
    """A weight between the last layer and the logits."""
    _change(model.lm_head.weight)


def other_gradient(model: PreTrainedModel) -> None:
    """A gradient in layer 0 that is too large; no output shows it."""
    model.model.layers[0].mlp.down_proj.weight.register_hook(lambda gradient: gradient * 1.01)


def lost_head_gradient(model: PreTrainedModel) -> None:
    """A gradient outside the layers that isn't there."""
    model.lm_head.weight.requires_grad_(False)


def nan_weight(model: PreTrainedModel) -> None:
    """A NaN in layer 2."""
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.view(-1)[0] = torch.nan


class _Mixing(nn.Module):
    """An MLP that gets something of the token before: right on whole sequences alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + nn.functional.pad(x[:, :-1], (0, 0, 1, 0)))


def mixing_layer(model: PreTrainedModel) -> None:
    """Layer 1 looks at other tokens past its attention."""
    model.model.layers[1].mlp = _Mixing(model.model.layers[1].mlp)
