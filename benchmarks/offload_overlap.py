"""What overlaps in attention offload: keys that come later than queries, and a prompt's keys on their way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from measuring import median
from offload_setting import DIM, HEADS, Size, fill, in_turn, llama, new_tokens, over

import seqpar
from seqpar.integrations import huggingface
from seqpar.offload import OffloadedCache, Workers
from seqpar.offload.frames import Kind
from seqpar.offload.memory import RemoteMemory

SIZE = Size(hidden=1024, intermediate=2816, layers=4, heads=(16, 4))


@torch.inference_mode()
def late_keys(address: str, keys: int, runs: int) -> list[dict[str, object]]:
    """A call of one token whose keys and values come some time after its queries, and one that waits for them."""
    torch.set_num_threads(1)
    with Workers.join(address) as workers:
        (member,) = workers.alive.values()
        capacity = keys + 12 * (runs + 1)
        cache = OffloadedCache(seqpar.Causal(), workers=workers, heads=HEADS, head_dim=DIM, capacity=capacity)
        fill(cache, keys)
        inputs = new_tokens(1, torch.float32)

        def late(kind: Kind, seconds: float) -> Callable[[], object]:
            def call() -> None:
                with before(member, kind, seconds):
                    cache.attend(*inputs)

            return call

        at_once = median(in_turn({"call": lambda: cache.attend(*inputs)}, runs)["call"])
        shares = (0.25, 0.5, 1.0)
        calls: dict[str, Callable[[], object]] = {"at once": lambda: cache.attend(*inputs)}
        for share in shares:
            calls[f"{share} first"] = late(Kind.APPEND, share * at_once)
            calls[f"{share} wait"] = late(Kind.ATTEND, share * at_once)
        seconds = in_turn(calls, runs)
        cache.release()
    rows: list[dict[str, object]] = []
    for share in (0.0, *shares):
        first, wait = (seconds.get(f"{share} {name}", seconds["at once"]) for name in ("first", "wait"))
        rows.append(
            {
                "k and v come after, ms": share * at_once * 1e3, "queries first, ms": median(first) * 1e3,
                "queries wait for them, ms": median(wait) * 1e3, "first / wait": over(first, wait),
            }
        )  # fmt: skip
    return rows


@contextmanager
def before(member: Any, kind: Kind, seconds: float) -> Iterator[None]:
    """Frames of a kind leave so much later, as if what they carry were not computed yet."""
    send = member.send

    def later(this: Kind, *tensors: torch.Tensor, **fields: Any) -> None:
        if this is kind:
            time.sleep(seconds)
        send(this, *tensors, **fields)

    with mock.patch.object(member, "send", later):
        yield


def prompt(address: str, *, size: Size = SIZE, tokens: int = 1024, runs: int = 3) -> list[dict[str, object]]:
    """Reading a prompt: with a local cache, with one that streams, with one that waits for the worker in each layer."""
    torch.set_num_threads(1)
    model, take = llama(size), RemoteMemory.take
    ids = torch.randint(size.vocabulary, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    with Workers.join(address) as workers:
        (member,) = workers.alive.values()
        about: dict[str, Any] = {"capacity": tokens + 1, "chunk": tokens}
        here = huggingface.sharded_cache(model, **about)
        there = huggingface.offloaded_cache(model, workers, **about)

        def read(cache: Any) -> None:
            cache.reset()
            huggingface.prefill(model, ids, cache, schedule="ring")

        def streamed() -> None:
            read(there)
            member.ask(Kind.SYNC)  # it has them all

        def waiting() -> None:
            def and_wait(memory: RemoteMemory, *args: Any, **kwargs: Any) -> object:
                found = take(memory, *args, **kwargs)
                member.ask(Kind.SYNC)
                return found

            with mock.patch.object(RemoteMemory, "take", and_wait):
                read(there)

        seconds = in_turn({"local": lambda: read(here), "streamed": streamed, "waiting": waiting}, runs)
        there.release()
    return [
        {
            "prompt": name, "tokens": tokens, "seconds": median(values), "of local": over(values, seconds["local"]),
            "MB sent": 0.0 if name == "local" else tokens * size.kv_bytes(4) / 1e6,
        }
        for name, values in seconds.items()
    ]  # fmt: skip
