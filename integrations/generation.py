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
        self.caches = {mask: self._cache(mask, layers=masks.count(mask), **options) for mask in dict.fromkeys(masks)}
        self._layers = [(self.caches[mask], masks[:number].count(mask)) for number, mask in enumerate(masks)]
        self._seen = 0  # tokens of a row, with its padding
        self._counts: list[int] = []  # new tokens of each row in the step under way
        super().__init__(layers=[_Layer(self, number) for number in range(len(masks))])

    def _cache(self, mask: seqpar.Mask, **options: Any) -> seqpar.KVCache:
        """Of the layers that have this mask."""
        return seqpar.KVCache(mask, batch=self.batch, group=self.world, **options)

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
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None,
        position_ids: Tensor | None, plan: Any, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Attention of a layer's new tokens, ``[B, T, H, D]``: all of them, or this rank's of a plan."""
        cache, number = self._layers[layer]
        if plan is not None:
            out, tokens = cache.prefill(q, k, v, plan, layer=number, **options), plan.length
        else:
            tokens = q.shape[1]
            if layer == 0:
                self._counts = self._counted(attention_mask, tokens)
                _check_positions(position_ids, cache.lengths, self._counts)
            out = cache.attend(q, k, v, layer=number, counts=self._counts, **options)
        if layer == 0:
            self._seen += tokens
        return out

    def _counted(self, attention_mask: Tensor | None, tokens: int) -> list[int]:
        """How many of the new tokens each row has; ValueError for a mask that says more than where padding is."""
        if attention_mask is None:
            return [tokens] * self.batch
        shape, total = tuple(attention_mask.shape), self._seen + tokens
        if shape != (self.batch, total):
            raise ValueError(
                f"attention_mask: got shape {shape}, expected [{self.batch}, {total}], of all tokens so far and the "
                "new ones"
            )
        check_padding(attention_mask)
        return attention_mask[:, -tokens:].sum(1).tolist()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of every row (so many below 0), as when drafts were wrong."""
        removed = -tokens_to_remove
        if removed > self._seen:
            raise ValueError(f"crop: got {tokens_to_remove}, expected at least {-self._seen}, of so many tokens")
        if removed:
            wanted = {c: [max(0, length - removed) for length in c.lengths] for c in self.caches.values()}
            for cache, lengths in wanted.items():
                cache.check_truncate(lengths)
            for cache, lengths in wanted.items():
                cache.truncate(lengths)
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


def check_padding(attention_mask: Tensor) -> None:
    """ValueError where padding follows a token."""
    mask = attention_mask.bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError("attention_mask: got padding after a token, expected it before all others; pad on the left")


def _check_positions(position_ids: Tensor | None, lengths: Sequence[int], counts: Sequence[int]) -> None:
    """ValueError where the new tokens are not those that follow what each row has."""
    if position_ids is None:
        return
    last = position_ids[..., -1].expand(len(lengths)).tolist()
    for row, (got, length, count) in enumerate(zip(last, lengths, counts, strict=True)):
        if count and got != length + count - 1:
            raise ValueError(
                f"sharded cache: got tokens up to position {got} for row {row}, expected {length + count - 1}, those "
                f"after the {length} that it has; transformers gives drafts' first call the whole prompt: there leave "
                "out prefill, and reset() before another turn"
            )


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
        """Layers have no text of their own."""
        raise ValueError("reset: got one layer of a sharded cache, expected all of them; reset the cache")

    def crop(self, tokens_to_remove: int) -> None:
        """Layers have no text of their own."""
        raise ValueError("crop: got one layer of a sharded cache, expected all of them; crop the cache")


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
    check_padding(mask)
    longest = int(mask.sum(1).max())
    if longest > cache.capacity:
        raise ValueError(
            f"prefill: got a prompt of {longest} tokens, expected at most {cache.capacity}, the cache's capacity; make "
            "it with a larger capacity"
        )
    first, chunk = cache._seen, max(cache.chunk, world.size)
    while total - 1 - first >= world.size:  # the last token's logits are wanted, and few tokens are not worth sharing
        count = min(chunk, total - 1 - first)
        read(model.get_decoder(), input_ids, mask, cache, slice(first, first + count), schedule, layout)
        first += count
        if progress is not None:
            progress(first, total)


def read(
    decoder: Any, input_ids: Tensor, mask: Tensor, cache: ShardedCache, chunk: slice, schedule: Any, layout: str
) -> None:  # fmt: skip
    """Put a chunk of the tokens ``[B, T]``, padded on the left where ``mask`` is 0, into a cache."""
    first, count = chunk.start, chunk.stop - chunk.start
    new = mask[:, chunk].sum(1).tolist()
    plans = {m: c.plan(count, counts=new, layout=layout, schedule=schedule) for m, c in cache.caches.items()}
    some = next(iter(plans.values()))
    position = some.queries.tensor.to(input_ids.device) + first - (mask == 0).sum(1, keepdim=True)
    decoder(
        input_ids=some.shard(input_ids[:, chunk]),
        position_ids=position.clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        seqpar_plan=[plans[cache.room_of(layer)[0]] for layer in range(len(cache.layers))],
    )
