"""What a transformers config says of a model's attention: its heads, its windows, and what could not be sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import seqpar

# Layers that look at other tokens through attention alone.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}
# Rotary embeddings whose frequencies depend on the longest position that a call sees: here, on one rank's tokens.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class Heads(TypedDict):
    """(query heads, KV heads), and the dims of keys and of values, as `seqpar.plan` takes them."""

    heads: tuple[int, int]
    head_dim: tuple[int, int]


def heads_of(config: Any) -> Heads:
    """Of a text config, latent attention's among them."""
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    value_dim = getattr(config, "v_head_dim", None) or dim
    if hasattr(config, "qk_nope_head_dim"):
        dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    return {"heads": (heads, getattr(config, "num_key_value_heads", None) or heads), "head_dim": (dim, value_dim)}


def windows_of(config: Any) -> list[int | None]:
    """The window of each layer, None where it sees everything."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def masks_of(config: Any) -> list[seqpar.Mask]:
    """Of each layer, inside a document: causal, with its window."""
    windows = windows_of(config)
    return [seqpar.Causal() if window is None else seqpar.SlidingWindow(window - 1) for window in windows]


def check_layers(config: Any, shared: bool) -> None:
    """Raise ValueError where layers would see one rank's tokens only, or place them as if those were all."""
    if shared:
        layers = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
        if layers:
            named = ", ".join(sorted(layers))
            raise ValueError(
                f"seqpar attention got a model with {named} layers, expected attention alone: other layers would see "
                "one rank's tokens only; use one rank"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        ropes = (rope, *rope.values())
        kinds = {str(r.get("rope_type")) for r in ropes if isinstance(r, Mapping)} & _LENGTH_DEPENDENT_ROPE
        if kinds:
            raise ValueError(
                f"seqpar attention got a model with rope_type {', '.join(sorted(kinds))}, expected frequencies that do "
                "not depend on the length of a call: set another rope_type in its config, or use one rank"
            )
