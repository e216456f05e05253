"""`seqpar generate --attention-workers`: each rank has some of the prompts, and their keys and values on workers."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from seqpar.comm.reduction import even_shares
from seqpar.offload import Turns, WorkerLost
from seqpar.offload.channel import Lost
from seqpar.offload.meeting import join_store
from seqpar.offload.workers import WAIT

from .decoding import closing_tokens, forget_settings, said
from .distributed import Ranks
from .errors import RunError
from .generate_config import GenerateConfig
from .loading import Source
from .offloaded_batch import Abandoned, Batch, Outcome
from .telling import OffloadFigures, Result, Telling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def look_for_workers(config: GenerateConfig) -> None:
    """Raise RunError where there is no store: long before it is needed, for models take their time to load."""
    try:
        join_store(str(config.attention_workers), min(WAIT, config.timeout))
    except Lost as error:
        raise RunError(str(error)) from error


class OffloadedGeneration:
    """A batch of prompts dealt over the ranks in order, each rank's perhaps in two batches in rotation.

    Every batch draws from a seed of its own, --seed and its number among the batches of all ranks: so that what it
    draws does not depend on the others.
    """

    def __init__(self, config: GenerateConfig, ranks: Ranks, source: Source, prompts: Sequence[list[int]]) -> None:
        """Raises ValueError where some rank would have no prompts, and for what batches in rotation can't do."""
        config.check_shares(len(prompts), ranks.size)
        if config.batches > 1 and config.temperature and ranks.device.type == "cuda":
            raise ValueError(
                f"--batches {config.batches} got --temperature {config.temperature} on a GPU, whose random numbers all "
                "batches share; expected --temperature 0: drop one of both"
            )
        self.config, self.ranks, self.source, self.prompts = config, ranks, source, prompts

    def result(self, model: PreTrainedModel) -> Result:
        """Everything, on every rank. Raises RunError for a worker that was lost and not made up for."""
        forget_settings(model)
        outcomes = [
            Outcome(**fields)
            for text in texts_of(self.ranks, json.dumps([asdict(outcome) for outcome in self._mine(model)]))
            for fields in json.loads(text)
        ]
        rows = [row for outcome in outcomes for row in outcome.tokens]
        text, ends = self.source.text, closing_tokens(self.config, self.source)
        seconds = [max(each) for each in zip(*(outcome.seconds for outcome in outcomes), strict=True)]
        per_rank = self.config.batches
        resident = [outcome.resident_bytes for outcome in outcomes]
        return Result(
            **said(self.prompts, rows, text, ends),
            prefilled_tokens=sum(outcome.prefilled_tokens for outcome in outcomes),
            prefill_seconds=seconds[0],
            decode_seconds=seconds[1],
            decode_bytes=_busiest([outcome.sent for outcome in outcomes], per_rank),
            cache_bytes=max(sum(resident[first : first + per_rank]) for first in range(0, len(resident), per_rank)),
            ranks=self.ranks.size,
            device=self.ranks.device.type,
            offload=OffloadFigures.of(outcomes),
        )

    def _mine(self, model: PreTrainedModel) -> list[Outcome]:
        """This rank's batches."""
        config, batches = self.config, self.config.batches
        share = even_shares(len(self.prompts), self.ranks.size)[self.ranks.rank]
        first, mine = share.start, self.prompts[share]
        turns = Turns(keeps_random_state=bool(config.temperature)) if batches > 1 else None
        together = _Together(batches)
        made = [
            Batch(
                config, self.ranks, self.source, mine[part], number=self.ranks.rank * batches + number,
                first=first + part.start, turns=turns, meet=together.meet,
                telling=self._telling(shows=self.ranks.rank == 0 and number == 0, together=together),
            )
            for number, part in enumerate(even_shares(len(mine), batches))
        ]  # fmt: skip
        try:
            return together.run(made, model) if batches > 1 else [made[0].outcome(model)]
        except WorkerLost as loss:
            raise RunError(f"{loss}; {self._remedy()}") from loss

    def _telling(self, *, shows: bool, together: _Together) -> Telling:
        streams = shows and len(self.prompts) == 1 and not self.config.json
        return Telling(
            self.source.text.stream(self.prompts[0]) if streams else None,
            silent=closing_tokens(self.config, self.source),
            steps=self.config.max_new_tokens,
            shows=shows,
            at_each=together.check,
        )

    def _remedy(self) -> str:
        if self.config.worker_loss == "recompute":
            return "no worker is left to go on with: start some, and run the command again"
        return (
            "start it anew and run the command again, or use --worker-loss recompute to go on with those that are left"
        )


class _Together:
    """Batches in rotation, each in a thread of its own: they meet after the prefill, and end together."""

    def __init__(self, batches: int) -> None:
        self._barrier = threading.Barrier(batches)
        self._abandoned = threading.Event()

    def meet(self, turns: Turns | None) -> None:
        """Wait for the others, while they compute. Raises Abandoned where one has failed."""
        if turns is not None:
            with turns.away():
                try:
                    self._barrier.wait()
                except threading.BrokenBarrierError:
                    raise Abandoned from None

    def check(self) -> None:
        """Raise Abandoned where another batch has failed."""
        if self._abandoned.is_set():
            raise Abandoned

    def run(self, batches: Sequence[Batch], model: PreTrainedModel) -> list[Outcome]:
        """Every batch's outcome; or the error of the first that failed, after all have ended."""
        outcomes, errors = dict[int, Outcome](), list[BaseException]()
        threads = torch.get_num_threads()

        def work(number: int) -> None:
            torch.set_num_threads(threads)  # each thread has its own number, and its own GPU
            if batches[number].ranks.device.type == "cuda":
                torch.cuda.set_device(batches[number].ranks.device)
            try:
                outcomes[number] = batches[number].outcome(model)
            except Abandoned:
                pass
            except BaseException as error:
                errors.append(error)
                self._give_up()

        running = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(batches))]
        try:
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
        except KeyboardInterrupt:
            self._give_up()
            raise
        if errors:
            raise errors[0]
        return [outcomes[number] for number in range(len(batches))]

    def _give_up(self) -> None:
        self._abandoned.set()
        self._barrier.abort()


def texts_of(ranks: Ranks, text: str) -> list[str]:
    """Every rank's text, on every rank."""
    data = list(text.encode())
    longest = int(ranks.gather([len(data)]).max())
    padded = ranks.gather([*data, *[0x20] * (longest - len(data))])  # spaces
    return [bytes(row).decode() for row in padded.tolist()]


def _busiest(sent: Sequence[dict[str, int]], per_rank: int) -> dict[str, int]:
    """By kind, of the rank that sent most, whose batches come one after another."""
    ranks = [
        {kind: sum(batch[kind] for batch in sent[first : first + per_rank]) for kind in sent[first]}
        for first in range(0, len(sent), per_rank)
    ]
    return max(ranks, key=lambda rank: sum(rank.values()))
