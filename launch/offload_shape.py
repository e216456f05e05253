"""A Hugging Face model's shape for the cost model: from its config alone, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .offload_costs import Shape

_ENCODERS = {"albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "roberta", "xlm-roberta"}
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def read_shape(model: str, known: str) -> Shape:
    """Of the model in this folder; parameters are counted in a model that has no memory.

    A layer with a window counts as one that sees everything. Raises ValueError where there is no such folder (naming
    the `known` models), its config can't be read, or its cache is not K and V of every token.
    """
    if not Path(model).is_dir():
        raise ValueError(f"--model is {model!r}; expected the folder of a Hugging Face model, or one of {known}")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False).get_text_config()
        total, active = _parameters(config)
        heads = int(config.num_attention_heads)
        layers = int(config.num_hidden_layers)
        if min(heads, layers) < 1 or (config.model_type in _ENCODERS and not config.is_decoder):
            raise ValueError(f"{config.model_type} with {layers} layers of {heads} heads")
    except Exception as error:  # a config may have anything in it
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"--model {model} has a config that can't be read ({reason}); expected config.json of a Hugging Face "
            "causal language model: use such a folder, or give --layers and so on"
        ) from error
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION
    if others or hasattr(config, "kv_lora_rank"):
        what = ", ".join(sorted(others)) + " layers" if others else "latent attention"
        raise ValueError(f"--model {model} has {what}; expected K and V of every token in each layer: use such a model")
    return Shape(
        layers=layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        parameters=total,
        active=active,
    )


def _parameters(config: Any) -> tuple[int, int | None]:
    """All, and those that compute one token if not all do."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    total = sum(weight.numel() for weight in model.parameters())
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    if not experts or not chosen:
        return total, None
    routed = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    return total, total - routed + routed * chosen // experts
