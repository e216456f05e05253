"""What `seqpar generate` tells: text as it comes, progress, and at the end texts, a summary or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .report import in_bytes
from .text import Stream

if TYPE_CHECKING:
    from .offloaded_batch import Outcome

_SHOWN = 60
"""Characters of a prompt in the heading of its text."""


_ADDED = ("parts", "cache_bytes", "sent_bytes", "received_bytes")
"""Of a worker, by all batches together."""


@dataclass(frozen=True, kw_only=True)
class OffloadFigures:
    """What `--json` prints besides, of keys and values on attention workers.

    workers: of each its number and name, what it holds at the end for all ranks, and what went to it and came from it
    after the prefill, in bytes of payload. losses: of workers that were made up for. wire_bytes_sent and
    wire_bytes_received: queries, keys and values to the workers, and outputs back, per layer and token.
    """

    workers: list[dict[str, Any]]
    losses: list[str]
    wire_bytes_sent: float
    wire_bytes_received: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> OffloadFigures:
        """Of all batches of all ranks."""
        workers: dict[int, dict[str, Any]] = {}
        for state in (state for outcome in outcomes for state in outcome.workers):
            total = workers.setdefault(state["worker"], {**state, **dict.fromkeys(_ADDED, 0), "lost": False})
            total.update({name: total[name] + state[name] for name in _ADDED})
            total["lost"] |= state["lost"]
        fed = max(1, sum(outcome.fed * outcome.layers for outcome in outcomes))
        return cls(
            workers=[workers[number] for number in sorted(workers)],
            losses=list(dict.fromkeys(loss for outcome in outcomes for loss in outcome.losses)),
            wire_bytes_sent=sum(sum(outcome.sent.values()) for outcome in outcomes) / fed,
            wire_bytes_received=sum(outcome.received for outcome in outcomes) / fed,
        )

    def summary(self, here: int) -> str:
        """For a person. here: bytes of keys and values that stayed with the model, on one rank."""
        held = [
            f"{in_bytes(worker['cache_bytes'])} on worker {worker['worker']} ({worker['name']})"
            for worker in self.workers
            if worker["cache_bytes"]
        ]
        held += [f"{in_bytes(here)} per rank"] if here else []
        return (
            f"{in_bytes(self.wire_bytes_sent)} to workers and {in_bytes(self.wire_bytes_received)} back per layer and "
            f"token · cache {', '.join(held)}"
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `--json` prints.

    texts, tokens, finished: of each prompt; the text that was generated, its tokens, a closing one included, and why
    they end: "end" or "length". prompt_tokens, generated_tokens: of each prompt. prefill_seconds: for prefilled_tokens,
    all of the prompts but their last ones; decode_seconds: for those and the generated ones. decode_bytes, by kind, and
    cache_bytes, of keys and values: what one rank sent after the prefill, and holds; of the rank with most of it.
    """

    texts: list[str]
    tokens: list[list[int]]
    finished: list[str]
    prompt_tokens: list[int]
    generated_tokens: list[int]
    prefilled_tokens: int
    prefill_seconds: float
    decode_seconds: float
    decode_bytes: dict[str, int]
    cache_bytes: int
    ranks: int
    device: str
    offload: OffloadFigures | None = None

    @property
    def prefill_speed(self) -> float:
        """Tokens per second that went through the model before the first was generated."""
        return self.prefilled_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_speed(self) -> float:
        """Tokens generated per second, over all prompts."""
        return sum(self.generated_tokens) / max(self.decode_seconds, 1e-9)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a rank sent for one generated token."""
        return sum(self.decode_bytes.values()) / max(sum(self.generated_tokens), 1)

    def as_json(self) -> str:
        """One line of JSON."""
        figures = {
            "prefill_tokens_per_second": self.prefill_speed,
            "decode_tokens_per_second": self.decode_speed,
            "bytes_per_token": self.bytes_per_token,
        }
        own = asdict(self)
        offload = own.pop("offload") or {}
        return json.dumps({**own, **offload, **figures}, ensure_ascii=False)

    def summary(self) -> str:
        """One line for a person."""
        where = (
            f"{in_bytes(self.bytes_per_token)} sent per rank and token · cache {in_bytes(self.cache_bytes)} per rank"
            if self.offload is None
            else self.offload.summary(self.cache_bytes)
        )
        return (
            f"{sum(self.prompt_tokens):,} prompt tokens · {sum(self.generated_tokens):,} generated · "
            f"prefill {self.prefill_speed:,.0f} tokens/s · decode {self.decode_speed:,.1f} tokens/s · {where}"
        )


class Telling(BaseStreamer):
    """Tells of one generation while it goes on; silent on ranks other than 0. A streamer of `model.generate`.

    stream: of the text to tell as it comes, if it is to be. silent: tokens of which no text is told. steps: the most
    tokens to come. shows: whether there is progress to see, on a terminal. at_each: called between chunks and between
    tokens; what it raises ends the generation.
    """

    def __init__(
        self, stream: Stream | None, *, silent: Sequence[int], steps: int, shows: bool,
        at_each: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._stream, self._silent, self._steps, self._at_each = stream, silent, steps, at_each
        self._written = -1  # the first that comes are the prompts
        self._bar: Progress | None = None
        if shows and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)

    def prefilled(self, done: int, total: int) -> None:
        """So many tokens of the prompts have gone through the model."""
        self._at_each()
        self._show("reading", done, total)

    def put(self, value: Tensor) -> None:
        """The next token of each prompt [B]; the first time the prompts themselves."""
        self._at_each()
        self._written += 1
        if self._stream is None:
            self._show("writing", self._written, self._steps)
        elif self._written:
            self.close()
            token = int(value.flatten()[0])
            if token not in self._silent:
                print(self._stream.put(token), end="", flush=True)

    def end(self) -> None:
        """No more tokens come."""
        if self._stream is not None:
            print(self._stream.end(), flush=True)

    def close(self) -> None:
        """Take the progress off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, what: str, done: int, total: int) -> None:
        if self._bar is not None:
            if not done:
                self._bar.reset(self._task)  # what comes next has a speed of its own
            self._bar.update(self._task, description=what, completed=done, total=total)


def tell(result: Result, prompts: Sequence[str], *, as_json: bool) -> None:
    """Print the result; of a single prompt the text is told already."""
    if as_json:
        print(result.as_json(), flush=True)
        return
    if len(prompts) > 1:
        for number, (prompt, text) in enumerate(zip(prompts, result.texts, strict=True), 1):
            words = " ".join(prompt.split())
            shown = words if len(words) <= _SHOWN else f"{words[:_SHOWN]}…"
            print(f"--- prompt {number} of {len(prompts)}: {shown}\n{text}", flush=True)
    for loss in result.offload.losses if result.offload else []:
        print(f"{loss}; what it held was rebuilt from the tokens", file=sys.stderr, flush=True)
    print(result.summary(), file=sys.stderr, flush=True)
