"""seqpar's attention inside Hugging Face transformers: one registration, and the plan as a keyword of the model call.

    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="seqpar")
    plan = seqpar.plan(seqpar.Causal(), length=tokens.shape[1], group=group)
    logits = model(plan.shard(tokens), position_ids=plan.position_ids, use_cache=False, seqpar_plan=plan).logits

The plan says who attends to whom: pass no attention_mask, and give it the documents, padding among them.

To generate, `model.generate` takes a cache that is spread over ranks, and no plan:

    cache = sharded_cache(model, capacity=100_000, group=group)
    prefill(model, tokens, cache)  # the ranks share the prompt
    model.generate(tokens, past_key_values=cache, max_new_tokens=200)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

import seqpar
from seqpar.comm import Group
from seqpar.validation import ATTENTION, agree_once

from .model_config import check_layers, heads_of, masks_of

if TYPE_CHECKING:
    from seqpar.offload import Placement, Workers

    from .generation import ShardedCache
    from .offload import OffloadedGeneration
    from .options import AttentionOptions
    from .sharded_calls import ShardedCalls

NAME = "seqpar"
"""What `attn_implementation` is called after `register()`."""

CACHE = "_seqpar_cache"
"""The attribute of a key tensor that says which cache it belongs to, and which of its layers."""

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


def parallelize(
    model: Any,
    group: Group,
    options: AttentionOptions | None = None,
    *,
    layout: str = "zigzag",
    loss_group: Group = None,
) -> ShardedCalls:
    """Make a model's calls with whole rows compute this rank's tokens of them; the loop around it stays as it is.

        calls = parallelize(model, group)
        loss = model(input_ids=tokens, labels=tokens).loss  # the same rows on every rank of group
        loss.backward()  # then average gradients over loss_group, as DDP and FSDP do

    model: loaded with attn_implementation="seqpar", or a wrapper of one; call this before DDP or FSDP wrap it. options:
    the mask, schedule and so on, by default a causal ring; layers with a sliding window keep it. layout: see
    `seqpar.plan`. loss_group: all ranks over which gradients are averaged, data parallel x sequence; default: group.

    A call takes input_ids [B, S] or inputs_embeds [B, S, E], and labels, or already shifted shift_labels besides them,
    [B, S]. Documents begin where position_ids [1|B, S] are 0, or at cu_seq_lens_q; what attention_mask [B, S] calls
    padding is documents of its own. `out.loss` is the mean over all tokens of all ranks of loss_group; or, given
    num_items_in_batch, their sum over that, as on one rank. A document's first token is no label (count it as little
    as `DataCollatorWithFlattening` does, which makes it -100). Its gradient, averaged over loss_group, is exact.
    `out.logits` and hidden states are this rank's: the returned handle's `plan.unshard(out.logits)` gathers them.

    Raises ValueError, on every rank of group, for rows that differ between them, and for what would be dropped: other
    masks, caches, attention weights, attention dropout, unknown tensors of S tokens.
    """
    from .options import AttentionOptions
    from .sharded_calls import ShardedCalls

    return ShardedCalls(model, group, options or AttentionOptions(), layout=layout, loss_group=loss_group)


def sharded_cache(
    model: Any,
    *,
    capacity: int,
    batch: int = 1,
    group: Group = None,
    masks: Sequence[seqpar.Mask] | None = None,
    chunk: int = 4096,
    page: int | None = None,
) -> ShardedCache:
    """A cache for `model.generate(past_key_values=...)` whose keys and values are spread over the ranks of `group`.

    capacity: tokens of a row, prompt and all. batch: rows. masks: of each layer; by default what the model's config
    says: causal, with its windows. chunk: prompt tokens that go through the model at a time in `prefill`. Raises
    ValueError for a model whose attention can't be taken over.
    """
    from .generation import ShardedCache

    masks, shape = _layers_of(model, masks, shared=seqpar.comm.connect(group).size > 1)
    return ShardedCache(masks, group, batch, chunk, capacity=capacity, page=page, **shape)


def offloaded_cache(
    model: Any,
    workers: Workers,
    *,
    capacity: int,
    batch: int = 1,
    placement: Placement | None = None,
    loss: Literal["fail", "recompute"] = "fail",
    masks: Sequence[seqpar.Mask] | None = None,
    chunk: int = 4096,
    page: int | None = None,
) -> OffloadedGeneration:
    """A cache for `model.generate(past_key_values=...)` on attention workers; `prefill` fills it too.

        with seqpar.offload.Workers.join("host:29600") as workers:
            cache = offloaded_cache(model, workers, capacity=100_000)
            prefill(model, tokens, cache, schedule="ring")
            model.generate(tokens, past_key_values=cache, max_new_tokens=200)

    workers, placement: see :class:`seqpar.offload.OffloadedCache`. loss: what to do when a worker is lost: raise
    :class:`seqpar.offload.WorkerLost`, or rebuild from the tokens what it held, on the workers that are left, and go
    on. capacity, batch, masks, chunk, page: as for `sharded_cache`; the batch is this rank's own.
    """
    from . import offload

    if loss not in ("fail", "recompute"):
        raise ValueError(f"loss: got {loss!r}, expected 'fail' or 'recompute'")
    masks, shape = _layers_of(model, masks, shared=False)
    offload.guard(model)
    return offload.OffloadedGeneration(
        masks, workers, placement or offload.Placement(), batch, chunk, recompute=loss == "recompute",
        capacity=capacity, page=page, **shape,
    )  # fmt: skip


def _layers_of(
    model: Any, masks: Sequence[seqpar.Mask] | None, *, shared: bool
) -> tuple[list[seqpar.Mask], dict[str, Any]]:  # fmt: skip
    """The mask of each layer, and what a cache holds. Raises ValueError for a model that can't be taken over."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "_attn_implementation", None) != NAME:
        raise ValueError(
            f"cache: got a model with attn_implementation={config._attn_implementation!r}, expected {NAME!r}; "
            f"load it with attn_implementation={NAME!r}, after register()"
        )
    check_layers(config, shared=shared)
    masks = masks_of(config) if masks is None else list(masks)
    if len(masks) != config.num_hidden_layers:
        raise ValueError(f"masks: got {len(masks)}, expected {config.num_hidden_layers}, one for each layer")
    return masks, {**heads_of(config), "dtype": model.dtype, "device": model.device}


def prefill(
    model: Any,
    input_ids: Tensor,
    cache: ShardedCache,
    *,
    attention_mask: Tensor | None = None,
    schedule: Any = "tree",
    layout: str = "zigzag",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Put all but the last of the prompts' tokens into a cache; every rank computes its share of them.

    input_ids: [B, T], whole and the same on every rank, padded on the left; attention_mask [B, T] says where. The last
    token (and a few, where ranks could not share them) is left to `model.generate`, which is given the same input_ids,
    attention_mask and cache. schedule: how the first chunk's tokens meet each other, see `seqpar.plan`; those of later
    ones go to the keys. progress: called with the tokens done and their number after each chunk.
    """
    from . import generation

    generation.prefill(model, input_ids, cache, attention_mask, schedule, layout, progress)


def no_mask(*, attention_mask: Tensor | None = None, config: Any = None, **_: Any) -> Tensor | None:
    """In place of the mask that transformers would make: where padding is, which only a cache may have."""
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None:
        raise ValueError(_unexpected("attention_chunk_size", chunk, "use another attn_implementation for this model"))
    return attention_mask


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
    cached = getattr(key, CACHE, None)
    plans: Collection[Any] = ()
    if isinstance(seqpar_plan, Mapping):
        plans, seqpar_plan = seqpar_plan.values(), seqpar_plan.get(sliding_window)
    elif isinstance(seqpar_plan, Sequence):
        plans, seqpar_plan = seqpar_plan, _of_layer(seqpar_plan, module)
    if seqpar_plan is None and cached is None:
        where = f" for layers with sliding_window={sliding_window}" if sliding_window is not None else ""
        raise ValueError(f"seqpar attention got no plan{where}; expected one: call model(..., seqpar_plan=plan)")
    if attention_mask is not None and cached is None:
        raise ValueError(_unexpected("attention_mask", f"a tensor of shape {tuple(attention_mask.shape)}"))
    if dropout:
        raise ValueError(_unexpected("dropout", dropout, "set attention_dropout=0 in the model's config"))
    if is_causal is False:
        raise ValueError(_unexpected("is_causal", is_causal))
    mask, length = (seqpar_plan.mask, seqpar_plan.kv_length) if cached is None else cached[0].room_of(cached[1])
    if sliding_window is not None and not _has_window(mask, length, sliding_window):
        window = f"seqpar.SlidingWindow({sliding_window - 1}, 0)"
        raise ValueError(
            f"seqpar attention got a layer with sliding_window={sliding_window} and a plan of {mask!r}; "
            f"expected {window} in its mask: add it, or pass seqpar_plan={{window: plan, ...}} if layers differ"
        )
    for name, given in others.items():
        if given is not None and given is not False and name not in _BYSTANDERS:
            raise ValueError(_unexpected(name, _short(given), "leave it out, or use another attn_implementation"))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if cached is not None:
        cache, layer = cached
        options = {"scale": scaling, "sinks": s_aux}
        return cache.attend(layer, q, k, v, attention_mask, position_ids, seqpar_plan, **options), None
    if getattr(module, "layer_idx", 0) == 0:
        _check_model(getattr(module, "config", None), seqpar_plan, plans, position_ids)
    return seqpar.attention(q, k, v, seqpar_plan, scale=scaling, sinks=s_aux), None


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
        check_layers(config, shared=plan.world.size > 1)
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


def _has_window(mask: seqpar.Mask, length: int, window: int) -> bool:
    lefts = [term.left for term in mask.terms if isinstance(term, seqpar.SlidingWindow)]
    return window - 1 in lefts or (not lefts and window >= length)


def _unexpected(name: str, got: object, remedy: str = "say it in the plan's mask instead") -> str:
    return f"seqpar attention got {name}={got}; expected none: {remedy}"


def _short(value: object) -> object:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value
