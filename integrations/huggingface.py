"""seqpar's attention inside Hugging Face transformers: one registration, and the plan as a keyword of the model call.

    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="seqpar")
    plan = seqpar.plan(seqpar.Causal(), length=tokens.shape[1], group=group)
    logits = model(plan.shard(tokens), position_ids=plan.position_ids, use_cache=False, seqpar_plan=plan).logits

The plan says who attends to whom: pass no attention_mask, and give it the documents, padding among them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import seqpar
from seqpar.validation import ATTENTION, agree_once

NAME = "seqpar"
"""What `attn_implementation` is called after `register()`."""

# Keywords of a model call that reach attention and have no say in it.
_BYSTANDERS = frozenset(
    {
        "cache_position",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "return_dict",
        "use_cache",
    }
)


def register() -> None:
    """Make `attn_implementation="seqpar"` known to transformers. Calling it again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, no_mask)


def no_mask(*, attention_mask: Tensor | None = None, config: Any = None, **_: Any) -> None:
    """In place of the mask that transformers would make. Raises ValueError where model or caller wants its own."""
    if attention_mask is not None:
        raise ValueError(_unexpected("attention_mask", f"a tensor of shape {tuple(attention_mask.shape)}"))
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None:
        raise ValueError(_unexpected("attention_chunk_size", chunk, "use another attn_implementation for this model"))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    seqpar_plan: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over this rank's tokens, called by the model's layers.

    query [B, H, T, D], key [B, Hkv, T, D], value [B, Hkv, T, Dv] -> [B, T, H, Dv], and no attention weights.
    seqpar_plan: a plan; or a list with the plan of each layer; or for models whose layers have different windows a
    mapping from each `sliding_window` (None for the layers without) to its plan. s_aux: learnable sinks [H]. Raises
    ValueError for anything else that would change the result: nothing is dropped.
    """
    plans: Collection[Any] = ()
    if isinstance(seqpar_plan, Mapping):
        plans, seqpar_plan = seqpar_plan.values(), seqpar_plan.get(sliding_window)
    elif isinstance(seqpar_plan, Sequence):
        plans, seqpar_plan = seqpar_plan, _of_layer(seqpar_plan, module)
    if seqpar_plan is None:
        where = f" for layers with sliding_window={sliding_window}" if sliding_window is not None else ""
        raise ValueError(f"seqpar attention got no plan{where}; expected one: call model(..., seqpar_plan=plan)")
    if attention_mask is not None:
        raise ValueError(_unexpected("attention_mask", f"a tensor of shape {tuple(attention_mask.shape)}"))
    if dropout:
        raise ValueError(_unexpected("dropout", dropout, "set attention_dropout=0 in the model's config"))
    if is_causal is False:
        raise ValueError(_unexpected("is_causal", is_causal))
    if sliding_window is not None and not _has_window(seqpar_plan, sliding_window):
        window = f"seqpar.SlidingWindow({sliding_window - 1}, 0)"
        raise ValueError(
            f"seqpar attention got a layer with sliding_window={sliding_window} and a plan of {seqpar_plan.mask!r}; "
            f"expected {window} in its mask: add it, or pass seqpar_plan={{window: plan, ...}} if layers differ"
        )
    for name, given in others.items():
        if given is not None and given is not False and name not in _BYSTANDERS:
            raise ValueError(_unexpected(name, _short(given), "leave it out, or use another attn_implementation"))
    if getattr(module, "layer_idx", 0) == 0:
        _check_model(getattr(module, "config", None), seqpar_plan, plans, position_ids)
    out = seqpar.attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), seqpar_plan, scale=scaling, sinks=s_aux
    )
    return out, None


# Layers that look at other tokens through attention alone.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}
# Rotary embeddings whose frequencies depend on the longest position that a call sees: here, on one rank's tokens.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def _check_model(config: Any, plan: seqpar.Plan, plans: Collection[Any], position_ids: Tensor | None) -> None:
    """Raise ValueError, on every rank, where a model would mix or place tokens as if a rank's were all there are."""
    try:
        for other in plans:
            if other is not None and other.layout is not plan.layout and other.layout != plan.layout:
                raise ValueError(
                    f"seqpar attention got plans of {plan.layout} and of {other.layout} for the layers of a model, "
                    "whose tokens stay where they are, expected one layout: give the others layout=first.layout"
                )
        if plan.kv_length == plan.length and position_ids is not None:
            expected = plan.position_ids.to(position_ids.device)
            if position_ids.shape[-1:] != expected.shape[-1:] or bool((position_ids != expected).any()):
                got = "other position_ids than the plan's (a model that gets none counts from 0 on every rank)"
                raise ValueError(f"seqpar attention got {got}; expected those: pass position_ids=plan.position_ids")
        if plan.world.size == 1:
            return
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
    except ValueError as error:
        agree_once(plan, ATTENTION, {}, error)


def _of_layer(plans: Sequence[Any], module: nn.Module) -> Any:
    layer = getattr(module, "layer_idx", None)
    layers = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    if layer is None or len(plans) != layers:
        raise ValueError(
            f"seqpar attention got {len(plans)} plans for a model of {layers} layers, expected one for each layer; "
            "give the same plan again for layers that share it"
        )
    return plans[layer]


def _has_window(plan: Any, window: int) -> bool:
    lefts = [term.left for term in plan.mask.terms if isinstance(term, seqpar.SlidingWindow)]
    return window - 1 in lefts or (not lefts and window >= plan.kv_length)


def _unexpected(name: str, got: object, remedy: str = "say it in the plan's mask instead") -> str:
    return f"seqpar attention got {name}={got}; expected none: {remedy}"


def _short(value: object) -> object:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value
