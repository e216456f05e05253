"""transformers' ``generate`` with its key-value cache on attention workers, and on with the same text after a loss."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import seqpar
from seqpar.offload import Ledger, NoRoom, OffloadedCache, Placement, WorkerLost, Workers

from .generation import ShardedCache, read

_GUARDED = "_seqpar_guarded"


class Moment(NamedTuple):
    """How far a generation is, between two steps: each cache's lengths, and the tokens of a row with its padding."""

    lengths: dict[seqpar.Mask, tuple[int, ...]]
    seen: int


class OffloadedGeneration(ShardedCache):
    """What ``model.generate(past_key_values=...)`` takes: an :class:`OffloadedCache` for each mask of the layers.

    Made by :func:`seqpar.integrations.huggingface.offloaded_cache`. With ``recompute`` it keeps the tokens, and when a
    worker is lost in a call of the model, rebuilds what that held on those that are left and repeats the call.

    Attributes:
        losses: the workers that were lost and made up for.
    """

    def __init__(
        self, masks: Sequence[seqpar.Mask], workers: Workers, placement: Placement, batch: int, chunk: int,
        *, recompute: bool, **options: Any,
    ) -> None:  # fmt: skip
        self.workers, self.placement, self.recompute = workers, placement, recompute
        self.losses: list[WorkerLost] = []
        self._tokens: list[list[int]] = [[] for _ in range(batch)]
        self._made: list[OffloadedCache] = []
        try:
            super().__init__(masks, None, batch, chunk, **options)
        except Exception:
            for cache in self._made:  # nothing stays reserved of some of them
                cache.release()
            raise

    def _cache(self, mask: seqpar.Mask, **options: Any) -> OffloadedCache:
        made = OffloadedCache(mask, workers=self.workers, placement=self.placement, batch=self.batch, **options)
        self._made.append(made)
        return made

    @property
    def offloaded(self) -> list[OffloadedCache]:
        """The caches of all masks."""
        return [cache for _, cache in self._offloaded()]

    @property
    def ledger(self) -> Ledger:
        """Who holds what; ``print`` it."""
        return Ledger(tuple(line for cache in self.offloaded for line in cache.ledger.lines))

    def migrate(self, sequence: int, to: int | None) -> None:
        """Move a sequence to another worker, or here (None), between two steps."""
        for cache in self.offloaded:
            cache.migrate(sequence, to)

    def release(self) -> None:
        """Have the workers free all of it."""
        for cache in self.offloaded:
            cache.release()

    def call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call of the decoder: done in full, or a :class:`WorkerLost` after which nothing of it is visible."""
        before = Moment({mask: cache.lengths for mask, cache in self.caches.items()}, self._seen)
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if self.recompute and tokens is None:
            raise ValueError("offloaded cache: got inputs_embeds, expected input_ids, of which a loss is rebuilt")
        try:
            found = self._done(forward, before, *args, **kwargs)
        except BaseException:
            self._seen = before.seen
            raise
        if self.recompute:
            assert tokens is not None, "checked above"
            self._remember(tokens, before)
        return found

    def _done(self, forward: Callable[..., Any], before: Moment, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                self._leave()
                return forward(*args, **kwargs)
            except WorkerLost as loss:
                if not self.recompute:
                    raise
                self.losses.append(loss)
                try:
                    self._rebuild(forward, before)
                except NoRoom as error:
                    reason = f"{loss.reason}; what it held fits nowhere else ({error})"
                    raise WorkerLost(loss.worker, loss.sequences, reason) from error

    def crop(self, tokens_to_remove: int) -> None:
        """See :meth:`ShardedCache.crop`."""
        super().crop(tokens_to_remove)
        self._tokens = [row[:length] for row, length in zip(self._tokens, self._lengths(), strict=True)]

    def reset(self) -> None:
        """See :meth:`ShardedCache.reset`."""
        super().reset()
        self._tokens = [[] for _ in range(self.batch)]

    def _offloaded(self) -> Iterator[tuple[seqpar.Mask, OffloadedCache]]:
        for mask, cache in self.caches.items():
            assert isinstance(cache, OffloadedCache), "made here"
            yield mask, cache

    def _lengths(self) -> tuple[int, ...]:
        return next(iter(self.caches.values())).lengths

    def _leave(self) -> None:
        """Move everything off workers that are about to end; what fits nowhere else stays as long as they do."""
        for number, member in self.workers.alive.items():
            if member.leaving and member.holds:
                with contextlib.suppress(NoRoom):
                    for cache in self.offloaded:
                        cache.leave(number)

    def _remember(self, input_ids: Tensor, before: Moment) -> None:
        had = next(iter(before.lengths.values()))
        for row, (tokens, was, now) in enumerate(zip(input_ids.tolist(), had, self._lengths(), strict=True)):
            self._tokens[row] += tokens[len(tokens) - (now - was) :]

    def _rebuild(self, forward: Callable[..., Any], before: Moment) -> None:
        """As it was before the call, with what was lost on other workers. Raises WorkerLost where none is left."""
        while True:
            lost = (cache.lost_rows(before.lengths[mask]) for mask, cache in self._offloaded())
            rows = sorted({row for some in lost for row in some})
            try:
                for mask, cache in self._offloaded():
                    cache.restore(before.lengths[mask], rows)
                self._read_again(forward, rows)
                break
            except WorkerLost as loss:
                if all(member.leaving for member in self.workers.alive.values()):
                    raise
                self.losses.append(loss)
        self._seen = before.seen

    @torch.no_grad()
    def _read_again(self, forward: Callable[..., Any], rows: Sequence[int]) -> None:
        longest = max((len(self._tokens[row]) for row in rows), default=0)
        tokens = torch.zeros(self.batch, longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row in rows:
            if self._tokens[row]:
                tokens[row, -len(self._tokens[row]) :] = torch.tensor(self._tokens[row])
                mask[row, -len(self._tokens[row]) :] = 1
        device = self.offloaded[0]._device
        tokens, mask = tokens.to(device), mask.to(device)
        for first in range(0, longest, self.chunk):
            chunk = slice(first, min(first + self.chunk, longest))
            read(forward, tokens, mask, self, chunk, schedule="ring", layout="contiguous")


def guard(model: Any) -> None:
    """Let calls of the model with an :class:`OffloadedGeneration` go through it; others are as before."""
    decoder = model.get_decoder()
    if getattr(decoder, _GUARDED, None) is not None:
        return

    @functools.wraps(type(decoder).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache, inner = kwargs.get("past_key_values"), getattr(self, _GUARDED)
        if isinstance(cache, OffloadedGeneration):
            return cache.call(inner, *args, **kwargs)
        return inner(*args, **kwargs)

    # Bound methods: those of a copy of the model are bound to the copy.
    setattr(decoder, _GUARDED, decoder.forward)
    decoder.forward = types.MethodType(forward, decoder)
