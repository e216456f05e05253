"""A batch of prompts of one rank, generated with its keys and values on attention workers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from seqpar.integrations import huggingface
from seqpar.offload import Placement, Turns, Workers
from seqpar.offload.frames import Kind
from seqpar.offload.workers import WAIT, Member

from .decoding import closing_tokens, now, rows_of, settings
from .distributed import Ranks
from .generate_config import GenerateConfig
from .loading import Source
from .prompts import left_padded
from .telling import Telling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from seqpar.integrations.offload import OffloadedGeneration

_SENT = {"queries": Kind.ATTEND, "keys and values": Kind.APPEND}


class Abandoned(Exception):
    """Another batch has failed: this one need not go on."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a batch; JSON can hold all of it.

    tokens: of each prompt, with what closes it. prefilled_tokens: all of the prompts but their last ones. seconds: of
    the prefill, and of all that came after it, during which were fed ``fed`` tokens, padding among them, to ``layers``
    layers, and sent and received so many bytes of payload by kind. resident_bytes: of keys and values that stayed here.
    workers: each one's state. losses: that were made up for.
    """

    tokens: list[list[int]]
    prefilled_tokens: int
    seconds: list[float]
    fed: int
    layers: int
    sent: dict[str, int]
    received: int
    resident_bytes: int
    workers: list[dict[str, Any]]
    losses: list[str]


class Batch:
    """Some of this rank's prompts.

    number: among the batches of all ranks. first: the first prompt's number among all prompts, from 0. turns: of a rank
    with several batches. meet: waits for those between prefill and generation.
    """

    def __init__(
        self, config: GenerateConfig, ranks: Ranks, source: Source, prompts: Sequence[list[int]], *, number: int,
        first: int, turns: Turns | None, meet: Callable[[Turns | None], None], telling: Telling,
    ) -> None:  # fmt: skip
        self.config, self.ranks, self.source, self.prompts = config, ranks, source, prompts
        self.number, self.first, self._turns, self._meet, self._telling = number, first, turns, meet, telling

    def outcome(self, model: PreTrainedModel) -> Outcome:
        """Generate, in a thread of its own where there are turns. Raises WorkerLost, Abandoned and ValueError."""
        with torch.no_grad(), self._turns.mine() if self._turns else contextlib.nullcontext():
            return self._generate(model)

    def _generate(self, model: PreTrainedModel) -> Outcome:
        config = self.config
        tokens, mask = (x.to(self.ranks.device) for x in left_padded(self.prompts, self.source.text.padding))
        address, patience = str(config.attention_workers), min(WAIT, config.timeout)
        with (
            Workers.join(
                address, deadline=config.worker_deadline, timeout=patience, device=self.ranks.device, turns=self._turns
            ) as workers,
            contextlib.closing(self._telling),
        ):
            cache = huggingface.offloaded_cache(
                model,
                workers,
                capacity=tokens.shape[1] + config.max_new_tokens,
                batch=len(self.prompts),
                placement=Placement(config.offload_heads, config.offload_segments, config.offload_local),
                loss=config.worker_loss,
                masks=self.source.masks,
                chunk=config.chunk,
            )
            for line in workers.absent:
                print(f"seqpar generate: {line}; going on without it", file=sys.stderr, flush=True)
            began = now(self.ranks.device)
            huggingface.prefill(
                model, tokens, cache, attention_mask=mask, schedule="ring", progress=self._telling.prefilled
            )
            self._meet(self._turns)
            prefilled, seen, before = now(self.ranks.device), cache.get_seq_length(), _Wire(workers)
            if config.ledger or config.debug:
                self._show(cache)
            torch.manual_seed((config.seed + self.number) % 2**63)
            generates: Any = model
            output = generates.generate(
                tokens,
                attention_mask=mask,
                past_key_values=cache,
                streamer=self._telling,
                generation_config=settings(config, self.source),
            )
            ended, wire = now(self.ranks.device), _Wire(workers) - before
            return Outcome(
                tokens=rows_of(output[:, tokens.shape[1] :], closing_tokens(config, self.source)),
                prefilled_tokens=int(mask[:, :seen].sum()),
                seconds=[prefilled - began, ended - prefilled],
                fed=(cache.get_seq_length() - seen) * len(self.prompts),
                layers=len(cache.layers),
                sent={name: wire.sent.get(kind, 0) for name, kind in _SENT.items()},
                received=wire.received.get(Kind.RESULT, 0),
                resident_bytes=cache.resident_bytes,
                workers=[_state(member, cache, wire) for member in workers.members.values()],
                losses=[str(loss) for loss in cache.losses],
            )

    def _show(self, cache: OffloadedGeneration) -> None:
        numbers = self.first + 1, self.first + len(self.prompts)
        which = "prompt {0}" if len(self.prompts) == 1 else "prompts {0} to {1}, sequences from 0"
        sys.stderr.write(f"seqpar generate: keys and values of {which.format(*numbers)}:\n{cache.ledger}\n")
        sys.stderr.flush()


class _Wire:
    """Bytes of payload that went to and came from workers so far, by kind and by worker's number."""

    def __init__(self, workers: Workers) -> None:
        self.sent, self.received = dict[Kind, int](), dict[Kind, int]()
        self.by_worker = dict[int, tuple[int, int]]()
        for number, member in workers.members.items():
            self.by_worker[number] = member.channel.sent.bytes, member.channel.received.bytes
            for totals, tally in ((self.sent, member.channel.sent), (self.received, member.channel.received)):
                for kind, (_, size) in tally.by_kind.items():
                    totals[kind] = totals.get(kind, 0) + size

    def __sub__(self, before: _Wire) -> _Wire:
        """What came since then."""
        for total, then in ((self.sent, before.sent), (self.received, before.received)):
            for kind, size in then.items():
                total[kind] -= size
        for number, (sent, received) in before.by_worker.items():
            now_sent, now_received = self.by_worker[number]
            self.by_worker[number] = now_sent - sent, now_received - received
        return self


def _state(member: Member, cache: OffloadedGeneration, wire: _Wire) -> dict[str, Any]:
    held = [line for line in cache.ledger.lines if line.holder == f"worker {member.name}"]
    sent, received = wire.by_worker[member.number]
    return {
        "worker": member.number,
        "name": member.info.get("name", ""),
        "device": member.info.get("device", ""),
        "memory_bytes": member.info.get("memory", 0),
        "parts": len(held),
        "cache_bytes": sum(line.bytes for line in held),
        "sent_bytes": sent,
        "received_bytes": received,
        "lost": member.lost is not None,
    }
