"""A key-value cache for transformers' ``generate``, spread over ranks; and prompts that ranks read together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

import seqpar
from seqpar.comm import Group

from .huggingface import CACHE


class ShardedCache(Cache):
    """What ``model.generate(past_key_values=...)`` takes: a :class:`seqpar.KVCache` for each mask of the layers.

    Made by :func:`seqpar.integrations.huggingface.sharded_cache`. Every rank generates with the same inputs and gets
    the same tokens. Padding is on the left, and told by ``attention_mask``.

    Attributes:
        caches: by mask.
        world: the ranks, with their byte meter.
        chunk: prompt tokens that go through the model at a time.
    """

    def __init__(self, masks: Sequence[seqpar.Mask], group: Group, batch: int, chunk: int, **options: Any) -> None:
        """``options``: of :class:`seqpar.KVCache`, for all layers alike."""
        world = seqpar.comm.connect(group)
        self.world, self.batch, self.chunk = world, batch, chunk
        self.caches = {
            mask: seqpar.KVCache(mask, layers=masks.count(mask), batch=batch, group=world, **options)
            for mask in dict.fromkeys(masks)
        }
        self._layers = [(self.caches[mask], masks[:number].count(mask)) for number, mask in enumerate(masks)]
        self._seen = 0  # tokens of a row, with its padding
        self._counts: list[int] | None = None  # of the step under way
        self._told: tuple[Tensor, list[int]] | None = None
        super().__init__(layers=[_Layer(self, number) for number in range(len(masks))])

    @property
    def resident_bytes(self) -> int:
        """What this rank holds of all layers and rows."""
        return sum(cache.resident_bytes for cache in self.caches.values())

    @property
    def capacity(self) -> int:
        """Tokens that each row may have."""
        return min(cache.capacity for cache in self.caches.values())

    def room_of(self, layer: int) -> tuple[seqpar.Mask, int]:
        """A layer's mask, and how many tokens it has room for."""
        cache, _ = self._layers[layer]
        return cache.mask, cache.capacity

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, plan: Any, **options: Any
    ) -> Tensor:
        """Attention of a layer's new tokens, ``[B, T, H, D]``: all of them, or this rank's of a plan."""
        cache, number = self._layers[layer]
        tokens = q.shape[1] if plan is None else plan.length
        if layer == 0:
            self._seen += tokens
        counts = self._counts if plan is not None else self._counts_of(attention_mask, tokens, cache)
        try:
            if plan is not None:
                return cache.prefill(q, k, v, plan, layer=number, counts=counts, **options)
            return cache.attend(q, k, v, layer=number, counts=counts, **options)
        except ValueError:
            if layer == 0:
                self._seen -= tokens
            raise

    def _counts_of(self, attention_mask: Tensor | None, tokens: int, cache: seqpar.KVCache) -> list[int] | None:
        """How many of the new tokens each row has; ValueError for a mask that says more than where padding is."""
        if attention_mask is None:
            return None
        if self._told is None or self._told[0] is not attention_mask:
            shape = tuple(attention_mask.shape)
            if attention_mask.dim() != 2 or shape != (self.batch, self._seen):
                raise ValueError(
                    f"attention_mask: got shape {shape}, expected [{self.batch}, {self._seen}], of all tokens so far "
                    "and the new ones"
                )
            mask = attention_mask.bool()
            if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
                raise ValueError(
                    "attention_mask: got padding after a token, expected it before all others; pad on the left"
                )
            self._told = attention_mask, mask[:, -tokens:].sum(1).tolist()
        return self._told[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of every row (so many below 0), as when drafts were wrong."""
        removed = -tokens_to_remove
        for cache in self.caches.values():
            if removed:
                cache.truncate([max(0, length - removed) for length in cache.lengths])
        self._seen -= removed

    def reset(self) -> None:
        """Forget all texts."""
        for cache in self.caches.values():
            cache.free()
        self._seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row continue another's text, as beam search does."""
        for cache in self.caches.values():
            cache.reorder(beam_idx.tolist())

    def prefilling(self, counts: list[int]) -> None:
        """Say how many tokens of the next plan's each row has."""
        self._counts = counts


class _Layer(CacheLayerMixin):
    """A layer's part: it passes new keys and values on, to attention, which finds the cache by them."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: ShardedCache, number: int) -> None:
        super().__init__()
        self._cache, self._number = cache, number
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the cache has its memory from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The same keys and values, marked."""
        setattr(key_states, CACHE, (self._cache, self._number))
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens so far, with padding."""
        return self._cache._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if all keys were here: seqpar makes no mask of it."""
        return self._cache._seen + query_length, 0

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self._cache.capacity

    def reset(self) -> None:
        """See :meth:`ShardedCache.reset`."""

    def crop(self, tokens_to_remove: int) -> None:
        """See :meth:`ShardedCache.crop`."""


@torch.no_grad()
def prefill(
    model: Any,
    input_ids: Tensor,
    cache: ShardedCache,
    attention_mask: Tensor | None = None,
    schedule: Any = "tree",
    layout: str = "zigzag",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """See :func:`seqpar.integrations.huggingface.prefill`."""
    world, (batch, total) = cache.world, input_ids.shape
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if tuple(mask.shape) != (batch, total) or batch != cache.batch:
        raise ValueError(
            f"prefill: got input_ids {tuple(input_ids.shape)} and attention_mask {tuple(mask.shape)}, expected "
            f"[{cache.batch}, tokens] for both"
        )
    if bool((mask[:, :-1] > mask[:, 1:]).any()):
        raise ValueError("attention_mask: got padding after a token, expected it before all others; pad on the left")
    longest = int(mask.sum(1).max())
    if longest > cache.capacity:
        raise ValueError(
            f"prefill: got a prompt of {longest} tokens, expected at most {cache.capacity}, the cache's capacity; make "
            "it with a larger capacity"
        )
    padding = (mask == 0).sum(1, keepdim=True)
    decoder = model.get_decoder()
    first, chunk = cache._seen, max(cache.chunk, world.size)
    while total - 1 - first >= world.size:  # the last token's logits are wanted, and few tokens are not worth sharing
        count = min(chunk, total - 1 - first)
        new = mask[:, first : first + count].sum(1).tolist()
        plans = {m: c.plan(count, counts=new, layout=layout, schedule=schedule) for m, c in cache.caches.items()}
        some = next(iter(plans.values()))
        cache.prefilling(new)
        position = some.queries.tensor.to(input_ids.device) + first
        decoder(
            input_ids=some.shard(input_ids[:, first : first + count]),
            position_ids=(position - padding).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            seqpar_plan=[plans[cache.room_of(layer)[0]] for layer in range(len(cache.layers))],
        )
        first += count
        if progress is not None:
            progress(first, total)
